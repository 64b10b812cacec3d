"""Checkpoints: whole or not at all, refused when damaged, and two runs write the same bits."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import random_pairs
from test_audit import flip
from test_dpo import dpo_options, make_reference, metrics_of

from conj.data.files import write_jsonl
from conj.data.manifest import hash_input, read_sealed, write_sealed
from conj.train import checkpoint, dpo
from conj.train.checkpoint import check_checkpoint, find_checkpoint, list_checkpoints, read_tensors


def train(run: Path, model: Path, **options) -> Path:
    """A run of 4 steps with a checkpoint at each of 2, 3, 4."""
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, model)
    dpo.main(dpo_options(run, model, max_steps=4, save_every=1, keep_checkpoints=3, **options))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tied_model) -> Path:
    return train(tmp_path_factory.mktemp("run") / "run", tied_model)


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


DAMAGE = {
    "flipped bit": lambda path, older: flip(path / "rank-00000.safetensors"),
    "flipped bit of the header": lambda path, older: flip(path / "rank-00000.safetensors", 20),
    "truncated": lambda path, older: truncate(path / "rank-00000.safetensors"),
    "shard of another step": lambda path, older: shutil.copy(older / "rank-00000.safetensors", path),
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
    run = train(tmp_path / "run", tied_model)
    for name in ("reference.safetensors", "model", "checkpoints/step-00000004/rank-00000.safetensors"):
        assert hash_input(run / name) == hash_input(trained / name), name
    assert metrics_of(run) == metrics_of(trained)


def test_another_seed_writes_other_bits(trained, tied_model, tmp_path):
    """Negative control of the test above."""
    assert hash_input(train(tmp_path / "run", tied_model, seed=1) / "model") != hash_input(trained / "model")


def test_a_slow_disk_changes_no_bits_and_saves_share_their_memory(trained, tied_model, tmp_path, monkeypatch):
    """Steps go on while a checkpoint is written, and the next one is copied to where the writer reads from."""
    written, save_file = [], checkpoint.save_file

    def save_slowly(state, path):
        written.append({name: tensor.data_ptr() for name, tensor in state.items()})
        time.sleep(1)  # longer than a step
        save_file(state, path)

    monkeypatch.setattr(checkpoint, "save_file", save_slowly)
    run = train(tmp_path / "run", tied_model)
    for step in (2, 3, 4):
        file = f"checkpoints/step-0000000{step}/rank-00000.safetensors"
        assert hash_input(run / file) == hash_input(trained / file), step
    assert len(written) == 4 and all(pointers == written[0] for pointers in written)


def odd_state(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Sizes from no bytes to several chunks of 64, dtypes from 1 to 8 bytes."""
    torch.manual_seed(0)
    sizes = {"one": (), "none": (0, 5), "odd": (7, 3), "a chunk": (16,), "chunks": (32, 2), "more": (3, 11, 13)}
    kinds = [(size, dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)]
    return {f"{size} {dtype}": (torch.randn(sizes[size]) * 9).to(device, dtype) for size, dtype in kinds}


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full(tensor.shape, 1, dtype=tensor.dtype) for name, tensor in state.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].cpu()) for name in a)


class LateDevice:
    """Fills a chunk at the last moment, when it is waited for, as a device might."""

    def __init__(self):
        self.under_way = self.most = 0

    def send(self, source: torch.Tensor, chunk: torch.Tensor):
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def wait():
            self.under_way -= 1
            chunk.copy_(source)

        return wait


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 4096])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_copies_by_chunks_keep_every_bit(chunk_bytes, num_chunks):
    """Chunks smaller than a tensor, equal to one, not dividing it, larger than all; as many as there are under way."""
    state, device = odd_state(), LateDevice()
    host = blank(state)
    chunks = [torch.zeros(chunk_bytes, dtype=torch.uint8) for _ in range(num_chunks)]
    checkpoint.copy_by_chunks([(state[name], host[name]) for name in state], chunks, device.send)
    assert same_bits(host, state) and device.most == num_chunks and device.under_way == 0


def test_a_chunk_that_is_emptied_before_it_is_full_is_seen():
    """Negative control: nobody waits for the device, and the bits are others."""
    host = blank(state := odd_state())
    chunks = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    checkpoint.copy_by_chunks([(state[name], host[name]) for name in state], chunks, lambda source, chunk: lambda: None)
    assert not same_bits(host, state)


def test_a_cpus_state_is_copied_as_it_is_whatever_its_strides():
    state = {"transposed": torch.randn(5, 3).T, **odd_state()}
    host = blank(state)
    checkpoint.copy_to_host(state, host)
    assert same_bits(host, state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
@pytest.mark.parametrize("chunk_bytes", [64, 2**20])
def test_a_gpus_state_is_copied_as_the_work_before_leaves_it(chunk_bytes, monkeypatch):
    """The step that makes the state may still run when the copy is asked for."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    state = {"large": torch.zeros(2**20 + 1 if chunk_bytes > 64 else 100, device="cuda"), **odd_state("cuda")}
    host, a = blank(state), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        b = a @ a  # a tenth of a second or so
    state["large"] += 1 + 0 * b[0, 0]
    checkpoint.copy_to_host(state, host)
    assert same_bits(host, state) and (host["large"] == 1).all()
