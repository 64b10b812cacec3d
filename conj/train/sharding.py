"""Processes, and a model spread over them: FSDP2 with the same code on one CPU process, one GPU, or many of either."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from conj import InputError
from conj.data.options import option
from conj.model import backends
from conj.model.qwen2 import Qwen2, read_config
from conj.model.weights import load_weights

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What decides the bits of a forward pass; stored reference and training must have the same."""

    dtype: Literal["bf16", "fp32"] = option("bf16", help="dtype of forward and backward; master weights are fp32")
    attention: Literal[backends.ATTENTION] | None = option(
        None, help="attention kernel; by default flash_attn if installed, else varlen, and on a CPU sdpa"
    )
    kernels: Literal[backends.KERNELS] | None = option(
        None, help="norm, RoPE, SwiGLU and logprob kernels; by default triton, and on a CPU torch, their reference"
    )


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, of a tensor on any device."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def on_main(self, function: Callable[[], object]):
        """What `function` gives on the main rank, on every rank. An InputError there is raised on all of them: none
        waits for a rank that is gone."""
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


@contextmanager
def distributed() -> Iterator[World]:
    """The process group that torchrun describes, or one of this process alone: NCCL on GPUs, gloo on CPUs."""
    use_gpu = torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    store = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # gloo beside NCCL: with --cpu-offload parameters lie on the host.
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=timedelta(minutes=30), **store)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()


def build_sharded_model(
    folder: Path, world: World, dtype: str, *, recompute: bool = False, cpu_offload: bool = False
) -> Qwen2:
    """Qwen2 with fp32 master weights sharded over all ranks, computing in `dtype`, gradients summed in fp32.

    Reference and policy are both built here, so their arithmetic is the same and step 0 is exact. With `cpu_offload`
    master weights, gradients and optimizer state stay in the host's memory."""
    if world.device.type == "cuda" and dtype == "fp32" and backends.current.attention != "sdpa":
        raise InputError(
            "--dtype: expected bf16, found fp32: flash attention takes half precision; --attention sdpa both"
        )
    if cpu_offload and world.device.type == "cpu":
        raise InputError("--cpu-offload: expected a GPU, found a CPU")
    with torch.device("meta"):
        model = Qwen2(read_config(folder))
    mesh = init_device_mesh(world.device.type, (world.size,))
    settings = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES[dtype], reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        layer.recompute = recompute
        fully_shard(layer, **settings)
    if model.lm_head is not None:  # a group of its own: reduced apart from the head, gradients take half the memory
        fully_shard(model.model.embed_tokens, **settings)
    fully_shard(model, **settings)
    # The loss is already a mean over the step's pairs: ranks add up, they do not average. One rank does not divide
    # anyway, and a factor would cost it a copy of all gradients.
    for module in (m for m in model.modules() if isinstance(m, FSDPModule) and world.size > 1):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if cpu_offload else world.device)
    load_weights(model, folder)
    return model
