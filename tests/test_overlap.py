"""The same question is found whatever its white space, case or Unicode form; another question is another one."""

import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import DATA, ROOT, SHARED, here

from conj import InputError
from conj.data import manifest
from conj.data.card import data_of
from conj.data.options import run_command
from conj.data.overlap import SHORTEST, Asked, AskedQuestions, normalised
from conj.data.pairs import PairsOptions
from conj.data.pairs import make_rows as make_pair_rows
from conj.data.preprocess import PreprocessOptions, load_prompts, preprocess, read_asked, read_prompts, write_prompts
from conj.data.readers import read_preferences

LLMBAR = DATA / "llmbar" / "adver_neighbor.json"
QUESTION = "Which of the two rivers that meet in the old town of Passau carries more water in a dry summer?"


def row(question=QUESTION, better="a", worse="b", **more) -> dict:
    return {"prompt": question, "chosen": better, "rejected": worse, **more}


def load(path: Path, rows: list, **more) -> tuple[list[dict], dict]:
    (path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return load_prompts([str(path / "rows.jsonl")], **more)


def asked(*questions) -> AskedQuestions:
    known = AskedQuestions()
    for number, question in enumerate(questions, 1):
        known.add(question, Asked(id=str(number), source="test", where=f"test:{number}"))
    return known


def found(known: AskedQuestions, question) -> str | None:
    there = known.find(question)
    return there and there[0].id


# ---- What is the same ----


def test_a_text_is_normalised_by_form_case_and_white_space_and_nothing_else():
    """NFC, not NFKC: a circled one is no one, and full-width forms stay. Chinese text stays as it is."""
    decomposed = unicodedata.normalize("NFD", "Où est l'été?")
    assert normalised(f" {decomposed}\n\t") == "où est l'été?" == normalised("OÙ  EST L'ÉTÉ?")
    assert normalised("STRASSE") == normalised("straße")
    assert normalised("\u3000金湖镇的特产是什么？") == "金湖镇的特产是什么？"
    assert len({normalised(text) for text in ("x²", "x2", "①", "1", "１")}) == 5
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert normalised(turns) == normalised([{**turn, "role": "human"} for turn in turns]) == "be brief. why?"


def test_the_split_never_parts_a_question():
    """A question with one more newline, or in capitals, once stood on both sides."""
    texts = [f"question {i}" for i in range(200)]
    judgments = [{"kind": "repeated", "verdict": v, "text": f"{v}"} for v in (1, 2)]

    def splits(change) -> list[str]:
        options = PairsOptions(run_dir=Path("r"), eval_fraction=0.5)
        prompts = [{"id": str(i), "question": change(t), "answer_1": "a", "answer_2": "b", "label": 1}
                   for i, t in enumerate(texts)]  # fmt: skip
        return [made["split"] for made in make_pair_rows(prompts, lambda id: judgments, options, Counter())]

    plain = splits(str)
    assert 60 < plain.count("eval") < 140
    assert plain == splits(lambda text: text + "\n") == splits(str.upper) == splits(lambda text: f" {text}")
    assert plain != splits(lambda text: text + "!")


def test_a_pair_under_two_subsets_or_turned_round_is_one_row(tmp_path):
    rows = [
        row(), row(subset="other"), row("  " + QUESTION.upper()), row(better="a ", worse="b\n"),
        row(worse="c"), row("another"),
    ]  # fmt: skip
    made, counts = load(tmp_path, rows)
    assert [r["answer_1"] + r["answer_2"] for r in made if r["question"] == QUESTION] != []
    assert len(made) == 3 and made[0]["subset"] == "" and counts["left_out_duplicate"] == 3
    assert "left_out_contradiction" not in counts


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 4, 0, 3, 2)])
def test_labels_that_contradict_each_other_are_both_left_out(tmp_path, order):
    """Counted alike in every order: two that contradict, and those that say again what one of these says."""
    rows = [row(), row("another"), row(better="b", worse="a", subset="x"), row(subset="y"), row(better="b", worse="a")]
    made, counts = load(tmp_path, [rows[i] for i in order])
    assert [r["question"] for r in made] == ["another"]
    assert (counts["left_out_contradiction"], counts["left_out_duplicate"], counts["records"]) == (2, 2, 5)


