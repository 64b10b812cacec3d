"""`scripts/make_ladder.py`: each rung is its rule, on real questions, and no question is both learned from and asked."""

import json
import sys
from collections import Counter
from pathlib import Path

import make_ladder
import pytest
from conftest import ROOT

from conj.data.files import read_jsonl
from conj.data.preprocess import load_prompts

QUESTIONS = ROOT / "real" / "ultrafeedback.jsonl.gz"
RUNGS = {rung.__name__: rung for rung in make_ladder.RUNGS}


def make(out: Path, *more: str, data: Path = QUESTIONS) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_ladder.py", "--data", str(data), "--out", str(out), *more])
        make_ladder.main()
    return out


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("ladder"))


def rows_of(ladder: Path, rung: str) -> list[dict]:
    test = [row for row in read_jsonl(ladder / "test.jsonl") if row["subset"] == rung]
    return test + read_jsonl(ladder / "train" / f"{rung}.jsonl")


def letters(text: str) -> list[str]:
    return ["".join(sorted(word)) for word in text.split()]


def is_start(some: list, whole: list) -> bool:
    return some == whole[: len(some)] or whole == some[: len(whole)]


def test_no_question_is_both_learned_from_and_asked(ladder):
    asked = {row["prompt"] for row in read_jsonl(ladder / "test.jsonl")}
    learned = {row["prompt"] for rung in RUNGS for row in read_jsonl(ladder / "train" / f"{rung}.jsonl")}
    assert len(asked) == 100 and len(learned) > 300 and not asked & learned


def test_each_made_rung_is_its_rule(ladder):
    """Also the negative control: a row of one rung keeps to no rule of another."""
    holds = {
        "garbled": lambda row: (
            is_start(letters(row["rejected"]), letters(row["chosen"])) and row["rejected"] not in row["chosen"]
        ),
        "cut": lambda row: row["rejected"].split() == row["chosen"].split()[:4],
        "scrambled": lambda row: (
            not Counter(row["rejected"].split()) - Counter(row["whole"].split()[:24])
            and row["rejected"] not in row["whole"]
        ),
    }
    whole = {row["prompt"]: " ".join(row["chosen"].split()) for row in make_ladder.read_questions(str(QUESTIONS))}
    for rung in (*holds, "off_topic"):
        for row in rows_of(ladder, rung):
            row["whole"] = whole[row["prompt"]]
            assert row["whole"].startswith(row["chosen"]) and 4 < len(row["chosen"].split()) <= 24
            assert [name for name, rule in holds.items() if rule(row)] == [rung] * (rung in holds), row


def test_the_worse_answer_of_another_question_is_that_question_s_better_one(ladder):
    whole = {row["prompt"]: " ".join(row["chosen"].split()) for row in make_ladder.read_questions(str(QUESTIONS))}
    for row in rows_of(ladder, "off_topic"):
        assert [p for p, text in whole.items() if text.startswith(row["rejected"])] not in ([], [row["prompt"]])


def test_the_real_rungs_hold_what_ultrafeedback_says(ladder):
    """Texts whole and unchanged; scores apart."""
    given = {row["prompt"]: row for row in make_ladder.read_questions(str(QUESTIONS))}
    for rung, least in (("every", 0), ("large_gap", 2)):
        for row in rows_of(ladder, rung):
            one = given[row["prompt"]]
            assert (row["chosen"], row["rejected"]) == (one["chosen"], one["rejected"])
            assert one["score_chosen"] > one["score_rejected"] and one["score_chosen"] - one["score_rejected"] >= least


def test_length_alone_does_not_tell_the_answers_apart_where_the_rule_is_another(ladder):
    for rung, least, most in (
        ("garbled", 0.35, 0.65),
        ("scrambled", 0.35, 0.65),
        ("off_topic", 0.35, 0.65),
        ("cut", 1, 1),
    ):
        longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows_of(ladder, rung)]
        assert least <= sum(longer) / len(longer) <= most


def test_the_same_bytes_again_and_of_conversations_too(ladder, tmp_path):
    """UltraFeedback on the hub holds the answers as conversations."""
    rows = read_jsonl_gz(QUESTIONS)
    turns = [
        {**row, **{name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
                   for name in ("chosen", "rejected")}}
        for row in rows
    ]  # fmt: skip
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns), "utf-8")
    again = make(tmp_path / "again", data=tmp_path / "turns.jsonl")
    files = sorted(path.relative_to(ladder) for path in ladder.rglob("*.jsonl"))
    assert len(files) == 7 and all((ladder / name).read_bytes() == (again / name).read_bytes() for name in files)


def read_jsonl_gz(path: Path) -> list[dict]:
    return [row for _, row in make_ladder.read_rows(str(path))]


def test_stage_1_takes_a_rung_and_keeps_its_name(ladder):
    rows, counts = load_prompts([str(ladder / "train" / "garbled.jsonl")], limit=20)
    assert {row["subset"] for row in rows} == {"garbled"} and counts["records"] == 20


ROW = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}


@pytest.mark.parametrize(("row", "more", "said"), [
    ({name: ROW[name] for name in ("prompt", "chosen", "rejected")}, [], "data.jsonl:1: expected the columns prompt, chosen, "
     "rejected, score_chosen, score_rejected, found prompt, chosen, rejected"),
    (ROW | {"chosen": None}, [], "data.jsonl:1: chosen: expected a text, found None"),
    (ROW | {"rejected": [{"role": "assistant"}]}, [], "data.jsonl:1: rejected: expected a text"),
    (ROW | {"score_chosen": "9"}, [], "data.jsonl:1: score_chosen: expected a number, found '9'"),
    (ROW, [], "data.jsonl: expected 102 short questions or more, found 0"),
    (ROW, ["--num-test", "-5"], "--num-test: expected 2 or more, found -5"),
])  # fmt: skip
def test_data_that_no_ladder_is_made_of_is_one_line(row, more, said, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as exit:
        make(tmp_path / "out", *more, data=tmp_path / "data.jsonl")
    assert exit.value.code == 2 and said in capsys.readouterr().err
