"""What the benchmarks share: the row that says where a figure was measured, the device's matmul ceiling, timing."""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from conj.train.sharding import COMPUTE_DTYPES

ROOT = Path(__file__).resolve().parent.parent


def where_measured(device: str) -> dict[str, str]:
    """Device, versions and commit, for every row that is written down."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].partition(': ')[2]}, {torch.get_num_threads()} threads" if models else platform.machine()
    try:
        line = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # a lent machine may have no git
        commit = ""
    found = {"device": name, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"commit": commit or "unknown"}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM, its peak, of this process. Not ru_maxrss: a child starts at its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


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


def matmul_ceiling(device: str, dtype: str, seconds: float = 2.0) -> float:
    """FLOP/s of the best of many square matmuls of random numbers: what any step is measured against."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(COMPUTE_DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: a @ b, device, seconds=seconds))
