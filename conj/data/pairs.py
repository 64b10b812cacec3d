"""Stage 4: judgments to contrastive pairs, by Con-J's recipe (paper, section 3).

Of a prompt's sampled judgments, right ones (their verdict is the label) are paired with wrong ones and with unparsed
ones; the judgment hinted towards the label is paired with the one hinted against it, or, where that one is unparsed,
with it as such. A judgment is used once; the choice among them is a hash of seed, prompt id and text, so it depends
neither on the order of the rows nor on Python's version.

`pairs.jsonl` is the conversational preference format that trainers of this ecosystem read as it is. Questions, not
rows, are held out for evaluation: the same question, white space and case aside, is never on both sides.

    python -m conj.data.pairs --run-dir runs/demo
"""

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from conj import InputError
from conj.data import manifest
from conj.data.files import locate_jsonl, read_at, write_jsonl
from conj.data.identity import describe_judge
from conj.data.judged import JudgedRunOptions
from conj.data.judges import UNFINISHED, Judge, judge_prompt, judgment_text
from conj.data.options import option, require, require_each, run_command
from conj.data.overlap import normalised
from conj.data.preprocess import stream_prompts
from conj.data.progress import progress
from conj.data.prompts import question_of

PairType = Literal["repeated", "repeated_vs_unparsed", "hinted", "hinted_vs_unparsed"]
HINTED = {"hinted", "hinted_vs_unparsed"}


@dataclass(frozen=True, kw_only=True)
class PairsOptions(JudgedRunOptions):
    max_right_vs_wrong: int = option(3, help="most pairs of a right and a wrong judgment a prompt")
    max_right_vs_unparsed: int = option(1, help="most pairs of a right and an unparsed judgment a prompt")
    max_hinted: int = option(1, help="most pairs of hinted judgments a prompt")
    pair_types: tuple[PairType, ...] = option(get_args(PairType), help="types of pairs to make")
    chosen_length: Literal["longer", "shorter"] | None = option(
        None, help="keep only prompts whose better answer is that, in characters; all if not given"
    )
    rationale: bool = option(True, help="keep the reasons; without them judgments are bare verdicts, none is unparsed")
    thoughts: Literal["keep", "drop"] = option(
        "keep",
        help="keep: sampled judgments are trained on with the thoughts before them; drop: without; hinted ones have none",
    )
    eval_fraction: float = option(0.02, help="share of the questions held out for evaluation, from 0 to 1")
    seed: int = option(2021, help="seed of the choice among judgments and of the held-out questions")

    def makes(self) -> dict[Path, list]:
        files = ["prompts.jsonl", "repeated.jsonl"] + (["hinted.jsonl"] if HINTED & set(self.pair_types) else [])
        judge = describe_judge(self.read_judge())
        return {self.run_dir / "pairs.jsonl": [*(self.find(name) for name in files), judge]}

    def __post_init__(self):
        self.read_judge()
        counts = ("max_right_vs_wrong", "max_right_vs_unparsed", "max_hinted")
        require_each(self, counts, lambda value: value >= 0, "a number of pairs from 0 up")
        require_each(self, ("eval_fraction",), lambda value: 0 <= value < 1, "0 to below 1")


class Pair(NamedTuple):
    chosen: str
    rejected: str
    pair_type: PairType


def build_pairs(options: PairsOptions) -> None:
    """Writes `pairs.jsonl`. Raises InputError for a file that is missing, torn or of other prompts, and for no pair at all."""
    began, [(artefact, inputs)] = time.monotonic(), options.makes().items()
    prompts_file, *files, _ = inputs
    for hinted in files[1:]:
        require(hinted.exists(), f"{hinted}: no such file; leave hinted pairs out of --pair-types to do without")
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    ids = [prompt["id"] for prompt in stream_prompts(prompts_file)]
    counts, prompts = Counter(), progress(stream_prompts(prompts_file), desc="pairing", total=len(ids), unit=" prompts")
    places = [index_judgments(path, ids) for path in files]
    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "rb")) for path in files]

        def judgments_of(id: str) -> list[dict]:
            return [read_at(file, offset) for file, offsets in zip(opened, places) for offset in offsets[id]]

        num_rows = write_jsonl(artefact, make_rows(prompts, judgments_of, options, counts))
    manifest.finish(artefact, num_rows=num_rows, counts=dict(counts), seconds=time.monotonic() - began)


def index_judgments(path: Path, ids: list[str]) -> dict[str, array]:
    """Where in a file the judgments of each prompt id stand, whatever their order. Raises InputError, with file and line, for
    one of no known prompt, kind or verdict."""
    places = {id: array("q") for id in ids}
    lines = locate_jsonl(path, {"id": str, "kind": str, "text": str, "verdict": object})
    for line, offset, row in progress(lines, desc=f"reading {path.name}", unit=" judgments"):
        if row["id"] not in places:
            raise InputError(f"{path}:{line}: id {row['id']!r} is not in prompts.jsonl")
        if row["kind"] not in ("repeated", "hint", "hint_reversed"):
            raise InputError(f"{path}:{line}: expected kind repeated, hint or hint_reversed, found {row['kind']!r}")
        if row["verdict"] is not None and (type(row["verdict"]), row["verdict"]) not in ((int, 1), (int, 2)):
            raise InputError(f"{path}:{line}: expected verdict 1, 2 or null, found {row['verdict']!r}")
        places[row["id"]].append(offset)
    return places


