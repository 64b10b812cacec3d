"""HSDP: copies of the model, each sharded over a node's ranks, train as one shard over all ranks does, and as one rank."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, command, random_pairs, succeeds
from safetensors.torch import load_file
from test_audit_mode import base, equal, state_of  # noqa: F401 (a fixture)
from test_dpo import ARGUMENTS, make_reference, metrics_of

from conj.data.files import write_jsonl
from conj.train.checkpoint import check_checkpoint, list_checkpoints

TRAIN = [*ARGUMENTS, "--max-tokens-per-pack", "600", "--num-train-epochs", "2", "--max-steps", "6", "--save-every", "2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory, base) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("start") / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, base)
    return run


def train(run: Path, base: Path, ranks: int, shard: int, *more) -> None:  # noqa: F811
    arguments = [*TRAIN, *more, "--model", base, "--run-dir", run]
    succeeds("conj.train.dpo", *arguments, "--dp-shard-size", shard, ranks=ranks)


def copies(start: Path, folder: Path, *names: str) -> list[Path]:
    return [shutil.copytree(start, folder / name) for name in names]


@pytest.mark.parametrize(("ranks", "shard"), [(2, 1), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_two_copies_of_two_ranks_give_the_bits_of_one_rank_in_audit_mode_also_killed_and_on_another_mesh(
    ranks, shard, start, base, tmp_path  # noqa: F811
):  # fmt: skip
    """A rank of the second copy is killed (SIGKILL) in a step; the run goes on with a copy on each of two, or one on four."""
    one, run = copies(start, tmp_path, "one", "run")
    train(one, base, 1, 1, "--audit-mode")
    script = [ROOT / "tests" / "faulty_train.py", "kill", "step", "3", run / "struck"]
    options = ["--model", base, "--run-dir", run, "--audit-mode", "--keep-checkpoints", "9", "--dp-shard-size"]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=4", *script]
    done = command(*launch, *TRAIN, *options, 2)
    assert done.returncode != 0 and (run / "struck").exists() and not (run / "model").exists(), done.stderr
    succeeds("conj.train.dpo", *TRAIN, *options, shard, ranks=ranks)
    files = [len(check_checkpoint(path)["files"]) for path in list_checkpoints(run / "checkpoints")]
    assert files == [shard, shard, 2]  # of steps 6, 4 and 2: the ranks of one copy
    assert equal(state_of(run), state_of(one)) and metrics_of(run) == metrics_of(one)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, one)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def alone(start, base, tmp_path_factory) -> Path:  # noqa: F811
    """One rank's run, not in audit mode."""
    (run,) = copies(start, tmp_path_factory.mktemp("alone"), "run")
    train(run, base, 1, 1)
    return run


@pytest.mark.parametrize("shard", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_four_ranks_in_two_copies_or_one_give_the_losses_of_one_rank(shard, start, base, alone, tmp_path):  # noqa: F811
    """Gradients of a step are summed within copies pack by pack, and between them once: steps have several packs."""
    (run,) = copies(start, tmp_path, "run")
    train(run, base, 4, shard)
    expected, found = metrics_of(alone), metrics_of(run)
    for a, b in zip(expected, found, strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), (a["step"], name)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.01  # it does learn
    exported, weights = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert all((exported[name] - weights[name]).abs().max() < 1e-4 for name in weights)


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(start, base, tmp_path):  # noqa: F811
    done = command("conj.train.dpo", *TRAIN, "--model", base, "--run-dir", tmp_path, "--dp-shard-size", 2)
    assert_one_line_error(done, "--dp-shard-size: expected a divisor of 1 ranks, found 2")
