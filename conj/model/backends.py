"""Which device and which kernels: one choice for the process, as torch.backends' are.

Policy and reference must run the same arithmetic, so the choice is made once, before a model is built, and its
`describe()` is part of the reference's key. Deterministic backward is not: it changes gradients only. `choose` is the
whole decision, a function of what is asked for and of facts about the machine; tests/test_backends.py holds its table.
"""

import importlib
import itertools
import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from conj import InputError
from conj.data.files import first_line

OLDEST_CARD = (8, 0)  # compute capability from which on flash attention and Triton's kernels run


@dataclass(kw_only=True)
class Backends:
    device: str = "cpu"  # or cuda
    attention: str = "sdpa"  # flash_attn, varlen or sdpa
    kernels: str = "torch"  # triton, compile or torch
    deterministic: bool = False  # backward of attention


current = Backends()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a choice depends on."""

    num_gpus: int = 0  # that this process sees
    capability: tuple[int, int] = (0, 0)  # compute capability of the oldest of them
    num_local_ranks: int = 1  # processes of this run on this machine
    flash_attn: str | None = None  # None: not installed; "": it works; else why its import fails


def this_machine(device: str) -> Machine:
    """Its facts, as far as a choice with this `device` reads them: a run on the CPU asks nothing of CUDA."""
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    return Machine(
        num_gpus=num_gpus, capability=min(map(torch.cuda.get_device_capability, range(num_gpus)), default=(0, 0)),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), flash_attn=_try_flash_attn() if num_gpus else None,
    )  # fmt: skip


def _try_flash_attn() -> str | None:
    """See Machine.flash_attn. A build for another torch or CUDA is found by find_spec, and fails when it is loaded."""
    if not find_spec("flash_attn"):
        return None
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError) as e:
        return first_line(e)
    return ""


def rounds_rows_alike(device: torch.device) -> bool:
    """Whether a row times a matrix has the same bits whatever rows stand beside it, so that a pair's logprobs do not depend on
    its pack. Tried out on a CPU, by a matrix of a tiny model and one of a small one: on an Intel Xeon with AMX the number of rows
    decides in which order products are summed, in bf16 and in fp32, as it does on GPUs; on an AMD EPYC it was never seen to."""
    if device.type != "cpu":
        return False
    draw = torch.Generator().manual_seed(0)
    for dtype, (num_in, num_out), most in itertools.product(
        (torch.float32, torch.bfloat16), ((64, 64), (1536, 576)), (1536, 9000)
    ):
        rows, matrix = (torch.randn(n, num_in, generator=draw).to(dtype) for n in (most, num_out))
        all_rows = F.linear(rows, matrix)
        if not all(torch.equal(F.linear(rows[:n], matrix), all_rows[:n]) for n in (33, 64, 100, 192)):
            return False
    return True


def choose_device(machine: Machine, device: str = "auto") -> str:
    """cpu or cuda. Raises InputError where that is not to be had."""
    if device == "cpu" or (device == "auto" and not machine.num_gpus):
        return "cpu"
    if not machine.num_gpus:
        raise InputError("--device: expected auto or cpu, since no GPU is visible to torch, found cuda")
    if machine.num_local_ranks > machine.num_gpus:
        raise InputError(
            f"--nproc_per_node: expected at most {machine.num_gpus}, a visible GPU for each process, found "
            f"{machine.num_local_ranks}; or --device cpu"
        )
    return "cuda"


def choose(
    machine: Machine, *, device: str = "auto", dtype: str = "bfloat16", attention: str | None = None,
    kernels: str | None = None,
) -> Backends:  # fmt: skip
    """What runs on `machine`. None takes the fastest that device, dtype and installed packages allow.

    Raises InputError for what cannot run there: nothing that was asked for is replaced by another."""
    device = choose_device(machine, device)
    if device == "cpu":
        if attention not in (None, "sdpa"):
            raise InputError(f"--attention: expected sdpa on a CPU, found {attention}")
        if kernels == "triton":
            raise InputError("--kernels: expected torch or compile on a CPU, found triton")
        return Backends(device=device, kernels=kernels or "torch")
    too_old = machine.capability < OLDEST_CARD
    if attention is None:
        attention = "sdpa" if dtype == "float32" else "varlen" if machine.flash_attn is None else "flash_attn"
    kernels = kernels or ("torch" if too_old else "triton")
    if attention != "sdpa" and dtype == "float32":
        raise InputError(
            f"--attention: expected sdpa with --dtype float32, found {attention}: flash attention takes half precision"
        )
    if too_old and (attention != "sdpa" or kernels == "triton"):
        raise InputError(
            f"the GPU has compute capability {'.'.join(map(str, machine.capability))}, too old for {attention} "
            f"attention with {kernels} kernels, which need 8.0; choose --dtype float32 --attention sdpa --kernels torch, or "
            "--device cpu"
        )
    if attention == "flash_attn" and machine.flash_attn != "":
        fault = f"cannot be imported ({machine.flash_attn})" if machine.flash_attn else "is not installed"
        raise InputError(f"--attention: flash_attn {fault}; --attention varlen is flash attention from inside torch")
    return Backends(device=device, attention=attention, kernels=kernels)


def select(
    device: torch.device, *, dtype: str = "bfloat16", attention: str | None = None, kernels: str | None = None,
    deterministic: bool = False,
) -> Backends:  # fmt: skip
    """Sets `current` to what `choose` gives here, and torch's own switches with it. Raises InputError as `choose` does."""
    chosen = choose(this_machine(device.type), device=device.type, dtype=dtype, attention=attention, kernels=kernels)
    vars(current).update(vars(chosen) | {"deterministic": deterministic})
    if current.device == "cuda":
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