def make_rows(
    prompts: Iterable[dict], judgments_of: Callable[[str], list[dict]], options: PairsOptions, counts: Counter
) -> Iterator[dict]:
    """Rows of `pairs.jsonl`, one in memory at a time. In `counts`: pairs by type and split, prompts without a pair and why.
    Raises InputError if there is no row at all."""
    judge = options.read_judge()
    counts.update(dict.fromkeys((*get_args(PairType), "train", "eval", "prompts_without_pair"), 0))
    for prompt in prompts:
        id, label, question = prompt["id"], prompt["label"], question_of(prompt)
        if options.chosen_length and (length := _length_of_better(prompt)) != options.chosen_length:
            counts[f"left_out_better_is_{length}"] += 1
            continue
        split = "eval" if _fraction(options.seed, normalised(question)) < options.eval_fraction else "train"
        made = judgments_of(id)
        trained = [row | {"text": text} for row in made if (text := trained_text(row, options, judge)) is not None]
        if cut := len(made) - len(trained):
            counts["left_out_unfinished_thought"] += cut
        pairs = make_pairs(id, label, trained, options, judge)
        counts.update([pair.pair_type for pair in pairs] + [split] * len(pairs))
        if not pairs:
            counts.update(["prompts_without_pair", f"because_{_why_none(label, made)}"])
        hinted = {row["verdict"] for row in made if row["kind"] == "hint"}
        if hinted and label not in hinted:
            counts["hints_without_the_label"] += 1
        messages = judge_prompt(judge, question, prompt["answer_1"], prompt["answer_2"])
        for pair in pairs:
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair[:2])
            row = {"prompt": messages, "chosen": chosen, "rejected": rejected, "id": id, "label": label}
            yield {**row, "pair_type": pair.pair_type, "split": split}
    if not counts["train"] + counts["eval"]:
        found = ", ".join(f"{k} {v}" for k, v in counts.items() if v)
        raise InputError(f"{options.run_dir}: no pair can be made: {found}")


def make_pairs(id: str, label: int, judgments: list[dict], options: PairsOptions, judge: Judge) -> list[Pair]:
    """A prompt's pairs of one judgment to be preferred over another, no two of the same texts. `judgments`: with the texts that
    are trained on, see `trained_text`."""

    def texts(kind: str, verdict: int | None) -> list[str]:
        found = {row["text"] for row in judgments if row["kind"] == kind and row["verdict"] == verdict}
        if not options.rationale:
            found = {judgment_text(judge, None, verdict)} if found and verdict else set()
        return sorted(found, key=lambda text: _fraction(options.seed, id, text))

    def take(pair_type: PairType, chosen: list[str], rejected: list[str], limit: int) -> None:
        while pair_type in options.pair_types and chosen and rejected and limit > 0:
            made.append(Pair(chosen.pop(), rejected.pop(), pair_type))
            limit -= 1

    made = []
    right = texts("repeated", label)
    take("repeated", right, texts("repeated", 3 - label), options.max_right_vs_wrong)
    take("repeated_vs_unparsed", right, texts("repeated", None), options.max_right_vs_unparsed)
    hinted, before = texts("hint", label), len(made)
    take("hinted", hinted, texts("hint_reversed", 3 - label), options.max_hinted)
    still_wanted = options.max_hinted - (len(made) - before)
    # What was hinted at the wrong answer and states the right one all the same is no worse judgment.
    unparsed = [text for text in texts("hint_reversed", None) if judge.parse(text).value != label]
    take("hinted_vs_unparsed", hinted, unparsed, still_wanted)
    unique = {}
    for pair in made:
        if pair.chosen != pair.rejected:
            unique.setdefault(pair[:2], pair)
    return list(unique.values())


def trained_text(row: dict, options: PairsOptions, judge: Judge) -> str | None:
    """The text of a judgment as it is trained on; None where nothing of it is left: of an unfinished thought without it.

    A text that ends a thought and starts none follows on a prompt that does: without the thought it ends it first. Where the end
    mark is quoted in the judgment, so that the answer behind it would be torn, it is not told from a thought either."""
    text, (start, end) = row["text"], judge.thought
    if row.get("rung") == UNFINISHED and (options.thoughts == "drop" or row["kind"] != "repeated"):
        return None
    if options.thoughts == "keep":
        return text
    answer, was_opened = judge.answer(text), end in text and start not in text
    if answer is not None and judge.parse(answer).value not in (row["verdict"], judge.parse(text).value):
        return None
    return f"{end}\n\n{answer}" if was_opened and answer is not None else answer


def _length_of_better(prompt: dict) -> str:
    """How long the better answer is beside the other: `longer`, `shorter`, or `equal`."""
    better, worse = (len(prompt[f"answer_{i}"]) for i in (prompt["label"], 3 - prompt["label"]))
    return "longer" if better > worse else "shorter" if better < worse else "equal"


def _why_none(label: int, judgments: list[dict]) -> str:
    verdicts = {row["verdict"] for row in judgments if row["kind"] == "repeated"}
    if not verdicts:
        return "not_sampled"
    if label not in verdicts:
        return "no_right_judgment"
    return "only_right_judgments" if verdicts == {label} else "of_the_options"


def _fraction(*parts) -> float:
    """A number in [0, 1) that the parts decide."""
    content = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48


if __name__ == "__main__":
    run_command(build_pairs, PairsOptions, __doc__)
