"""scripts/ablations.sh: from one run's stages 1 to 3, a run folder an ablation, and one report over all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from conj.data import manifest
from conj.data.files import read_jsonl, write_jsonl
from conj.data.pairs import PairsOptions
from conj.data.preprocess import PreprocessOptions, preprocess
from conj.data.prompts import judgment_text

# Sampling and evaluation need vLLM; here the former's files are written, and the latter notes what it was asked for.
SHIM = """#!/usr/bin/env bash
if [ "$2" = conj.sample.evaluation.evaluate ]; then
    echo "${*:3}" >> "$CALLS"
    for file in base trained; do
        [ -e "$4/judgments_$file.jsonl" ] || echo "{}" > "$4/judgments_$file.jsonl"
        [ -e "$4/judgments_$file.jsonl.manifest.json" ] || echo "{}" > "$4/judgments_$file.jsonl.manifest.json"
    done
else
    exec "$PYTHON" "$@"
fi
"""


def write_judgments(run: Path, name: str, rows: list[dict]) -> None:
    artefact = run / name
    manifest.begin(artefact, inputs=[run / "prompts.jsonl"], options=PairsOptions(run_dir=run))
    write_jsonl(artefact, rows)
    manifest.finish(artefact, num_rows=len(rows), counts={}, seconds=0)


@pytest.fixture
def base_run(tmp_path) -> Path:
    """Stages 1 to 3 of 24 prompts of the demo: of each, 2 right and 2 wrong judgments, and the hinted two."""
    run = tmp_path / "base"
    preprocess(PreprocessOptions(run_dir=run, data=(str(ROOT / "demo" / "train.jsonl"),), limit=24))
    sampled, hinted = [], []
    for prompt in read_jsonl(run / "prompts.jsonl"):
        verdicts = {"hint": prompt["label"], "hint_reversed": 3 - prompt["label"]}
        for i in range(4):
            row = {"id": prompt["id"], "kind": "repeated", "index": i, "verdict": 1 + i % 2}
            sampled.append(row | {"text": judgment_text(f"reason {i}", row["verdict"])})
        for kind, verdict in verdicts.items():
            row = {"id": prompt["id"], "kind": kind, "index": 0, "verdict": verdict}
            hinted.append(row | {"text": judgment_text(kind, verdict)})
    write_judgments(run, "repeated.jsonl", sampled)
    write_judgments(run, "hinted.jsonl", hinted)
    return run


def run_ablations(tmp_path: Path, *arguments) -> subprocess.CompletedProcess:
    shims = tmp_path / "bin"
    shims.mkdir(exist_ok=True)
    (shims / "python").write_text(SHIM)
    (shims / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    line = ["bash", "scripts/ablations.sh", *map(str, arguments)]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env | {"CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_each_ablation_is_a_run_of_its_own_and_all_are_reported_together(base_run, tmp_path):
    """Stages 4 to 6 run with the ablation's options on the base run's files, which stay as they are; again, all is
    complete."""
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in base_run.iterdir()}
    line = ["--run-dir", base_run, "--out", out, "--model", ROOT / "demo" / "base", "--test-data", "x.jsonl", "y.jsonl"]
    line += ["--ablations", "longer", "verdict_only", "hinted_only", "--evaluate", "--limit 3 --num-resamples 50"]
    line += [
        "--reference",
        "--dtype float32",
        "--dpo",
        "--dtype float32 --learning-rate 5e-5",
        "--pairs",
        "--eval-fraction 0",
    ]
    done = run_ablations(tmp_path, *line)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {path: path.read_bytes() for path in base_run.iterdir()} == before

    pairs = {name: read_jsonl(out / name / "pairs.jsonl") for name in ("longer", "verdict_only", "hinted_only")}
    assert len({row["id"] for row in pairs["longer"]}) < len({row["id"] for row in pairs["hinted_only"]}) == 24
    assert {row["pair_type"] for row in pairs["hinted_only"]} == {"hinted"}
    assert all("原因" not in row["chosen"][0]["content"] for row in pairs["verdict_only"])
    for name in pairs:
        assert json.loads(manifest.manifest_path(out / name / "model").read_text("utf-8"))["complete"]

    *each, last = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert len(each) == 3 and all("--data x.jsonl y.jsonl --limit 3" in call for call in each)
    files = " ".join(f"{name}={out}/{name}/judgments_trained.jsonl" for name in pairs)
    assert (
        f"--run-dir {out} " in last
        and f"--judgments base={out}/longer/judgments_base.jsonl {files} --data x.jsonl y.jsonl --limit 3"
        in last + "\n"
    )
    assert run_ablations(tmp_path, *line).stdout.count("already complete") == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablations", "long"], "--ablations: no long; expected some of"),
        (
            ["--out", "o", "--model", "m", "--test-data", "x"],
            "/prompts.jsonl: no such finished file; run stages 1 to 3 first",
        ),
        (["--out", "o", "--model", "m"], "--test-data: expected a benchmark, found none"),
        (["--nope", "1"], "--nope: no such option"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = run_ablations(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
