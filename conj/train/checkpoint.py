"""Checkpoints without pickle: each rank writes its rows as safetensors, and a manifest with every file's sha256 comes last.

A checkpoint is a folder `step-00000120`, written beside its place, synced and renamed: it is there whole or not at
all. Nothing that the manifest does not name is read, and a file whose hash differs is refused. torch's distributed
checkpoint is not used: it keeps its metadata in a pickle and loads a flipped bit without a word (seen, torch 2.13).
Tensors are stored as rows of dim 0 with their offset, so any number of ranks can read what another number wrote.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conj import InputError
from conj.data.files import sha256_file, write_atomic
from conj.model.weights import local_rows, local_tensor
from conj.train.sharding import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, beside each parameter's fp32 master weight
MANIFEST = "manifest.json"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{kind.name: this rank's rows} of master weights and optimizer moments; views, not copies.

    Creates moments that AdamW has not made yet, so that a fresh optimizer can be filled from a checkpoint."""
    state = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded: a forward without backward left it gathered"
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), device=parameter.device)  # where the fused AdamW wants it
            moments.update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
        state[f"weight.{name}"] = local_tensor(parameter.detach())
        for kind in MOMENTS:
            state[f"{kind}.{name}"] = local_tensor(moments[kind])
    return state


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    identity: str,
    keep: int,
) -> None:
    """Writes `folder/step-…`, then deletes older ones but for the `keep` newest. Collective.

    `step` is the number of steps done, `identity` says whose checkpoint this is: a hash of inputs and options."""
    final = folder / f"step-{step:08d}"
    beside = folder / f"{final.name}.part"
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    name = f"rank-{world.rank:05d}.safetensors"
    state = {key: t.cpu().contiguous() for key, t in training_state(model, optimizer).items()}
    save_file(state, beside / name)  # straight to disk: a serialized copy would double the memory
    _sync(beside / name)
    offsets = {p_name: local_rows(p).start for p_name, p in model.named_parameters()}
    entry = {"name": name, "sha256": sha256_file(beside / name), "first_row": offsets}
    entries = [None] * world.size
    dist.all_gather_object(entries, entry)
    if world.is_main:
        num_updates = int(next(iter(optimizer.state.values()))["step"])  # fewer than steps if one was not finite
        manifest = {"identity": identity, "step": step, "num_updates": num_updates, "files": entries}
        write_atomic(beside / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        _sync(folder)
        for old in [path for path in list_checkpoints(folder) if path.name <= final.name][keep:]:
            shutil.rmtree(old)
    dist.barrier()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Unfinished ones (`.part`) and whatever else lies there do not count."""
    return sorted(
        (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir()), reverse=True
    )


def find_checkpoint(folder: Path, identity: str) -> Path | None:
    """The newest checkpoint whose files are all there with their hashes; says which ones it passes over.

    Raises InputError when it belongs to a run of other inputs or options."""
    for path in list_checkpoints(folder):
        try:
            manifest = _read_manifest(path)
            for entry in manifest["files"]:
                if sha256_file(path / entry["name"]) != entry["sha256"]:
                    raise InputError(f"{path / entry['name']}: sha256 differs from the manifest's")
        except (InputError, OSError, KeyError, TypeError) as e:
            print(f"checkpoint passed over: {path}: {e}")
            continue
        if manifest["identity"] != identity:
            raise InputError(
                f"{path}: belongs to a run of other inputs or options; delete {folder} or use another --run"
            )
        return path
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fills model and optimizer from a checkpoint that any number of ranks wrote. Returns the number of steps done."""
    manifest = _read_manifest(path)
    state = training_state(model, optimizer)
    with ExitStack() as stack:
        files = [(e, stack.enter_context(safe_open(path / e["name"], framework="pt"))) for e in manifest["files"]]
        for name, parameter in model.named_parameters():
            rows = local_rows(parameter)
            for kind in ("weight", *MOMENTS):
                _copy_rows(
                    state[f"{kind}.{name}"], rows, [(e["first_row"][name], f, f"{kind}.{name}") for e, f in files]
                )
            optimizer.state[parameter]["step"].fill_(manifest["num_updates"])
    return manifest["step"]


def _copy_rows(target: Tensor, rows: slice, sources: list) -> None:
    """Fills `target`, which holds `rows` of a tensor, from the files' rows of it."""
    filled = 0
    for first_row, file, key in sources:
        view = file.get_slice(key)
        last_row = first_row + view.get_shape()[0]
        start, stop = max(rows.start, first_row), min(rows.stop, last_row)
        if start < stop:
            target[start - rows.start : stop - rows.start].copy_(view[start - first_row : stop - first_row])
            filled += stop - start
    assert filled == rows.stop - rows.start, f"{key}: checkpoint holds {filled} of {rows.stop - rows.start} rows"


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except ValueError as e:
        raise InputError(f"{MANIFEST} cannot be read: {e}") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= {"identity", "step", "num_updates", "files"}:
        raise InputError(f"{MANIFEST}: expected identity, step, num_updates and files")
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
