"""Processes, and a model spread over them: FSDP2 with the same code on one CPU process, one GPU, or many of either."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread

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
from conj.train.fit import Machine

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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
        return Machine(num_ranks=self.size, num_local=num_local, gpu_bytes=size)

    def describe(self) -> dict:
        """What a run's bits depend on beside versions of packages."""
        on_gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        return {"device": device, "ranks": self.size, "threads": torch.get_num_threads()}

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
def distributed(device: str = "auto") -> Iterator[World]:
    """The process group that torchrun describes, or one of this process alone: NCCL on GPUs, gloo on CPUs.

    Raises InputError for a `device` that is not here, or not for as many ranks. A rank whose collective or CUDA fails
    prints one line and ends: the cause where it is its own, else that another rank is gone, which says why itself."""
    on_gpu = backends.choose_device(backends.this_machine(device), device) == "cuda"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        yield _join(on_gpu, rank, size)
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


def _join(on_gpu: bool, rank: int, size: int) -> World:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    torch.cuda.set_device(device) if on_gpu else keep_freed_memory()
    store = dist.HashStore()
    if "RANK" in os.environ:
        # torchrun keeps its store when it restarts workers, and with it the addresses of those that are gone: without a
        # prefix for each attempt, gloo connects to them (seen 3 times in 6, torch 2.13).
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo beside NCCL: with --cpu-offload parameters lie on the host.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30), store=store, rank=rank, world_size=size)
    return World(rank=rank, size=size, device=device)


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
    """A decoder with fp32 master weights (no values yet) spread over all ranks; computes in `dtype`, sums in `reduce_dtype`.

    One rank that holds everything has nothing to gather or to reduce, and FSDP2 would copy each weight twice and each
    gradient three times: there blocks cast their weights themselves and autograd adds the gradients up. With `cpu_offload`
    master weights, gradients and optimizer state stay in the host's memory. Without `reshard_after_forward` what a forward
    gathers stays until the backward: one gather of each block less, for all of its weights in `dtype`."""
    if cpu_offload and world.device.type == "cpu":
        raise InputError("--cpu-offload: expected a GPU, found a CPU")
    with torch.device("meta"):
        model = Decoder(config)
    model.model.dtype = DTYPES[dtype]
    for layer in model.model.layers:
        layer.activation_checkpointing = activation_checkpointing
    if world.size > 1 or cpu_offload or reduce_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=reduce_dtype)
        _fully_shard(
            model, world, mp_policy=policy, offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
            reshard_after_forward=reshard_after_forward,
        )  # fmt: skip
    return model.to_empty(device="cpu" if cpu_offload else world.device)


def _fully_shard(model: Decoder, world: World, *, reshard_after_forward: bool, **settings) -> None:
    settings["mesh"] = init_device_mesh(world.device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, **settings, reshard_after_forward=reshard_after_forward)
    if model.lm_head is not None:  # a group of its own: reduced apart from the head, gradients take half the memory
        fully_shard(model.model.embed_tokens, **settings)
    fully_shard(model, **settings)  # the root's, the head, always stays until its backward, which comes next
    # The loss is already a mean over the step's pairs: ranks add up, they do not average. One rank does not divide
    # anyway, and a factor would cost it a copy of all gradients.
    for module in (m for m in model.modules() if isinstance(m, FSDPModule) and world.size > 1):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reshard(model: Decoder) -> None:
    """After a forward without backward, which leaves the root gathered, and without `reshard_after_forward` all blocks:
    checkpoints need their shards."""
    for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
        module.reshard()
