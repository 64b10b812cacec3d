"""Rounding and fault told apart in bf16, on the shipped judge: sound runs hold, a norm that is off by 1 % does not."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, judgment_text
from kill_common import pair_of
from safetensors.torch import load_file, save_file
from test_audit import audited, broken
from test_dpo import dpo_options, make_reference

from conj import InputError
from conj.data.files import read_jsonl, write_jsonl
from conj.data.packs import Group
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.train import dpo
from conj.train.audit import second_opinion
from conj.train.audit.second_opinion import load_transformers, transformers_logps, trend
from conj.train.reference import check_reference, compute_logps
from conj.train.sharding import build_sharded_model, distributed

BASE = ROOT / "demo" / "base"
NORMS = [name for name in load_file(BASE / "model.safetensors") if name.endswith("layernorm.weight")]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


def demo_pairs(seed: int, write=judgment_text, num: int = 70) -> list[dict]:
    """Rows of pairs.jsonl of `num` of the demo's questions; `write(answer, verdict)` gives a judgment."""
    rng = random.Random(seed)
    preferences = rng.sample(list(read_jsonl(ROOT / "demo" / "train.jsonl")), num)
    pairs = [pair_of(row, rng.choice((1, 2)), write) for row in preferences]
    return [{"id": f"{i:04}", **pair, "split": "train"} for i, pair in enumerate(pairs)]


def scaled(name: str, folder: Path, factor: float = 1.01) -> Path:
    """The base with one tensor scaled."""
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bf16_run(folder: Path, seed: int, base: Path = BASE) -> Path:
    write_jsonl(folder / "pairs.jsonl", demo_pairs(seed))
    make_reference(folder, base, dtype="bfloat16")
    dpo.main(dpo_options(folder, base, dtype="bfloat16", learning_rate=5e-5, max_steps=2, pairs_per_step=24))
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_bf16_run_holds_and_a_norm_off_by_a_hundredth_is_named(seed, tmp_path, monkeypatch):
    """A constant in nats a token called sound runs broken; one that did not would find nothing. Either side may be wrong:
    the weights that transformers reads, or those that conj read when it made the stored logprobs and reads now."""
    run = bf16_run(tmp_path / "run", seed)
    holds, checks = audited(run, reference=True)
    assert holds, checks
    norm = NORMS[seed % len(NORMS)]
    wrong = scaled(norm, tmp_path / "wrong")
    read = {BASE: wrong}
    load = lambda f, *a, **k: load_transformers(read.get(f, f), *a, **k)  # noqa: E731
    monkeypatch.setattr(second_opinion, "load_transformers", load)
    _, checks = audited(run, reference=True)
    assert broken(checks) == ["reference by transformers"] and f"along {norm} " in checks[broken(checks)[0]].found
    run, read[wrong] = bf16_run(tmp_path / "other", seed, wrong), BASE
    _, checks = audited(run, reference=True)
    assert "reference by transformers" in broken(checks) and f"along {norm} " in checks[broken(checks)[0]].found


@pytest.mark.parametrize("seed", SEEDS)
def test_logprobs_that_were_stored_by_another_model_are_found_at_step_0(seed, tmp_path):
    """Base, key and manifest are right, the values are those of a norm off by a hundredth: on a CPU, any bit tells."""
    run, other = bf16_run(tmp_path / "run", seed), tmp_path / "other"
    wrong = scaled(NORMS[seed % len(NORMS)], tmp_path / "wrong")
    write_jsonl(other / "pairs.jsonl", demo_pairs(seed))
    make_reference(other, wrong, dtype="bfloat16")
    values = load_file(other / "reference.safetensors")["logps"]
    with distributed("cpu") as world:
        options = dpo_options(run, BASE, dtype="bfloat16")
        dpo.select_arithmetic(options, world.device)
        pairs = dpo.make_plan(options, world).pairs
        model = build_sharded_model(BASE, world, "bfloat16")
        alone = [[Group(prompt=pairs.prompt_of[pair], pairs=[pair])] for pair in range(8)]
        with pytest.raises(InputError, match="expected the logprobs .* that the model gives, found"):
            check_reference(model, pairs, values, alone, world, "bfloat16", exact=True)


def test_errors_without_a_direction_hold_and_a_hidden_shift_is_found():
    """The randomization itself, where the truth is known: noise of any size a token, and the same noise with a thousandth
    of each logprob's derivative by one norm added, which no single token shows."""
    generator, num = torch.Generator().manual_seed(0), 64
    tokenizer = JudgeTokenizer.load(BASE)
    pairs = tokenize_pairs(demo_pairs(0, num=num), tokenizer, 1529)
    ids = [([*pairs.prompts[pairs.prompt_of[p]]], [*judgment]) for p in range(num) for judgment in pairs.judgments[p]]
    prompts = [pairs.prompt_of[p] for p in range(num) for _ in range(2)]
    model = load_transformers(BASE, "bfloat16", precise=True)
    truth = transformers_logps(model, ids, "truth")
    noise = [[torch.randn(len(t), generator=generator) * 0.02 * (1 - t.exp()) for t in truth] for _ in range(2)]
    found, same = ([t + n for t, n in zip(truth, values)] for values in noise)
    _, size, most = trend(model, ids, prompts, found, same, truth)
    assert size <= most < 5
    norm = dict(model.named_parameters())["model.layers.1.post_attention_layernorm.weight"]
    with torch.no_grad():
        norm *= 1.01
        shifted = transformers_logps(model, ids, "shifted")
        norm /= 1.01
    found = [f + s - t for f, s, t in zip(found, shifted, truth)]
    name, size, most = trend(model, ids, prompts, found, same, truth)
    assert size > most and name == "model.layers.1.post_attention_layernorm.weight"


def test_short_judgments_of_other_kernels_are_within_the_bound_and_another_model_is_not():
    """As a GPU's spot check meets them: stored by one implementation in bf16, computed again by another. Of few tokens, a
    constant per token refused them; their errors add as squares."""
    rows = demo_pairs(0, write=lambda answer, verdict: answer[: 3 - verdict], num=40)
    pairs = tokenize_pairs(rows, JudgeTokenizer.load(BASE), 1529)
    alone = [[Group(prompt=pairs.prompt_of[pair], pairs=[pair])] for pair in range(len(pairs))]
    ids = [([*pairs.prompts[pairs.prompt_of[p]]], [*j]) for p in range(len(pairs)) for j in pairs.judgments[p]]
    with distributed("cpu") as world:
        dpo.select_arithmetic(dpo_options(BASE, BASE, dtype="bfloat16"), world.device)
        model = build_sharded_model(BASE, world, "bfloat16")
        found = compute_logps(model, pairs, alone, world)
        lengths = torch.tensor([[len(judgment) for judgment in judged] for judged in pairs.judgments])

        def stored_by(other: torch.nn.Module) -> torch.Tensor:
            return torch.stack([logps.sum() for logps in transformers_logps(other, ids, "stored")]).view(-1, 2)

        for precise in (False, True):
            stored = stored_by(load_transformers(BASE, "bfloat16", precise=precise))
            check_reference(model, pairs, stored, alone, world, "bfloat16", exact=False)
        assert lengths.max() <= 4 and ((found - stored).abs() / lengths).max() > 0.05  # the former constant
        other = load_transformers(BASE, "bfloat16", precise=True)
        other.model.layers[0].input_layernorm.weight *= 1.2
        with pytest.raises(InputError, match="within .* nats, found .* --attention sdpa --kernels torch in both"):
            check_reference(model, pairs, stored_by(other), alone, world, "bfloat16", exact=False)
