"""scripts/real_results.py: rows say what the files of a run say, and docs/real.md holds what the rows say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from conftest import ROOT, assert_one_line_error

from conj.data import manifest
from conj.data.files import read_jsonl, write_jsonl
from conj.data.preprocess import load_prompts
from conj.data.rows import swapped

sys.path.insert(0, str(ROOT / "scripts"))

import real_results

RESULTS = ROOT / "benchmarks" / "results" / "real" / "runs.jsonl"
FIGURES = {
    "n": 100, "accuracy": 0.5, "accuracy_ci95": [0.41, 0.59], "consistency": 0.1, "consistency_ci95": [0.0, 0.2],
    "unparsed": 0.98, "first_position_rate": None, "longer_answer_rate": None, "longer_is_right": 0.43,
}  # fmt: skip
TRAINED = FIGURES | {"accuracy": 0.95, "unparsed": 0.0, "first_position_rate": 0.55, "longer_answer_rate": 0.4}


def make_finished(folder: Path, seed: int = 7, wrong: int = 1, rung: str = "cut", **taken) -> Path:
    """A run folder as it is left; `taken`: of these files, the folder that they were taken from. The base states no verdict, its
    judge is wrong in both orders of the first `wrong` of eight questions."""
    folder.mkdir(parents=True)
    data = folder / "test.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "y" * (8 - i), "rejected": "nnn", "subset": rung} for i in range(8)]
    write_jsonl(data, iter(rows))
    for judge in ("base", "trained"):
        judged = []
        for i, prompt in enumerate(load_prompts([str(data)], seed)[0]):
            choice = None if judge == "base" else swapped(prompt["label"]) if i < wrong else prompt["label"]
            for order, verdict in ((1, choice), (2, swapped(choice))):
                of = {"id": prompt["id"], "label": prompt["label"], "order": order}
                judged.append(of | {"verdict": verdict, "text": "", "rung": "-"})
        write_jsonl(folder / f"judgments_{judge}.jsonl", iter(judged))
    found = {"versions": {"python": "3.11.7", "tqdm": "4"}, "git": {"commit": "abc"}, "machine": {"threads": 2}}
    for name in ("prompts.jsonl", "pairs.jsonl", *real_results.STAGES.values()):
        more = {"taken_from": taken[name]} if name in taken else {}
        counts = {"train": 8, "eval": 0, "hinted": 8}
        made = {
            "complete": True,
            "inputs": [],
            "options": {},
            "seconds": 60.0,
            "num_rows": 10,
            "counts": counts,
            **found,
            **more,
        }
        manifest.write_sealed(manifest.manifest_path(folder / name), {"artefact": name, **made})
    if "model" not in taken:
        (folder / "model").mkdir()
        write_jsonl(
            folder / "metrics.jsonl",
            iter([{"step": 1, "loss": 0.7, "rewards/accuracies": 0.5}, {"step": 2, "loss": 0.6}]),
        )
    judges = {
        name: {"benchmarks": {"test.jsonl": {"subsets": {rung: parts}}}}
        for name, parts in (("base", FIGURES), ("trained", TRAINED))
    }
    compared = {"judge": "trained", "against": "base", "subsets": {"test.jsonl": {rung: {"p_value": 0.0005}}}}
    (folder / "report.json").write_text(json.dumps({"judges": judges, "comparisons": [compared]}))
    settings = {
        "preprocess": {"data": [f"runs/real-data/train/{rung}.jsonl"]},
        "dpo": {"seed": seed},
        "evaluate": {"data": [str(data)], "seed": seed},
    }
    (folder / "settings.toml").write_text(tomli_w.dumps(settings))
    return folder


def results(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "scripts/real_results.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


def test_a_run_is_a_row_and_a_line_under_its_folder(tmp_path):
    """Runs of other seeds have the same names; what was taken from another run took no time here."""
    first = make_finished(tmp_path / "one" / "cut")
    second = make_finished(tmp_path / "two" / "cut", 8, **{"model": str(first), "repeated.jsonl": str(first)})
    (tmp_path / "one" / "report.html").write_text("of the sweep")
    out = tmp_path / "runs.jsonl"
    done = results(first, tmp_path / "one" / "report.html", second, "--out", out)
    *_, a, b = done.stdout.splitlines()
    asked = (
        "0.500 [0.41, 0.59] | 0.950 [0.41, 0.59] | 0.100 [0.00, 0.20] | 0.980 → 0.000 | 0.55 | 0.40 | 0.43 | 0.0005 |"
    )
    assert a == f"| {first} | 7 | cut, 10 prompts | 8 | 2 | 6 | {asked}"
    assert b == f"| {second} | 8 | cut, 10 prompts | 8 | 2 | 4 | {asked}"
    again = results(second, "--out", out)
    assert again.stdout == done.stdout and len(read_jsonl(out)) == 2
    one = results("--out", out, "--asked", first).stdout.splitlines()
    assert one[2:] == [f"| cut | 100 | {asked}"]
    row = read_jsonl(out)[0]
    assert row["curve"]["loss"] == [0.7, 0.6] and row["pairs"] == {"train": 8, "hinted": 8} and row["commit"] == "abc"


def test_a_row_holds_every_choice_and_seeds_of_one_run_are_taken_together(tmp_path):
    """Eight questions, in both orders of which one judge is wrong with one seed in one, with the other in three: of 32 in 8."""
    runs = [make_finished(tmp_path / str(seed) / name, seed, wrong)
            for seed, of in ((7, {"whole": 1, "less": 8}), (8, {"whole": 3, "less": 8})) for name, wrong in of.items()]  # fmt: skip
    out = tmp_path / "runs.jsonl"
    assert not results(*runs, "--out", out).returncode
    first = read_jsonl(out)[0]["choices"]
    assert first["base"] == first["trained"] | {"given": "0" * 8, "swapped": "0" * 8}
    assert first["trained"]["given"] == first["trained"]["swapped"]
    differ = [a != b for a, b in zip(first["trained"]["given"], first["trained"]["better"])]
    assert differ == [True] + [False] * 7
    _, _, base, whole, less = results("--out", out, "--beside", "whole").stdout.splitlines()
    assert base.startswith("| whole, base | –, – | 0.500 [0.50, 0.50] | 0.50, 0.50 | -0.250 [") and "| 1.000 |" in base
    assert whole.startswith("| whole | 8, 8 | 0.750 [") and "|  |  | 1.000 [1.00, 1.00] | 0.000 |" in whole
    assert less.startswith("| less | 8, 8 | 0.000 [0.00, 0.00] | 0.95, 0.95 | -0.750 [")
    assert float(less.split(" | ")[5]) < 0.05
    alone = make_finished(tmp_path / "9" / "less", 9)
    assert_one_line_error(
        results(alone, "--out", out, "--beside", "whole"), "less: expected a run whole of each seed (7, 8, 9), found 2"
    )


def test_the_picture_is_drawn_again_to_the_byte(tmp_path):
    """From the rows that are published, as it stands in docs/."""
    assert not results("--out", RESULTS, "--pictures", tmp_path).returncode
    assert (tmp_path / "real_training.svg").read_bytes() == (ROOT / "docs" / "real_training.svg").read_bytes()


def test_several_rungs_are_a_picture(tmp_path):
    runs = [make_finished(tmp_path / rung, rung=rung) for rung in ("cut", "off_topic")]
    assert not results(*runs, "--out", tmp_path / "x.jsonl", "--pictures", tmp_path).returncode
    drawn = (tmp_path / "real_rungs.svg").read_text()
    assert all(f">{text}</text>" in drawn for text in ("cut", "off_topic", "50.0 %", "95.0 %", "43.0 %"))


def test_what_is_no_finished_run_is_one_line_and_no_row(tmp_path):
    run = make_finished(tmp_path / "cut")
    assert_one_line_error(results("--out", tmp_path / "x", "--asked", "y"), "--asked: expected one of no run, found y")
    manifest.manifest_path(run / "model").unlink()
    assert_one_line_error(results(run, "--out", tmp_path / "x"), "dpo: expected a finished run, found none")
    assert not (tmp_path / "x").exists()


def test_the_page_holds_what_the_rows_say():
    rows, page = read_jsonl(RESULTS), (ROOT / "docs" / "real.md").read_text()
    assert real_results.table(rows) in page
    asked = [real_results.table_of_one(row) for row in rows if row["run"] in ("runs/real", "runs/real-2")]
    assert len(asked) == 2 and all(one in page for one in asked)


@pytest.mark.parametrize("row", read_jsonl(RESULTS), ids=lambda row: row["run"])
def test_every_judge_that_is_shown_writes_verdicts(row):
    """At most one of twenty judgments, written freely, has none."""
    assert row["judges"]["trained"][f"test.jsonl/{row['rung']}"]["unparsed"] <= 0.05
