"""Every architecture as a base, from prompts to the report; and bases that cannot be trained, before anything is spent."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    DECODERS,
    LLAMA3,
    ROOT,
    YARN,
    assert_one_line_error,
    change_config,
    command,
    judge_messages,
    read_by,
    run_script,
    succeeds,
    write_model,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from test_dpo import dpo_options, make_reference

from conj.data.files import read_jsonl
from conj.data.manifest import read_manifest
from conj.data.preprocess import load_prompts
from conj.train import dpo

TOYS = {
    "llama": ("llama", LLAMA3 | {"original_max_position_embeddings": 512}, 1024),
    "qwen3": ("qwen3", None, 1024),
    "mistral": ("mistral", None, 1024),
    "qwen2, yarn": ("qwen2", YARN | {"factor": 2.0, "original_max_position_embeddings": 512}, 1024),
}
SETTINGS = """
dtype = "float32"
device = "cpu"
[preprocess]
data = ["demo/train.jsonl"]
limit = 12
[repeated]
num_samples = 2
max_new_tokens = 24
[hinted]
max_new_tokens = 24
[dpo]
pairs_per_step = 4
max_steps = 2
learning_rate = 1e-3
[evaluate]
data = ["demo/test.jsonl"]
limit = 4
max_new_tokens = 24
"""


@pytest.fixture
def settings(tmp_path) -> Path:
    (tmp_path / "run.toml").write_text(f'run_dir = "{tmp_path / "run"}"\n{SETTINGS}')
    return tmp_path / "run.toml"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("toy", TOYS)
def test_a_base_of_every_architecture_goes_from_prompts_to_the_report(toy, settings, tmp_path):
    """A random one writes noise; its hinted judgments make pairs all the same. Step 0 is exact, and the audit holds."""
    pytest.importorskip("vllm", reason="sampling needs vLLM; scripts/setup.sh installs it")
    architecture, rope, context = TOYS[toy]
    base, run = tmp_path / "base", tmp_path / "run"
    sizes = ("--hidden-size", 128, "--layers", 2, "--vocab-size", 1529, "--max-position-embeddings", context)
    rope = ("--rope", json.dumps(rope)) if rope else ()
    run_script("make_random_model.py", "--tokenizer", ROOT / "demo" / "base", "--out", base, "--architecture", architecture,
               *sizes, *rope)  # fmt: skip
    done = command("conj", "run", settings, "--model", base)
    assert done.returncode == 0, done.stdout + done.stderr
    first = read_jsonl(run / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-7) and first["rewards/margins"] == 0
    assert read_manifest(run / "model")["counts"]["train_pairs"] > 0
    changed = [
        torch.equal(a, b) for a, b in zip(*(load_file(f / "model.safetensors").values() for f in (base, run / "model")))
    ]
    assert not any(changed)
    assert set(json.loads((run / "report.json").read_text())["judges"]) == {"base", "trained"}
    # What vLLM wrote of the trained folder, transformers writes too: one rope, one template, one end.
    prompts, _ = load_prompts([str(ROOT / "demo" / "test.jsonl")], limit=4, benchmark=True)
    conversations = [judge_messages(row["question"], row["answer_1"], row["answer_2"]) for row in prompts]
    by_vllm = {r["id"]: r["text"] for r in read_jsonl(run / "judgments_trained.jsonl") if r["order"] == 1}
    assert [by_vllm[row["id"]] for row in prompts] == read_by(None, run / "model", conversations, tmp_path, 24)["texts"]
    audit = command("conj.train.audit", "--run-dir", run, "--reference", "--replay", "1")
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.parametrize("kind", ["qwen3, yarn", "llama, biases", "mistral"])
def test_step_0_is_exact_and_the_weights_change_in_every_architecture(kind, run_folder, tmp_path):
    """Reference and policy by the same code: every margin of the first step is 0."""
    base = write_model(tmp_path / "base", **DECODERS[kind])
    make_reference(run_folder, base)
    dpo.main(dpo_options(run_folder, base, max_steps=2))
    first, second = read_jsonl(run_folder / "metrics.jsonl")
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert second["rewards/margins"] != 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run_folder / "model"))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


def spoil_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UNUSABLE = {
    "another architecture": (lambda f: change_config(f, model_type="gemma2", architectures=["Gemma2ForCausalLM"]), "model_type"),
    "a window": (lambda f: change_config(f, use_sliding_window=True, sliding_window=64), "use_sliding_window"),
    "quantized": (lambda f: change_config(f, quantization_config={"quant_method": "awq"}), "quantization_config"),
    "two ropes": (lambda f: change_config(f, rope_theta=1e4), "rope_parameters.rope_theta"),
    "NaN": (spoil_weight, "model.layers.1.mlp.up_proj.weight: expected finite weights, found 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_base_that_cannot_be_trained_is_refused_before_anything_is_sampled(name, settings, model_copy, tmp_path):
    """16 of 50 folders were once refused by stage 5, after all sampling was paid."""
    change, message = UNUSABLE[name]
    change(model_copy)
    line = ("run", settings, "--model", model_copy)
    for subcommand in ("check", "run"):
        began = time.monotonic()
        assert_one_line_error(command("conj", subcommand, *line[1:]), str(model_copy), message)
        assert time.monotonic() - began < 20  # 5 s on a machine that has nothing else to do
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--repeated.tensor-parallel-size", 3, "--tensor-parallel-size: expected a divisor of the model's 4 attention heads, found 3"),
        ("--repeated.max-new-tokens", 1024, "--max-new-tokens: expected fewer than the 1024 tokens"),
        ("--max-length", 4096, "--max-length: expected 1 to 1024 (the model's), found 4096"),
        ("--dpo.keep-checkpoints", 10**9, "fewer --dpo.keep-checkpoints take less"),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(option, value, message, settings, tmp_path):
    """Heads against tensor parallelism, lengths, and a disk too small for the checkpoints."""
    line = [settings, "--model", ROOT / "demo" / "base", option, str(value)]
    assert_one_line_error(command("conj", "check", *line), message)
    assert not (tmp_path / "run").exists()


def test_files_that_no_stage_makes_are_missed_before_the_first(settings, tmp_path):
    line = [settings, "--model", ROOT / "demo" / "base", "--stages", "reference", "--stages", "dpo"]
    for subcommand in ("check", "run"):
        done = command("conj", subcommand, *line)
        assert_one_line_error(done, f"{tmp_path}/run/pairs.jsonl: no such file; make it by its stage first")


def test_a_judge_that_brings_its_template_passes_the_check(settings, model_copy, tmp_path):
    """It did with `conj evaluate`, whose models are read with the judge's template."""
    path, judge = model_copy / "tokenizer_config.json", tmp_path / "judge.toml"
    content = json.loads(path.read_text())
    judge.write_text(f'prompt = "con-j"\nparser = "strict"\nchat_template = {json.dumps(content.pop("chat_template"))}')
    path.write_text(json.dumps(content))
    line = [settings, "--stages", "evaluate", "--evaluate.model", model_copy]
    assert_one_line_error(command("conj", "check", *line), "no chat template")
    succeeds("conj", "check", *line, "--evaluate.judge", judge)


def test_a_check_of_what_can_be_run_says_what_the_model_is(settings):
    done = command("conj", "check", settings, "--model", ROOT / "demo" / "base")
    assert done.returncode == 0, done.stderr
    for fact in (
        "qwen2, 4 layers of 128",
        "theta 1e+06",
        "<|im_end|> 1528",
        "nothing that a stage would refuse was found",
    ):
        assert fact in done.stdout


def test_a_reference_of_a_base_with_nan_names_the_weight(model_copy, run_folder):
    """NaN means not computed: it was once computed, stored, refused, and made again in a circle."""
    spoil_weight(model_copy)
    done = command("conj.train.reference", "--run-dir", run_folder, "--model", model_copy, "--dtype", "float32")
    assert_one_line_error(done, "mlp.up_proj.weight: expected finite weights, found 1")
