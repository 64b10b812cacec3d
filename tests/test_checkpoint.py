"""Checkpoints: whole or not at all, refused when damaged, and two runs write the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_pairs
from test_audit import flip
from test_dpo import dpo_options, make_reference, metrics_of

from conj.data.files import write_jsonl
from conj.data.manifest import hash_input, read_sealed, write_sealed
from conj.train import dpo
from conj.train.checkpoint import check_checkpoint, find_checkpoint, list_checkpoints, read_tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tied_model) -> Path:
    """A run of 4 steps with a checkpoint at each of 2, 3, 4."""
    run = tmp_path_factory.mktemp("run") / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, tied_model)
    dpo.main(dpo_options(run, tied_model, max_steps=4, save_every=1, keep_checkpoints=3))
    return run


@pytest.fixture
def checkpoints(trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints"))


def identity_of(checkpoint: Path) -> str:
    return json.loads((checkpoint / "manifest.json").read_text())["identity"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, **changes) -> None:
    """A manifest that somebody changed by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def swap_shards(newest: Path, other: Path) -> None:
    shutil.copy(other / "rank-00000.safetensors", newest / "rank-00000.safetensors")


DAMAGE = {
    "flipped bit": lambda path, older: flip(path / "rank-00000.safetensors"),
    "flipped bit of the header": lambda path, older: flip(path / "rank-00000.safetensors", 20),
    "truncated": lambda path, older: truncate(path / "rank-00000.safetensors"),
    "shard of another step": swap_shards,
    "stray file": lambda path, older: (path / "rank-00001.safetensors").write_bytes(b""),
    "stray pickle": lambda path, older: (path / ".metadata").write_bytes(b"\x80"),
    "missing shard": lambda path, older: (path / "rank-00000.safetensors").unlink(),
    "missing manifest": lambda path, older: (path / "manifest.json").unlink(),
    "flipped bit of the manifest": lambda path, older: flip(path / "manifest.json", 40),
    "truncated manifest": lambda path, older: truncate(path / "manifest.json"),
    "another step in the manifest": lambda path, older: edit(path / "manifest.json", step=7),
    "another identity in the manifest": lambda path, older: edit(path / "manifest.json", identity="0"),
    "a manifest that is no object": lambda path, older: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_last_good_one(damage, checkpoints, capsys):
    newest, second, _ = list_checkpoints(checkpoints)
    identity = identity_of(newest)
    assert find_checkpoint(checkpoints, identity) == newest
    DAMAGE[damage](newest, second)
    assert find_checkpoint(checkpoints, identity) == second
    assert f"checkpoint passed over: {newest}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "rank-00000.safetensors/../x", "model.bin", 3])
def test_a_manifest_cannot_name_files_outside_its_folder(name, checkpoints):
    """Even one that is sealed: whoever writes a checkpoint may be a stranger."""
    newest, second, _ = list_checkpoints(checkpoints)
    manifest = read_sealed(newest / "manifest.json", {})
    manifest["files"][0]["name"] = name
    write_sealed(newest / "manifest.json", manifest)
    assert find_checkpoint(checkpoints, manifest["identity"]) == second


def test_folders_that_are_no_checkpoints_do_not_count(checkpoints):
    newest = list_checkpoints(checkpoints)[0]
    for name in ("step-junk", "step-00000009.part", "other"):
        shutil.copytree(newest, checkpoints / name)
    assert list_checkpoints(checkpoints)[0] == newest
    assert find_checkpoint(checkpoints, identity_of(newest)) == newest


def test_the_newest_are_kept_and_older_ones_deleted(trained):
    assert [path.name[-1] for path in list_checkpoints(trained / "checkpoints")] == ["4", "3", "2"]
    assert not list((trained / "checkpoints").glob("*.part"))


def test_a_checkpoint_holds_every_weight_and_both_moments_whole(trained):
    """Put together from the ranks' rows; what an audit or a converter reads."""
    path = list_checkpoints(trained / "checkpoints")[0]
    tensors = dict(read_tensors(path))
    names = {name.partition(".")[2] for name in tensors}
    assert tensors.keys() == {f"{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names}
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
    assert check_checkpoint(path)["num_updates"] == 4


def test_two_fresh_runs_write_the_same_bits(trained, tied_model, tmp_path):
    """Weights, optimizer state and the metrics log, times aside; bf16 as well as fp32 is the slow variant's."""
    run = tmp_path / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, tied_model)
    dpo.main(dpo_options(run, tied_model, max_steps=4, save_every=1, keep_checkpoints=3))
    for name in ("reference.safetensors", "model", "checkpoints/step-00000004/rank-00000.safetensors"):
        assert hash_input(run / name) == hash_input(trained / name), name
    assert metrics_of(run) == metrics_of(trained)


def test_another_seed_writes_other_bits(trained, tied_model, tmp_path):
    """Negative control of the test above."""
    run = tmp_path / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, tied_model)
    dpo.main(dpo_options(run, tied_model, max_steps=4, seed=1))
    assert hash_input(run / "model") != hash_input(trained / "model")
