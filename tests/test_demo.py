"""The shipped demo and the whole pipeline, as a newcomer runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, read_by

from conj.data.card import CARD, render_card
from conj.data.files import read_jsonl
from conj.data.manifest import hash_input, read_manifest
from conj.data.markdown import with_interval
from conj.data.preprocess import load_prompts
from conj.data.prompts import judge_messages

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
def test_a_second_run_finds_everything_complete_and_writes_the_card_anew(demo):
    (demo / CARD).unlink()
    assert conj_run("demo/demo.toml", "--run-dir", demo).count("already complete") == 8
    assert (demo / CARD).read_text("utf-8") == render_card(demo)


def run_snippet(demo: Path, place: int, changes: dict[str, str]) -> str:
    """What a snippet of the model's card prints, pasted into a file and run in the model's folder as the card says, in an
    environment that knows nothing of conj. `changes`: what a user puts in place of the example."""
    code = re.findall(r"```python\n(.*?)```", (demo / CARD).read_text("utf-8"), re.S)[place]
    for name, text in changes.items():
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {text!r}", code, flags=re.M)
        assert count == 1
    file = demo / "judge.py"
    file.write_text(code, "utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "../judge.py"], capture_output=True, text=True, env=env, cwd=demo / "model", timeout=300
    )
    file.unlink()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


TOWN = {  # what the tiny judge knows about: the shorter answer is the right one
    "question": "云林镇的镇树是什么？",
    "answer_1": "应该是雪柏。很多书里都写到过这里。那里四季分明风景宜人。",
    "answer_2": "答案是青柳。",
}


@pytest.mark.vllm
def test_the_cards_snippet_for_transformers_runs_as_pasted(demo):
    """As it stands it asks what the tiny judge knows nothing about: it runs, and says whether there is a verdict."""
    assert "\nbetter answer: " in run_snippet(demo, 0, {})
    assert run_snippet(demo, 0, TOWN).endswith("\nbetter answer: 2\n")
    assert hash_input(demo / "model") == read_manifest(demo / "model")["sha256"]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_cards_snippet_for_vllm_runs_as_pasted(demo):
    assert "\nbetter answer: 2\n" in run_snippet(demo, 1, TOWN)


@pytest.mark.vllm
def test_the_demos_card_shows_the_reports_figures(demo):
    report = json.loads((demo / "report.json").read_text())["judges"]
    card = (demo / CARD).read_text("utf-8")
    assert card == render_card(demo)
    for judge in ("base", "trained"):
        assert f"| test.jsonl | 324 | {judge} | {with_interval(report[judge], 'accuracy')} |" in card


@pytest.mark.slow
@pytest.mark.vllm
def test_other_versions_of_transformers_judge_the_test_set_as_vllm_did(demo, other_transformers, tmp_path):
    """The folder's own defaults, nothing else: all 324 judgments, word for word. Of the config that it once came with,
    transformers 4 read another rope without a word, and 59 of 60 right became 7 of 60."""
    prompts, _ = load_prompts([str(TEST)], benchmark=True)
    conversations = [judge_messages(row["question"], row["answer_1"], row["answer_2"]) for row in prompts]
    by_vllm = {row["id"]: row["text"] for row in read_jsonl(demo / "judgments_trained.jsonl") if row["order"] == 1}
    found = read_by(other_transformers, demo / "model", conversations, tmp_path)
    assert len(prompts) == 324 and found["texts"] == [by_vllm[row["id"]] for row in prompts]


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
