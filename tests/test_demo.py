"""The shipped demo and the whole pipeline, as a newcomer runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from conj.data.files import read_jsonl
from conj.data.manifest import read_manifest

TRAIN, TEST = (ROOT / "demo" / f"{name}.jsonl" for name in ("train", "test"))


def conj_run(*arguments: str | Path) -> str:
    line, env = [sys.executable, "-m", "conj", "run", *map(str, arguments)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_no_question_and_no_town_of_the_test_set_is_in_the_training_set():
    """Otherwise the demo could learn the answers by heart instead of what to look at."""
    towns = [{row["prompt"][row["prompt"].index("镇") - 2 :][:3] for row in read_jsonl(f)} for f in (TRAIN, TEST)]
    assert len(towns[0]) == 33 and len(towns[1]) == 27 and not towns[0] & towns[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    pytest.importorskip("vllm", reason="sampling needs vLLM; scripts/setup.sh installs it")
    run = tmp_path_factory.mktemp("demo") / "run"
    conj_run("demo/demo.toml", "--run-dir", run)
    return run


@pytest.mark.vllm
def test_the_demo_trains_the_bias_away(demo):
    """The project's promise: from at most .70 to at least .90 on 300 held-out questions, and consistent in both orders."""
    report = json.loads((demo / "report.json").read_text())["judges"]
    base, trained = report["base"], report["trained"]
    assert base["n"] == trained["n"] >= 300
    assert base["accuracy"] <= 0.70 and trained["accuracy"] >= 0.90
    assert trained["consistency"] > base["consistency"] + 0.1
    assert trained["unparsed"] <= 0.02 and base["unparsed"] <= 0.02


@pytest.mark.vllm
def test_no_label_of_the_test_set_reaches_an_earlier_stage(demo):
    """Stages 1 to 6 name their inputs: the test set is none of them, and its questions stand in none of their files."""
    questions = {row["prompt"] for row in read_jsonl(TEST)}
    for name in ("prompts.jsonl", "repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "reference.safetensors", "model"):
        inputs = [Path(entry["path"]).name for entry in read_manifest(demo / name)["inputs"]]
        assert inputs and TEST.name not in inputs
    assert not questions & {row["question"] for row in read_jsonl(demo / "prompts.jsonl")}
    written = (demo / "pairs.jsonl").read_text("utf-8")
    assert not any(question in written for question in questions)


@pytest.mark.vllm
def test_a_second_run_finds_everything_complete(demo):
    assert conj_run("demo/demo.toml", "--run-dir", demo).count("already complete") == 8


@pytest.mark.slow
@pytest.mark.vllm
def test_the_pipeline_completes_on_real_data_with_a_model_that_writes_noise(tmp_path):
    """Real texts, the real tokenizer, nothing parses: every stage still completes and counts what it saw."""
    pytest.importorskip("vllm", reason="sampling needs vLLM; scripts/setup.sh installs it")
    if not (SHARED / "qwen2-tokenizer").exists():
        pytest.skip(f"needs the larger data in {SHARED}")
    base, run = tmp_path / "base", tmp_path / "run"
    maker = [sys.executable, "scripts/make_random_model.py", "--tokenizer", SHARED / "qwen2-tokenizer", "--out", base]
    subprocess.run(maker, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    data = [SHARED / "ultrafeedback" / "train_clean.jsonl", SHARED / "dpo_zh" / "dpo_zh_demo.json"]
    (tmp_path / "run.toml").write_text("[preprocess]\nlimit = 64\n[evaluate]\nlimit = 16\n")
    short = [part for stage in ("repeated", "hinted", "evaluate") for part in (f"--{stage}.max-new-tokens", "24")]
    conj_run(
        tmp_path / "run.toml", "--run-dir", run, "--model", base, "--dtype", "float32", "--preprocess.data", *data,
        "--evaluate.data", ROOT / "tests" / "data" / "llmbar" / "adver_neighbor.json", *short,
    )  # fmt: skip
    assert read_manifest(run / "repeated.jsonl")["counts"]["unparsed"] > 900
    assert json.loads((run / "report.json").read_text())["judges"]["trained"]["unparsed"] == 1.0
