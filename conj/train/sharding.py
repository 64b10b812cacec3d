"""Processes, and a model spread over them: FSDP2 with the same code on one CPU process, one GPU, or many of either.

On more nodes than one each holds a copy of the model, sharded over its own ranks (HSDP): weights are gathered inside a node,
and only sums of gradients cross between nodes, once a step. docs/clusters.md counts both.
"""

import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from conj import InputError
from conj.model import backends
from conj.model.config import ModelConfig
from conj.model.decoder import DTYPES, Decoder
from conj.model.folder import read_decoder
from conj.model.weights import load_weights
from conj.train.advice import Machine
from conj.train.options import choose_shard_size

SECONDS_TO_LEAVE = 25  # torchrun kills 30 seconds after it asked to leave


class PeerFailed(Exception):
    """Another rank failed, and says why itself."""


class NotEnoughMemory(RuntimeError):
    """A GPU's memory was not enough; says what was asked for and what would fit."""


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device
    dp_shard_size: int | None = None  # ranks that hold one copy of the model together, in order of rank; all if None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard_size(self) -> int:
        return self.dp_shard_size or self.size

    @property
    def holds_first_copy(self) -> bool:
        """What every copy has, this rank writes down or counts, and those of other copies do not."""
        return self.rank < self.shard_size

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, of a tensor on any device; one on the ranks' own is overwritten."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank. Asked by way of gloo: no wait for a GPU's work."""
        total = torch.tensor(int(flag))
        dist.all_reduce(total)
        return bool(total)

    def machine(self) -> Machine:
        """The ranks, and the memory of this one's GPU, of which kind the others are taken to be."""
        size = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Machine(num_ranks=self.size, num_local=num_local, num_shards=self.shard_size, gpu_bytes=size)

    def describe(self) -> dict:
        """What a run's bits depend on beside versions of packages."""
        on_gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        ranks = {"ranks": self.size, "dp_shard_size": self.shard_size}
        return {"device": device, **ranks, "threads": torch.get_num_threads()}

    def on_main(self, function: Callable[[], object]):
        """What `function` gives on the main rank, on every rank; an InputError there too, so that none waits for it."""
        box = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except InputError as e:
                box[1] = str(e)
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise InputError(box[1])
        return box[0]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed. By itself it gives blocks of 32 MiB and more back at once, and each step has the kernel
    fault its tensors in again, page by page. Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)) if mallopt else ():
        mallopt(name, value)


PEER_IS_GONE = (  # what stands in an error of gloo or NCCL when it is another rank that failed
    "connection closed by", "connection reset by", "broken pipe", "ncclremoteerror", "timed out waiting",
    "collective operation timeout", "communicator was aborted",
)  # fmt: skip
ADVICE = {  # and in one of this rank's own: what helps
    "/dev/shm/nccl": "NCCL needs more shared memory; a container gets it by --shm-size=8g or --ipc=host",
    "duplicate gpu detected": "--nproc_per_node is at most the number of GPUs",
    "driver version is insufficient": "the NVIDIA driver is older than this torch's CUDA: update it or take another torch",
    "no kernel image is available": "this torch is not built for this GPU: take another build, or --device cpu",
    "busy or unavailable": "another process holds the GPU",
    "cuda out of memory": "a smaller --max-tokens-per-pack takes less, and in training --activation-checkpointing",
    "connectfullmesh": "set GLOO_SOCKET_IFNAME to the network interface by which the ranks reach each other",
    "unable to resolve hostname": "set GLOO_SOCKET_IFNAME to a network interface, such as lo",
    "ncclsystemerror": "NCCL_DEBUG=WARN says more; NCCL_SOCKET_IFNAME names the network interface",
    "nccl error": "NCCL_DEBUG=WARN says more",
}