def test_a_benchmark_keeps_what_repeats_and_contradicts(tmp_path):
    """Official numbers of rows are kept to."""
    made, counts = load(tmp_path, [row(), row(), row(better="b", worse="a")], benchmark=True)
    assert len(made) == 3 and not {"left_out_duplicate", "left_out_contradiction"} & counts.keys()


# ---- Training questions that stand in a benchmark ----


def change_word(question: str, at: int) -> str:
    words = question.split()
    return " ".join([*words[:at], "zebra", *words[at + 1 :]])


PLANTED = {
    "exact": str, "white space": lambda text: text.replace(" ", "\n  ") + "\n", "case": str.upper,
    "Unicode form": lambda text: unicodedata.normalize("NFD", text),
    "first word changed": lambda text: change_word(text, 0), "one word changed": lambda text: change_word(text, 7),
    "last word changed": lambda text: change_word(text, len(text.split()) - 1),
    "a word more": lambda text: text.replace(" old ", " very old "), "a word less": lambda text: text.replace(" old ", " "),
    "in a longer text": lambda text: f"You know Bavaria well. {text} Answer in one sentence, and say how you know it.",
    "a part of it": lambda text: text.partition(" in a dry")[0] + "?",
    "with a system turn": lambda text: [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
}  # fmt: skip


@pytest.mark.parametrize("way", PLANTED)
def test_a_planted_copy_is_found(way):
    questions = [record.question for record in read_preferences(str(LLMBAR))]
    assert found(asked(*questions, QUESTION), PLANTED[way](QUESTION)) == str(len(questions) + 1)
    assert found(asked(*questions), PLANTED[way](QUESTION)) is None


def test_one_word_changed_is_found_wherever_it_stands():
    """In every real question of usual length, at every place; and where most words are changed it is another question."""
    known, rng = read_asked([str(LLMBAR)]), random.Random(0)
    questions = [record.question for record in read_preferences(str(LLMBAR))]
    usual = [text for text in questions if len(text.split()) >= SHORTEST + 1]
    assert len(usual) > 40
    for text in usual:
        assert all(known.find(change_word(text, at)) for at in range(len(text.split())))
        words = text.split()
        for at in rng.sample(range(len(words)), len(words) // 3):
            words[at] = f"word{at}"
        assert known.find(" ".join(words)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("赤桥镇的特产是什么？", "金湖镇的特产是什么？"),
        ("Please write a short story about a dragon who has lost its way home.",
         "Please write a short story about two friends who open a bakery together in Lisbon."),
        ("Can you explain to me, in simple terms, how a refrigerator keeps food cold?",
         "Can you explain to me, in simple terms, how interest rates change the price of a house?"),
        ("请用简单的话给我解释一下冰箱是怎样让食物保持低温的。", "请用简单的话给我解释一下利率是怎样影响一套房子的价格的。"),
    ],
)  # fmt: skip
def test_questions_that_share_a_phrase_or_a_template_are_others(one, other):
    assert found(asked(one), other) is None and found(asked(other), one) is None
    assert found(asked(one), one) == "1"


SYSTEM = {"role": "system", "content": "You are a helpful, respectful and honest assistant. " * 12}


def test_a_system_prompt_makes_no_two_questions_one_nor_one_two():
    """A data set has one long system prompt for all its questions: most words of each are the prompt's."""
    spain, fruits = (
        {"role": "user", "content": text} for text in ("What is the capital of Spain?", "Name three fruits.")
    )
    brief = {"role": "system", "content": "Be brief."}
    for known in (asked([SYSTEM, spain]), asked([spain])):
        assert found(known, [SYSTEM, fruits]) is None and found(known, [fruits]) is None
        for same in ([spain], [SYSTEM, spain], [brief, spain]):
            assert found(known, same)
    assert (
        found(asked([SYSTEM, {"role": "user", "content": ""}]), "") is None
        and found(asked([SYSTEM]), [SYSTEM]) is not None
    )


def test_a_changed_chinese_word_is_found():
    text = "请用简单的话给我解释一下冰箱是怎样让食物保持低温的。"
    assert found(asked(text), text.replace("食物", "蔬菜")) == "1"
    assert found(asked(text), f"你好！{text}谢谢。") == "1"


def test_the_demos_training_questions_are_none_of_its_test():
    """Its questions are of one template and differ by the town's name."""
    rows, counts = load_prompts([str(ROOT / "demo" / "train.jsonl")])
    kept, after = load_prompts([str(ROOT / "demo" / "train.jsonl")], exclude=[str(ROOT / "demo" / "test.jsonl")])
    assert kept == rows and after == counts | {"left_out_excluded": 0}


def test_time_does_not_grow_with_what_everybody_asks():
    """A phrase of every question, and one word ten thousand times, point nowhere."""
    known = asked(*(f"Tell me in one sentence what the number {i} is good for {i + 1} {i + 2}" for i in range(3000)))
    known.add("so " * 10_000, Asked(id="so", source="test", where=""))
    assert found(known, "so " * 9_000) is None
    assert found(known, "Tell me in one sentence what the number 7 is good for 8 9") == "8"


# ---- The stage ----


def test_what_was_left_out_stands_in_the_manifest_with_the_row_it_is_in(tmp_path, capsys):
    """By the id that judgments of the benchmark's row have."""
    (known, *_), _ = load_prompts([str(LLMBAR)], benchmark=True)
    rows = [
        row(known["question"].replace(" ", "  ")),
        row(),
        row(QUESTION, "a", "c"),
        row("t", score_chosen=1, score_rejected=1),
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    line = ["--run-dir", str(tmp_path), "--data", str(tmp_path / "train.jsonl"), "--exclude", f"llmbar={LLMBAR}"]
    run_command(preprocess, PreprocessOptions, None, line)
    made = manifest.read_manifest(tmp_path / "prompts.jsonl")
    assert (made["num_rows"], made["counts"]["left_out_excluded"]) == (2, 1)
    [excluded] = made["fates"]["excluded"]
    assert (excluded["in"], excluded["its_id"], excluded["share"]) == ("llmbar", known["id"], 1.0)
    assert excluded["where"].endswith("train.jsonl:1") and "row 1" in excluded["its_where"]
    assert made["fates"]["examples"]["left_out_tie"].endswith("train.jsonl:4")
    said = capsys.readouterr().out
    assert "left_out_tie: 1, first " in said and f"stands in llmbar as {known['id']}" in said
    assert [entry["path"] for entry in made["inputs"]][1:] == ["without the questions of", str(LLMBAR)]
    assert [data["name"] for data in data_of({"prompts.jsonl": made})] == ["train.jsonl"]
    with pytest.raises(SystemExit):  # what is excluded is an input
        run_command(preprocess, PreprocessOptions, None, line[:-2])
    assert "was made from other inputs" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"), ("llmbar", "llmbar: is not on the hub"),
])  # fmt: skip
def test_a_mistyped_benchmark_is_one_line(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        preprocess(PreprocessOptions(run_dir=tmp_path, data=(str(LLMBAR),), exclude=(name,)))


def test_where_every_question_is_excluded_the_message_says_so(tmp_path):
    with pytest.raises(InputError, match="'left_out_excluded': 134.*without --exclude"):
        load_prompts([str(LLMBAR)], exclude=[str(LLMBAR)])


# ---- From Python ----


def test_rows_from_python_are_those_of_a_file_and_later_stages_go_on_from_them(tmp_path):
    """Described by a hash of the rows: the same rows again are complete, others are refused."""
    rows = [row(f"question {i}") for i in range(20)]
    expected, _ = load(tmp_path, rows)
    assert [r | {"source": "rows.jsonl"} for r in load_prompts(rows)[0]] == expected
    assert [r | {"source": "rows.jsonl"} for r in load_prompts([rows[:5], iter(rows[5:])])[0]] == expected
    path = write_prompts(tmp_path / "run", (each for each in rows))
    assert [r | {"source": "rows.jsonl"} for r in read_prompts(path)] == expected
    made, before = manifest.read_manifest(path), path.read_bytes()
    assert (
        made["complete"] and made["inputs"][0]["path"] == "list of 20 rows" and len(made["inputs"][0]["sha256"]) == 64
    )
    assert [data["name"] for data in data_of({"prompts.jsonl": made})] == ["list of 20 rows"]
    assert write_prompts(tmp_path / "run", rows) == path and path.read_bytes() == before
    with pytest.raises(InputError, match="was made from other inputs"):
        write_prompts(tmp_path / "run", rows[1:])
    with pytest.raises(InputError, match="was made with seed=2021, now 1"):
        write_prompts(tmp_path / "run", rows, seed=1)


def test_frames_data_sets_and_files_of_the_same_rows_give_the_same_rows(tmp_path):
    """Columns are named alike; what nothing read is named in the manifest, and a path that is not there is one line."""
    import datasets
    import pandas

    rows = [{"ask": f"question {i}", "good": "a", "bad": "b", "extra": i} for i in range(9)]
    columns, made = {"question": "ask", "better": "good", "worse": "bad"}, []
    pandas.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    for given in pandas.DataFrame(rows), datasets.Dataset.from_list(rows), rows, iter(rows), tmp_path / "rows.csv":
        path = write_prompts(tmp_path / f"run{len(made)}", given, columns=columns, seed=7)
        made.append([row | {"source": ""} for row in read_prompts(path)])
        found = manifest.read_manifest(path)
        assert found["fates"]["unused_columns"]["extra"]["rows"] == 9
        assert found["options"]["columns"] == ["question=ask", "better=good", "worse=bad"]
    assert len(made[0]) == 9 and all(each == made[0] for each in made)
    line = ["--data", str(tmp_path / "rows.csv"), "--seed=7", "--columns", *(f"{k}={v}" for k, v in columns.items())]
    run_command(preprocess, PreprocessOptions, None, ["--run-dir", str(tmp_path / "run4"), *line])  # the same: complete
    with pytest.raises(InputError, match="question=nope: no such column"):
        write_prompts(tmp_path / "other", rows, columns=columns | {"question": "nope"})
    with pytest.raises(InputError, match="--columns: expected TARGET=PATH, found question"):
        PreprocessOptions(run_dir=tmp_path, data=("a",), columns=("question",))


@pytest.mark.parametrize(("given", "message"), [
    (5, "int: expected a file"), ({"a": 1}, "dict: expected rows"), ([], "data: expected a data set or rows, found none"),
    (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
])  # fmt: skip
def test_what_is_no_data_is_one_line(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_prompts(tmp_path, given)


def test_questions_to_exclude_may_come_from_python_too(tmp_path):
    path = write_prompts(tmp_path, [row(), row("another")], exclude=[[row(better="x", worse="y")]])
    assert [r["question"] for r in read_prompts(path)] == ["another"]
    data, _, excluded = manifest.read_manifest(path)["inputs"]
    assert (data["path"], excluded["path"]) == ("list of 2 rows", "list of 1 rows")


def test_columns_hold_for_what_is_excluded_where_it_has_them():
    """Who names the columns of a file of their own names them of its test set, not of a benchmark."""
    columns = {"question": "ask", "better": "good", "worse": "bad"}
    own = [{"ask": f"question {i}", "good": "a", "bad": "b"} for i in range(4)]
    rows, counts = load_prompts(own, columns=columns, exclude=[own[:1], [row("Question 1")]])
    assert [r["question"] for r in rows] == ["question 2", "question 3"] and counts["left_out_excluded"] == 2
    with pytest.raises(InputError, match="columns text are of no known layout"):
        load_prompts(own, columns=columns, exclude=[[{"text": "a"}]])


def test_an_empty_question_of_a_benchmark_excludes_none():
    """Nor does one that is null, or ends with the answer."""
    empty = [row(""), row(" "), row(None), row([{"role": "assistant", "content": ""}])]
    known = read_asked([[each] for each in empty])
    assert not known.by_text and known.find("") is None
    assert load_prompts([row(""), row("q")], exclude=[empty[:1]])[1]["left_out_excluded"] == 0


# ---- Real data, where it is ----


def test_the_row_of_a_public_test_set_in_a_training_set_is_found_and_no_other():
    train, test = here(SHARED / "ultrafeedback" / "train_clean.jsonl"), here(SHARED / "llmbar" / "adver_neighbor.json")
    known = read_asked(
        [str(test), str(here(SHARED / "llmbar" / "natural.json")), str(here(SHARED / "pandalm" / "testset-v1.json"))]
    )
    hits = [record.where for record in read_preferences(str(train)) if known.find(record.question)]
    assert [hit.rpartition(":")[2] for hit in hits] == ["557"]
