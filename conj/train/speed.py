"""How fast a step can be, and what it took: bytes between ranks, the device's measured matmul ceiling, time, memory.

What the log of a run and the benchmarks share, so that both count the same; FLOPs are in conj/train/flops.py.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from conj.model.config import ModelConfig, parameter_shapes
from conj.model.decoder import DTYPES


def step_traffic(
    config: ModelConfig, *, num_turns: int, shard_size: int, num_copies: int = 1, dtype: str = "bfloat16",
    reshard_after_forward: bool = True, audit_mode: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes that each rank sends in a step of `num_turns` packs a rank, and receives as many; rings, which send least.

    `gathered`: weights, in `dtype`, within a copy of the model that `shard_size` ranks hold: each block's for its forward
    and, with `reshard_after_forward`, again for its backward; the root's (norm and head) once. `reduced`: gradients, fp32,
    after each pack. `between_copies`: each rank's sums of them, once. In audit mode both are float64, once."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    padded = {name: math.prod((-(-rows // shard_size) * shard_size, *rest))
              for name, (rows, *rest) in parameter_shapes(config).items()}  # fmt: skip
    every, itemsize = sum(padded.values()), 8 if audit_mode else 4
    blocks = every - padded["model.norm.weight"] - padded[head]
    weights = ((1 + reshard_after_forward) * blocks + every - blocks) * DTYPES[dtype].itemsize
    return {
        "gathered": num_turns * weights * (shard_size - 1) // shard_size,
        "reduced": (1 if audit_mode else num_turns) * itemsize * every * (shard_size - 1) // shard_size,
        "between_copies": 2 * itemsize * (every // shard_size) * (num_copies - 1) // num_copies,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_calls(function: Callable, device: str, *, seconds: float, least: int = 5) -> list[float]:
    """Seconds of each call, for about `seconds` altogether, after one call as warm-up."""
    function()
    times = []
    while len(times) < least or sum(times) < seconds:
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def matmul_ceiling(device: str, dtype: str, seconds: float = 2.0, size: int | None = None) -> float:
    """FLOP/s of the best of many square matmuls of random numbers: what any step is measured against."""
    size = size or (8192 if device == "cuda" else 2048)
    generator = torch.Generator(device).manual_seed(0)  # not the process's own
    a, b = (torch.randn(size, size, device=device, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: a @ b, device, seconds=seconds))


def quick_ceiling(device: str, dtype: str) -> float:
    """`matmul_ceiling` in a fraction of a second, for a run that is about to start; leaves no trace in its peak memory."""
    ceiling = matmul_ceiling(device, dtype, seconds=0.1, size=None if device == "cuda" else 1024)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return ceiling


def resident_bytes(field: str) -> int | None:
    """VmRSS, or its peak VmHWM; None where there is none, as in gVisor. Not ru_maxrss: a child starts at its parent's."""
    lines = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) * 1024 if lines else None


def peak_memory_bytes(device: str) -> int | None:
    """Of this process: allocated on the GPU, or resident on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
