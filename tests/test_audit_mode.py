"""Audit mode: the same bits on 1, 2 and 4 ranks, also where a run changes their number halfway."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, random_pairs, succeeds, write_model
from test_dpo import ARGUMENTS, go_back, make_reference, metrics_of

from conj.data.files import read_jsonl, write_jsonl
from conj.train.checkpoint import list_checkpoints, read_tensors

STEPS = 9  # 3 before each change of ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Rows that no number of ranks divides, and none a multiple of a vector register: where shards end would show."""
    sizes = dict(hidden_size=36, intermediate_size=77, num_attention_heads=3, num_key_value_heads=1, vocab_size=607)
    return write_model(tmp_path_factory.mktemp("base") / "odd", **sizes)


def train(run: Path, base: Path, dtype: str, ranks: int, *more) -> None:
    arguments = [*ARGUMENTS, "--dtype", dtype, "--num-train-epochs", "2", "--max-steps", STEPS, "--save-every", "3"]
    succeeds("conj.train.dpo", *arguments, *more, "--model", base, "--run-dir", run, ranks=ranks)


def state_of(run: Path) -> dict:
    """Master weights and moments of the last checkpoint."""
    return dict(read_tensors(list_checkpoints(run / "checkpoints")[0]))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_ranks_gives_the_same_bits_in_audit_mode(dtype, tmp_path, base):
    """Steps of 6 pairs take several packs each. 2 ranks, then 1, then 4, on one run folder, end as 1 rank does; in bf16,
    where it is the same code, only so."""
    alone = ("2", "4") if dtype == "float32" else ()
    write_jsonl(tmp_path / "1" / "pairs.jsonl", random_pairs(30))
    make_reference(tmp_path / "1", base, dtype=dtype)
    for name in (*alone, "2-1-4"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    for name in ("1", *alone):
        train(tmp_path / name, base, dtype, int(name), "--audit-mode", "--max-tokens-per-pack", "600")
    mixed = tmp_path / "2-1-4"
    for ranks, step in ((2, 3), (1, 6), (4, STEPS)):
        train(mixed, base, dtype, ranks, "--audit-mode", "--max-tokens-per-pack", "600", "--keep-checkpoints", "9")
        if step < STEPS:
            go_back(mixed, step)
    expected, log = state_of(tmp_path / "1"), metrics_of(tmp_path / "1")
    assert max(len(str(row["grad_norm"])) for row in log) > 8  # a real number, to all its digits
    for name in (*alone, "2-1-4"):
        assert equal(state_of(tmp_path / name), expected), name
        assert metrics_of(tmp_path / name) == log, name
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / name, tmp_path / "1")]
        assert weights[0] == weights[1]


def test_without_audit_mode_two_ranks_round_otherwise(tmp_path, base):
    """Negative control: the equality above is not that of a training whose sums round to the same anyway."""
    write_jsonl(tmp_path / "1" / "pairs.jsonl", random_pairs(30))
    make_reference(tmp_path / "1", base)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    for ranks in (1, 2):
        train(tmp_path / str(ranks), base, "float32", ranks, "--max-tokens-per-pack", "600")
    assert not equal(state_of(tmp_path / "1"), state_of(tmp_path / "2"))


@pytest.mark.slow
def test_eight_ranks_train_as_one_with_the_recipes_steps_and_hardly_wait(tmp_path):
    """24 pairs a step on 8 ranks, 3 to 5 pairs a prompt: the same losses, in audit mode the same bits, and the ranks wait for
    the fullest pack in less than 9 % of their time (87 % with a plan for one rank)."""
    model, rows = ROOT / "demo" / "base", random_pairs(400, max_pairs=5)
    count = Counter(row["id"] for row in rows)
    write_jsonl(tmp_path / "1" / "pairs.jsonl", [row for row in rows if count[row["id"]] >= 3])
    make_reference(tmp_path / "1", model)
    recipe = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--learning-rate",
        "1e-4",
        "--pack-multiple",
        "8",
        "--max-steps",
        "4",
    ]
    names = ("1", "8", "1-audit", "8-audit")
    for name in names[1:]:
        shutil.copytree(tmp_path / "1", tmp_path / name)
    for name in names:
        more = ["--audit-mode"] if "audit" in name else []
        line = [*recipe, *more, "--model", model, "--run-dir", tmp_path / name]
        succeeds("conj.train.dpo", *line, ranks=int(name[0]))
    one, eight = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("1", "8"))
    for a, b in zip(one, eight, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
        assert b["order"] == a["order"] and (a["num_ranks"], b["num_ranks"]) == (1, 8)
    assert sum(row["idle_share"] for row in eight) / len(eight) < 0.09
    assert metrics_of(tmp_path / "1-audit") == metrics_of(tmp_path / "8-audit")
    assert equal(state_of(tmp_path / "1-audit"), state_of(tmp_path / "8-audit"))