def explain_failure(error: Exception) -> tuple[bool, str] | None:
    """Whether another rank's end is behind an error, and the error in one line, with what helps if that is known; None
    for an error that is neither a collective's nor a known one of CUDA's. Of NCCL's text the first line says where it was
    raised, and the next three what happened."""
    text = " ".join(str(error).partition("Exception raised from")[0].split())  # what follows is a stack of C++
    lower = text.lower().rpartition("original reason for failure was:")[2]
    if isinstance(error, PeerFailed) or any(part in lower for part in PEER_IS_GONE):
        return True, text
    if isinstance(error, NotEnoughMemory):
        return False, text
    if advice := next((advice for part, advice in ADVICE.items() if part in lower), None):
        return False, f"{text}; {advice}"
    return (False, text) if "gloo" in lower or "nccl" in lower else None


@contextmanager
def distributed(device: str = "auto", dp_shard_size: int | None = None) -> Iterator[World]:
    """The process group that torchrun describes, or one of this process alone: NCCL on GPUs, gloo on CPUs.

    `dp_shard_size`: see `DPOOptions`. Raises InputError for a `device` that is not here, or not for as many ranks, and for a
    number of ranks that `dp_shard_size` does not divide. A rank whose collective or CUDA fails
    prints one line and ends: the cause where it is its own, else that another rank is gone, which says why itself."""
    on_gpu = backends.choose_device(backends.this_machine(device), device) == "cuda"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shard_size = choose_shard_size(dp_shard_size, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    try:
        yield _join(on_gpu, rank, size, shard_size)
    except (RuntimeError, PeerFailed) as e:
        if (why := explain_failure(e)) is None:
            raise
        line = f"rank {rank}: {'left, since another rank is gone' if why[0] else 'failed'}: {why[1]}"
        if size == 1:
            raise SystemExit(line) from e
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
        os._exit(1)  # not by way of destroy_process_group, which may wait for the others
    finally:
        # A rank that fails does not wait here for the others.
        if dist.is_initialized() and (size == 1 or sys.exc_info()[0] is None):
            dist.destroy_process_group()


def _join(on_gpu: bool, rank: int, size: int, shard_size: int) -> World:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    torch.cuda.set_device(device) if on_gpu else keep_freed_memory()
    store = dist.HashStore()
    if "RANK" in os.environ:
        # torchrun keeps its store when it restarts workers, and with it the addresses of those that are gone: without a
        # prefix for each start, gloo connects to them (seen 3 times in 6, torch 2.13).
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(agree_on_start(store, rank, size), store)
    # gloo beside NCCL: with --cpu-offload parameters lie on the host.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), store=store, rank=rank, world_size=size)
    return World(rank=rank, size=size, device=device, dp_shard_size=shard_size)


def agree_on_start(store: dist.Store, rank: int, size: int) -> str:
    """A name that all ranks give to this start of theirs, and to no other, in a store that remembers earlier ones.

    torchrun's TORCHELASTIC_RESTART_COUNT is none: each node counts its own failures, and not when it joins those of others.
    Ranks write down who they are; rank 0 proposes all it finds, until each has said that it is meant itself."""
    me = uuid4().hex
    store.set(f"started-{rank}", me)
    while True:
        if rank == 0:
            names = [bytes(name).decode() for name in store.multi_get([f"started-{i}" for i in range(size)])]
            store.set("starts", " ".join(names))
        names = store.get("starts").decode().split()
        start = hashlib.sha256(" ".join(names).encode()).hexdigest()
        if names[rank : rank + 1] == [me]:
            store.set(f"{start}-{rank}", "seen")
            if rank == 0 and store.check([f"{start}-{i}" for i in range(size)]):
                store.set(start, "agreed")
            if store.check([start]):
                return start
        time.sleep(0.02)


@contextmanager
def ending_process() -> Iterator[None]:
    """Ends the process with the block and its exit code; exceptions that nothing caught take their usual way.

    Python's finalization is left out: gloo's threads outlive `destroy_process_group` (caches of DTensor hold the mesh,
    and it the group), and one that gives back a tensor while the interpreter finalizes aborts a rank whose work is done
    (pytorch#190489; seen once with 4 ranks on 2 cores, torch 2.13)."""
    code = 0
    try:
        yield
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def leave_on_sigterm() -> Iterator[Event]:
    """An event that SIGTERM sets, for the next step to see; a process that does not get there in time is ended.

    A rank may be waiting inside a collective for one that is gone, where no Python runs: a thread reads of the signal
    from the pipe that the interpreter's C handler writes to."""
    asked, left = Event(), Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGTERM and not left.wait(SECONDS_TO_LEAVE):
                print(f"left without saving: no step ended in {SECONDS_TO_LEAVE} s", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    handler_before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield asked
    finally:
        left.set()
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGTERM, handler_before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def build_sharded_model(folder: Path, world: World, dtype: str, **settings) -> Decoder:
    """`shard_model` of a model folder, filled with its weights.

    Reference and policy are both built here, so their arithmetic is the same and step 0 is exact."""
    read = read_decoder(folder)
    model = shard_model(read.config, world, dtype, **settings)
    load_weights(model, read.tensors)
    return model


def shard_model(
    config: ModelConfig, world: World, dtype: str, *, activation_checkpointing: str = "none", cpu_offload: bool = False,
    reduce_dtype: torch.dtype = torch.float32, reshard_after_forward: bool = True,
) -> Decoder:  # fmt: skip
    """A decoder with fp32 master weights (no values yet) spread over the ranks; computes in `dtype`, sums in `reduce_dtype`.

    Each `world.shard_size` ranks hold a copy together. A block's weights are given back after its forward and gathered
    again for its backward, unless `reshard_after_forward` is off: then they stand, in `dtype`, until then.

    One rank that holds everything has nothing to gather or to reduce, and FSDP2 would copy each weight twice and each
    gradient three times: there blocks cast their weights themselves and autograd adds the gradients up. With `cpu_offload`
    master weights, gradients and optimizer state stay in the host's memory."""
    if cpu_offload and world.device.type == "cpu":
        raise InputError("--cpu-offload: expected a GPU, found a CPU")
    with torch.device("meta"):
        model = Decoder(config)
    model.model.dtype = DTYPES[dtype]
    for layer in model.model.layers:
        layer.activation_checkpointing = activation_checkpointing
    if world.size > 1 or cpu_offload or reduce_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=reduce_dtype)
        offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        _fully_shard(model, world, reshard_after_forward, mp_policy=policy, offload_policy=offload)
    return model.to_empty(device="cpu" if cpu_offload else world.device)


def _fully_shard(model: Decoder, world: World, reshard_after_forward: bool, **settings) -> None:
    replicas, kind = world.size // world.shard_size, world.device.type
    if replicas > 1:
        names = ("replicate", "shard")
        settings["mesh"] = init_device_mesh(kind, (replicas, world.shard_size), mesh_dim_names=names)
    else:
        settings["mesh"] = init_device_mesh(kind, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **settings)
    if model.lm_head is not None:  # a group of its own: reduced apart from the head, gradients take half the memory
        fully_shard(model.model.embed_tokens, reshard_after_forward=reshard_after_forward, **settings)
    fully_shard(model, **settings)  # its backward comes at once: FSDP2 keeps the root's weights
    # The loss is already a mean over the step's pairs: ranks add up, they do not average. One rank does not divide
    # anyway, and a factor would cost it a copy of all gradients.
    for module in (m for m in model.modules() if isinstance(m, FSDPModule) and world.size > 1):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reduce_at(model: Decoder, is_last: bool, *, once: bool) -> None:
    """Says before the backward of a pack whether it is the step's last, after which gradients have to meet.

    Those of a copy's ranks are summed pack by pack, or with `once` after the last, which keeps them whole until then. Copies
    always add up once a step: that sum crosses between nodes."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
        if once:
            model.set_requires_gradient_sync(is_last)


def reshard(model: Decoder) -> None:
    """After a forward without backward, which leaves the root gathered, and without `reshard_after_forward` all blocks:
    checkpoints need their shards."""
    for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
        module.reshard()
