"""Which kernels run: one choice for the process, as torch.backends' are.

Policy and reference must run the same arithmetic, so the choice is made once, before a model is built, and its
`describe()` is part of the reference's key. Deterministic backward is not: it changes gradients only.
"""

import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch

from conj import InputError

ATTENTION = ("flash_attn", "varlen", "sdpa")
KERNELS = ("triton", "compile", "torch")


@dataclass(kw_only=True)
class Backends:
    attention: str = "sdpa"  # one of ATTENTION
    kernels: str = "torch"  # one of KERNELS
    deterministic: bool = False  # backward of attention


current = Backends()


def select(
    device: torch.device, *, attention: str | None = None, kernels: str | None = None, deterministic: bool = False
) -> Backends:
    """Sets `current`. None takes the fastest that the device and the installed packages allow.

    Raises InputError for a backend that cannot run here: nothing is silently replaced by another."""
    on_gpu = device.type == "cuda"
    if not on_gpu and attention not in (None, "sdpa"):
        raise InputError(f"--attention: expected sdpa on a CPU, found {attention}")
    if not on_gpu and kernels == "triton":
        raise InputError("--kernels: expected torch or compile on a CPU, found triton")
    if attention == "flash_attn" and not find_spec("flash_attn"):
        raise InputError("--attention: flash_attn is not installed; varlen runs flash attention from inside torch")
    default_attention = "sdpa" if not on_gpu else "flash_attn" if find_spec("flash_attn") else "varlen"
    current.attention = attention or default_attention
    current.kernels = kernels or ("triton" if on_gpu else "torch")
    current.deterministic = deterministic
    if on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has given NaN on DPO of Qwen2.5 (trl#7181)
        # Without it deterministic mode refuses cuBLAS; set in either mode, so that the forward is the same in both.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic
    torch.use_deterministic_algorithms(deterministic)  # this is what torch's own varlen attention goes by
    return current


def describe() -> str:
    """The choice as one line, with the versions of the packages behind it, for the reference's key."""
    packages = {"flash_attn": "flash-attn", "triton": "triton"}
    behind = [packages[name] for name in (current.attention, current.kernels) if name in packages]
    return ", ".join([current.attention, current.kernels, *(f"{name} {version(name)}" for name in behind)])
