"""Checkpoints without pickle: the ranks of one copy of the model write their rows as safetensors, and a manifest with every
file's sha256 comes last.

A checkpoint is a folder `step-00000120`, written beside its place, synced and renamed: it is there whole or not at
all. A file that the manifest does not name, or whose hash differs, makes it unfit, and the one before it is taken.
Writing happens in a thread: no collective is called there, the ranks meet through their files. torch's distributed
checkpoint is not used: it keeps its metadata in a pickle and loads a flipped bit without a word (seen, torch 2.13).
Tensors are stored as rows of dim 0 with their offset, so any number of ranks, in any number of copies, can read what another
number wrote.
"""

import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from conj import InputError
from conj.data.files import sha256_file, write_atomic
from conj.data.manifest import read_sealed, write_sealed
from conj.model.weights import local_rows, local_tensor
from conj.train.sharding import PeerFailed, World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, beside each parameter's fp32 master weight
MANIFEST = "manifest.json"
CHUNK_BYTES = 128 * 2**20  # of pinned memory; a GPU's state crosses through two of them


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{kind.name: this rank's rows} of master weights and optimizer moments; views, not copies.

    Creates moments that AdamW has not made yet, so that a fresh optimizer can be filled from a checkpoint."""
    state = {}
    for name, parameter in model.named_parameters():
        sharded = isinstance(parameter, DTensor) or not isinstance(model, FSDPModule)
        assert sharded, f"{name} is not sharded: a forward without backward left it gathered"
        moments = optimizer.state[parameter]
        if not moments:
            fused = optimizer.defaults["fused"]  # which counts on the device; the other reads its count each step
            moments["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            moments.update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
        state[f"weight.{name}"] = local_tensor(parameter.detach())
        for kind in MOMENTS:
            state[f"{kind}.{name}"] = local_tensor(moments[kind])
    return state


def copy_to_host(state: dict[str, Tensor], host: dict[str, Tensor]) -> None:
    """Fills the tensors of `host` with those of `state`, contiguous ones of the same names, shapes and dtypes.

    All is there when this returns. A GPU's are taken as its current stream leaves them, through two chunks of pinned
    memory: a copy to any other memory is staged by the driver too, and blocks; here the two halves of it overlap."""
    if not any(tensor.is_cuda for tensor in state.values()):
        for name, tensor in state.items():
            host[name].copy_(tensor)
        return
    chunks = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]  # torch keeps them
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def send(piece: Tensor, chunk: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(stream):
            chunk.copy_(piece, non_blocking=True)
        return stream.record_event().synchronize

    copy_by_chunks([(tensor, host[name]) for name, tensor in state.items()], chunks, send)


def copy_by_chunks(copies: list[tuple[Tensor, Tensor]], chunks: list[Tensor], send: Callable) -> None:
    """Copies each source to its target, both contiguous: while one of `chunks` fills, the one before it is emptied.

    `send(bytes, chunk)` starts to fill a chunk, and returns the function that waits for it."""
    as_bytes = ([t.view(-1).view(torch.uint8).split(len(chunks[0])) for t in pair] for pair in copies)
    filling = deque()

    def empty_oldest() -> None:
        wait, chunk, target = filling.popleft()
        wait()
        target.copy_(chunk)

    for i, (source, target) in enumerate(pieces for pair in as_bytes for pieces in zip(*pair)):
        if len(filling) == len(chunks):
            empty_oldest()
        chunk = chunks[i % len(chunks)][: len(source)]
        filling.append((send(source, chunk), chunk, target))
    while filling:
        empty_oldest()


@dataclass(kw_only=True)
class Saver:
    """Writes checkpoints in a thread of each rank while training goes on, one at a time.

    A step waits only for the copy of the state to host memory: 12 bytes a parameter, over the ranks that hold one copy of
    the model. Those that hold another write nothing and need no such memory. It is kept from the first save on: fresh
    memory would cost a page fault for every 4 KiB, at each."""

    folder: Path
    world: World
    identity: str  # whose checkpoints these are: a hash of inputs and options
    keep: int  # newest checkpoints to keep
    error: Exception | None = None  # of this rank's last write
    _thread: Thread | None = None
    _host: dict[str, Tensor] = field(default_factory=dict)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Starts `folder/step-…` (of steps done), after which all but the `keep` newest are deleted. Collective."""
        self.wait()  # also since the writer reads the host's copy
        beside = self.folder / f"step-{step:08d}.part"
        if self.world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        state = training_state(model, optimizer)
        if not self.world.holds_first_copy:
            return
        if not self._host:
            self._host = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
        copy_to_host(state, self._host)
        offsets = {name: local_rows(p).start for name, p in model.named_parameters()}
        num_updates = int(next(iter(optimizer.state.values()))["step"])  # fewer than steps if one was not finite
        self._thread = Thread(target=self._write, args=(beside, step, num_updates, offsets), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint is there, on every rank. Collective. Raises the OSError of a rank that could not
        write, on that rank, and PeerFailed on the others: none waits for an entry that will not come."""
        is_writing = self._thread.is_alive if self._thread else bool
        while self.world.any(is_writing()) and not self.world.any(self.error is not None):
            time.sleep(0.02)
        self.raise_error()

    def raise_error(self) -> None:
        """Collective: on every rank, if a rank could not write."""
        if self.world.any(self.error is not None):
            raise self.error or PeerFailed("another rank could not write its part of a checkpoint")

    def _write(self, beside: Path, step: int, num_updates: int, offsets: dict) -> None:
        try:
            name = f"rank-{self.world.rank:05d}.safetensors"
            save_file(self._host, beside / name)  # straight to disk: a serialized copy would double the memory
            _sync(beside / name)
            entry = {"name": name, "sha256": sha256_file(beside / name), "first_row": offsets}
            write_atomic(beside / f"{name}.json", json.dumps(entry).encode())
            if self.world.is_main:
                _complete(beside, step, num_updates, self.identity, self.world.shard_size)
                for old in [path for path in list_checkpoints(self.folder) if path.name < beside.name][self.keep :]:
                    shutil.rmtree(old)
        except Exception as e:
            self.error = e


def _complete(beside: Path, step: int, num_updates: int, identity: str, num_ranks: int) -> None:
    """Once every rank's file is there, the manifest, and the folder's own name."""
    paths = [beside / f"rank-{rank:05d}.safetensors.json" for rank in range(num_ranks)]
    while not all(path.exists() for path in paths):
        time.sleep(0.02)
    entries = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    write_sealed(beside / MANIFEST, {"identity": identity, "step": step, "num_updates": num_updates, "files": entries})
    final = beside.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    _sync(final.parent)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Unfinished ones (`.part`) and whatever else lies there do not count."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir())
    return sorted(found, reverse=True)


def find_checkpoint(folder: Path, identity: str) -> Path | None:
    """The newest checkpoint that is whole; says which ones it passes over.

    Raises InputError when it belongs to a run of other inputs or options."""
    for path in list_checkpoints(folder):
        try:
            manifest = check_checkpoint(path)
        except (InputError, OSError) as e:
            print(f"checkpoint passed over: {e}")
            continue
        if manifest["identity"] != identity:
            whose = "a run of other inputs or options"
            raise InputError(f"{path}: belongs to {whose}; delete {folder} or use another --run-dir")
        return path
    return None


def check_checkpoint(path: Path) -> dict:
    """The manifest of a checkpoint folder. Raises InputError unless its files are just those named there, with their hashes."""
    manifest = _read_manifest(path)
    hashes = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    found = {p.name for p in path.iterdir()} - {MANIFEST}
    if found != hashes.keys():
        raise InputError(f"{path}: expected the files {', '.join(sorted(hashes))}, found {', '.join(sorted(found))}")
    for name, sha256 in hashes.items():
        if sha256_file(path / name) != sha256:
            raise InputError(f"{path / name}: sha256 differs from the manifest's")
    return manifest


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fills model and optimizer from a checkpoint that any number of ranks wrote. Returns the number of steps done."""
    manifest = _read_manifest(path)
    state = training_state(model, optimizer)
    with ExitStack() as stack:
        files = _open_files(path, manifest, stack)
        for name, parameter in model.named_parameters():
            for key in (f"{kind}.{name}" for kind in ("weight", *MOMENTS)):
                _copy_rows(state[key], local_rows(parameter), [(first[name], f, key) for first, f in files])
            optimizer.state[parameter]["step"].fill_(manifest["num_updates"])
    return manifest["step"]


def _open_files(path: Path, manifest: dict, stack: ExitStack) -> list[tuple[dict[str, int], safe_open]]:
    """Each rank's first row of every tensor, and its file."""
    return [(e["first_row"], stack.enter_context(safe_open(path / e["name"], "pt"))) for e in manifest["files"]]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(kind.name, whole tensor) of a checked checkpoint, one at a time, put together from all ranks' rows."""
    with ExitStack() as stack:
        files = _open_files(path, _read_manifest(path), stack)
        for key in sorted(files[0][1].keys()):
            name = key.partition(".")[2]
            yield key, torch.cat([f.get_tensor(key) for _, f in sorted(files, key=lambda entry: entry[0][name])])


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
    manifest = read_sealed(path / MANIFEST, {"identity": str, "step": int, "num_updates": int, "files": list})
    for entry in manifest["files"]:
        if not isinstance(entry, dict) or not entry.keys() >= {"name", "sha256", "first_row"}:
            raise InputError(f"{path / MANIFEST}: expected name, sha256 and first_row of each file")
        if not re.fullmatch(r"rank-\d{5}\.safetensors", str(entry["name"])):
            raise InputError(f"{path / MANIFEST}: expected rank-00000.safetensors and on, found {entry['name']!r}")
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
