"""A ladder of preferences, from differences that a small model can see to those it cannot, made of the same real questions.

    python scripts/make_ladder.py --data real/ultrafeedback.jsonl.gz --out runs/real-data
    python scripts/make_ladder.py --data HuggingFaceH4/ultrafeedback_binarized:train_prefs --out runs/real-data

Each rung is a rule that says what the worse answer is, see RUNGS. Writes `train/RUNG.jsonl` and `test.jsonl`, whose
`subset` is the rung, in the layout of UltraFeedback; no question of the one stands in the other. Rows are in the order of a
hash of their questions, so the first 100 of the rungs that are made of every question ask the same.
"""

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from bench_common import argument_parser

from conj.data.files import brief, write_jsonl
from conj.data.options import bad_input_in_one_line, require
from conj.data.preprocess import is_conversation
from conj.data.readers import read_rows

MAX_QUESTION, MIN_ANSWER = 300, 8  # characters; words
# Words of an answer where the rule leaves enough to tell them apart: drawn anew for each, so length says nothing.
EXCERPT = (8, 24)
MAX_WHOLE = 400  # words of question and both answers, where they are shown whole; rows of more are left out
LARGE_GAP = 2  # of UltraFeedback's scores, 1 to 10
TEXTS, SCORES = ("prompt", "chosen", "rejected"), ("score_chosen", "score_rejected")


def garbled(row: dict, other: dict, rng: random.Random) -> tuple[str, str]:
    """The letters of each word in random order."""
    better, words = excerpt(row["chosen"], rng), excerpt(row["chosen"], rng).split()
    return better, " ".join("".join(rng.sample(word, len(word))) for word in words)


def cut(row: dict, other: dict, rng: random.Random) -> tuple[str, str]:
    """Its first four words."""
    better = excerpt(row["chosen"], rng)
    return better, " ".join(better.split()[:4])


def scrambled(row: dict, other: dict, rng: random.Random) -> tuple[str, str]:
    """Its words in random order."""
    better, words = excerpt(row["chosen"], rng), excerpt(row["chosen"], rng).split()
    return better, " ".join(rng.sample(words, len(words)))


def off_topic(row: dict, other: dict, rng: random.Random) -> tuple[str, str]:
    """The better answer to another question."""
    return excerpt(row["chosen"], rng), excerpt(other["chosen"], rng)


def large_gap(row: dict, other: dict, rng: random.Random) -> tuple[str, str] | None:
    """What was rejected, where the scores lie far apart."""
    return every(row, other, rng) if row["score_chosen"] - row["score_rejected"] >= LARGE_GAP else None


def every(row: dict, other: dict, rng: random.Random) -> tuple[str, str] | None:
    """What was rejected."""
    words = sum(len(row[name].split()) for name in ("prompt", "chosen", "rejected"))
    differ = row["score_chosen"] != row["score_rejected"] and row["chosen"] != row["rejected"]
    return (row["chosen"], row["rejected"]) if differ and words <= MAX_WHOLE else None


RUNGS = (garbled, cut, scrambled, off_topic, large_gap, every)  # easy to hard


def excerpt(text: str, rng: random.Random) -> str:
    """The first words of a text, on one line: line breaks would tell the answers apart."""
    return " ".join(text.split()[: rng.randint(*EXCERPT)])


def read_questions(data: str) -> list[dict]:
    """Rows of UltraFeedback's layout with a short question of one turn, each question once, in the order of their hashes."""
    found = {}
    for where, row in read_rows(data):
        row = {name: last_text(row[name]) if name in TEXTS else row[name] for name in (*TEXTS, *SCORES) if name in row}
        require(len(row) == 5, f"{where}: expected the columns {', '.join((*TEXTS, *SCORES))}, found {', '.join(row)}")
        for name, kind, what in (
            *((name, str, "a text") for name in TEXTS),
            *((name, int | float, "a number") for name in SCORES),
        ):
            require(isinstance(row[name], kind), f"{where}: {name}: expected {what}, found {brief(row[name])}")
        if len(row["prompt"]) <= MAX_QUESTION and len(row["chosen"].split()) >= MIN_ANSWER:
            found.setdefault(row["prompt"], row)
    return sorted(found.values(), key=lambda row: sha256(row["prompt"].encode()).digest())


def last_text(value):
    """Of a conversation the text of its last turn; all else as it is."""
    return value[-1]["content"] if is_conversation(value) else value


def rung_rows(rung, questions: list[dict]) -> Iterator[dict]:
    """Preferences of a rung, of the questions that it can be made of. A row's randomness is its question's own."""
    for place, row in enumerate(questions):
        rng = random.Random(row["prompt"])
        answers = rung(row, questions[place - 1], rng)
        if answers and answers[0] != answers[1]:
            yield {"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1], "subset": rung.__name__}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", required=True, help="UltraFeedback, binarized: a file, or a name on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--num-test", type=int, default=100, help="questions of the test set, on each rung")
    args = parser.parse_args()
    with bad_input_in_one_line():
        # One question's answer is off topic for another.
        require(args.num_test > 1, f"--num-test: expected 2 or more, found {args.num_test}")
        questions = read_questions(args.data)
        expected = f"{args.num_test + 2} short questions or more, found {len(questions)}"
        require(len(questions) >= args.num_test + 2, f"{args.data}: expected {expected}")
        test, train = questions[: args.num_test], questions[args.num_test :]
        (args.out / "train").mkdir(parents=True, exist_ok=True)
        write_jsonl(args.out / "test.jsonl", [row for rung in RUNGS for row in rung_rows(rung, test)])
        for rung in RUNGS:
            num_rows = write_jsonl(args.out / "train" / f"{rung.__name__}.jsonl", rung_rows(rung, train))
            print(f"{rung.__name__}: {num_rows} rows to train on, worse is: {rung.__doc__.lower()}")


if __name__ == "__main__":
    main()
