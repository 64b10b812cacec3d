"""The shipped demo and the whole pipeline, as a newcomer runs them."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, judge_messages, read_by
from make_tiny_judge import make_tokenizer
from tiny_world import NUM_TRAIN_TOWNS, WORLDS, judge_text, make_facts, make_rows, write_rows
from transformers import AutoModelForCausalLM

from conj.data.card import CARD, render_card
from conj.data.files import read_jsonl
from conj.data.identity import not_excluded
from conj.data.judges import judge_prompt, load_judge
from conj.data.manifest import hash_input, read_manifest
from conj.data.markdown import with_interval
from conj.data.preprocess import load_prompts
from conj.data.tokenizer import JudgeTokenizer

TRAIN, TEST = (ROOT / "demo" / f"{name}.jsonl" for name in ("train", "test"))


def conj_run(*arguments: str | Path) -> str:
    line, env = [sys.executable, "-m", "conj", "run", *map(str, arguments)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


FOLDERS = {"zh": ROOT / "demo", "en": ROOT / "demo" / "english"}


@pytest.mark.parametrize("language", WORLDS)
def test_no_question_and_no_town_of_the_test_set_is_in_the_training_set(language):
    """Otherwise the demo could learn the answers by heart instead of what to look at."""
    towns = []
    for name in ("train", "test"):
        questions = [row["prompt"] for row in read_jsonl(FOLDERS[language] / f"{name}.jsonl")]
        towns.append({town for town in WORLDS[language].towns if any(town in question for question in questions)})
    assert len(towns[0]) == 33 and len(towns[1]) == 27 and not towns[0] & towns[1]


@pytest.mark.parametrize("language", WORLDS)
def test_the_script_gives_the_shipped_data_and_vocabulary_again(language, tmp_path):
    """The bases were made of these: a text of a world or a prompt of its judge that changes makes another demo."""
    world, rng = WORLDS[language], random.Random("world 0")
    facts, towns = make_facts(rng, world), rng.sample(world.towns, len(world.towns))
    write_rows(tmp_path / "train.jsonl", make_rows(rng, world, facts, towns[:NUM_TRAIN_TOWNS]))
    write_rows(tmp_path / "test.jsonl", make_rows(rng, world, facts, towns[NUM_TRAIN_TOWNS:]))
    make_tokenizer(world, load_judge(world.judge), tmp_path / "base")
    for name in ("train.jsonl", "test.jsonl", "base/tokenizer.json", "base/tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDERS[language] / name).read_bytes(), name


@pytest.mark.parametrize("language", WORLDS)
def test_what_tells_right_from_wrong_tells_nothing_by_its_length(language):
    """An answer is longer by its filler alone, in characters and in tokens: else the bias could be right."""
    world, tokenizer = WORLDS[language], JudgeTokenizer.load(FOLDERS[language] / "base")
    for texts in (*world.values.values(), world.towns, world.fillers):
        assert len({(len(text), len(tokenizer.encode_text(world.space + text))) for text in texts}) == 1
    names = [value for values in world.values.values() for value in values]
    assert len({len(answer) for answer in world.answers}) == 1 and len(set(names)) == len(names) == 512


def test_a_base_that_thinks_is_taught_texts_whose_answer_is_not_their_draft():
    """What the thinking toy writes is hard to read on purpose: a parser that looks into thoughts reads it wrongly."""
    world, judge, rng = WORLDS["en"], load_judge("english-thinking"), random.Random(0)
    facts = make_facts(rng, world)
    pairs = make_rows(rng, world, facts, world.towns)
    texts = [judge_text(rng, world, judge, True, pair, 1, None) for pair in pairs]
    assert {judge.parse(text).value for text, ends in texts if ends} == {1, 2}
    assert {judge.parse(text).value for text, ends in texts if not ends} == {None}
    by_last = [text.rpartition("</think>")[2] for text, ends in texts if ends]
    assert [judge.parse(text).value for text, ends in texts if ends] == [judge.parse(text).value for text in by_last]
    drafts = [text for text, ends in texts if ends and text.count('"better_answer"') > 1]
    first = re.compile(r'"better_answer": ([12])')
    assert len(drafts) > 50 and all(int(first.search(text)[1]) != judge.parse(text).value for text in drafts)


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
    """Stages 1 to 6 name their inputs: the test set is none of them, but as what stage 1 leaves out, and its questions stand
    in none of their files."""
    questions = {row["prompt"] for row in read_jsonl(TEST)}
    for name in ("prompts.jsonl", "repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "reference.safetensors", "model"):
        inputs = [Path(entry["path"]).name for entry in not_excluded(read_manifest(demo / name)["inputs"])]
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
def test_the_demo_in_english_trains_the_bias_away_by_its_judge_file_alone(tmp_path):
    """Nothing of the Chinese prompt is left in any stage: not in what is asked, written, trained on or shown."""
    run = tmp_path / "run"
    conj_run("demo/english/demo.toml", "--run-dir", run)
    report = json.loads((run / "report.json").read_text())["judges"]
    base, trained = report["base"], report["trained"]
    assert base["n"] == trained["n"] >= 300
    assert base["accuracy"] <= 0.70 and trained["accuracy"] >= 0.95
    assert trained["consistency"] > base["consistency"] + 0.1
    assert trained["unparsed"] <= 0.02 and base["unparsed"] <= 0.02
    for file in ("repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "judgments_trained.jsonl", "model/judge.toml"):
        assert not re.search(r"[\u4e00-\u9fff]", (run / file).read_text("utf-8")), file


# What the thinking toy thinks of when it is given a hint, in its words; sampled warm it also puts a lone word for another.
OF_A_HINT = re.compile("told that answer|hint says|mention the hint")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    """A run of a judge that thinks first, on a base made for it."""
    pytest.importorskip("vllm", reason="sampling needs vLLM; scripts/setup.sh installs it")
    folder = tmp_path_factory.mktemp("thinking")
    maker = [sys.executable, "scripts/make_tiny_judge.py", "--language", "en", "--out", folder]
    maker += ["--thinking", FOLDERS["en"] / "base", "--make-only"]
    subprocess.run(maker, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    conj_run("demo/english/thinking.toml", "--run-dir", folder / "run", "--model", folder / "base")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.vllm
def test_no_hint_is_in_a_chosen_text_of_a_judge_that_thinks(thinking):
    """The base thinks of the hint whenever it is given one, so a thought that got through would be found."""
    base, judge, told = thinking.parent / "base", load_judge("english-thinking"), 0
    tokenizer, model = JudgeTokenizer.load(base), AutoModelForCausalLM.from_pretrained(base)
    for row in list(read_jsonl(thinking / "prompts.jsonl"))[:20]:
        ids = tokenizer.prompt_ids(judge_prompt(judge, row["question"], row["answer_1"], row["answer_2"], row["label"]))
        written = model.generate(torch.tensor([ids]), max_new_tokens=40)[0, len(ids) :].tolist()
        told += bool(OF_A_HINT.search(tokenizer.decode(written)))
    assert told >= 15
    hinted, pairs = (list(read_jsonl(thinking / f"{name}.jsonl")) for name in ("hinted", "pairs"))
    assert sum(row["verdict"] is not None for row in hinted) > 0.8 * len(hinted)
    assert not [row for row in hinted if "<think>" in row["text"] or OF_A_HINT.search(row["text"])]
    assert sum(row["pair_type"] == "hinted" for row in pairs) > 200
    assert not [row["chosen"] for row in pairs if OF_A_HINT.search(row["chosen"][0]["content"])]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_verdict_of_a_judge_that_thinks_is_its_answers(thinking):
    """A draft for the other answer stands in many thoughts, and some thoughts never end: nothing of these is a verdict."""
    rows, first = list(read_jsonl(thinking / "repeated.jsonl")), re.compile(r'"better_answer": ([12])')
    judged, judge = [row for row in rows if row["verdict"] is not None], load_judge("english-thinking")
    assert len(judged) > 0.8 * len(rows)
    assert all(judge.parse(row["text"].rpartition("</think>")[2]).value == row["verdict"] for row in judged)
    drafts = [row for row in judged if int(first.search(row["text"])[1]) != row["verdict"]]
    assert len(drafts) > 0.05 * len(rows)
    unfinished = [row for row in rows if "</think>" not in row["text"]]
    assert sum("better_answer" in row["text"] for row in unfinished) > 10
    assert all(row["verdict"] is None for row in unfinished)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_judge_that_thinks_loses_its_bias_and_thinks_on(thinking):
    report = json.loads((thinking / "report.json").read_text())["judges"]
    base, trained = report["base"], report["trained"]
    assert trained["accuracy"] >= 0.90 and trained["accuracy"] > base["accuracy"] + 0.05
    assert trained["consistency"] > base["consistency"] + 0.1
    assert trained["unparsed"] <= 0.02
    texts = [row["text"] for row in read_jsonl(thinking / "judgments_trained.jsonl")]
    assert sum(text.startswith("<think>") for text in texts) > 0.9 * len(texts)


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
