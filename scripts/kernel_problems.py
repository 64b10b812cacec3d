"""The operations that `bench_kernels.py` times, each with its inputs, an fp64 oracle, its peers and its least traffic.

A matmul of linear_logprob is 2 T D V floating-point operations. One forward and two backward is the least; who does not
keep the logits makes them again. Bytes are what any algorithm moves, each tensor once, e an element, forward + backward:

    linear_logprob    (T D + V D) e + 2 (T D + V D) e     add_rms_norm  4 T D e + 4 T D e
    selected_logprob  T V e + 2 T V e                     swiglu        3 T F e + 5 T F e
    gather_rows       (T + G) C e + (T + G) C e           rope          2 T (N + K + 1) H e, twice
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from bench_common import QWEN2, ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from conj.model import logprob, ops
from conj.model.attention import key_rows
from conj.model.config import Rope
from conj.train.batch import to_device

SIZES = QWEN2 | {"tiny": {"D": 64, "F": 160, "N": 4, "K": 2, "H": 16, "V": 5000}}
EPS = 1e-6
PEERS = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}  # module -> distribution
LIGER = ("liger_kernel.ops", "LigerFusedLinearCrossEntropyFunction")
CUT = ("cut_cross_entropy", "linear_cross_entropy")
CHUNKED = hasattr(torch.nn, "LinearCrossEntropyOptions")


@dataclass(frozen=True)
class Candidate:
    name: str
    function: Callable  # of the problem's inputs, in their order
    note: str = ""
    matmuls: tuple[int, int, int] | None = None  # executed in each of MODES
    scalar: bool = False  # gives the sum over tokens, and takes one upstream gradient for all


@dataclass(frozen=True)
class Problem:
    inputs: dict[str, Tensor]  # those that require a gradient get one
    upstream: dict[str, Tensor]  # by output
    oracle: Callable  # plain torch that keeps fp64
    candidates: list[Candidate]
    num_bytes: tuple[int, int]  # least traffic, forward and backward
    matmul_flops: int = 0


@cache
def peer(module: str, name: str) -> tuple[Callable | None, str]:
    """A peer's function, or None and why it is not to be had: not installed, or broken by the versions that are here."""
    try:
        return getattr(import_module(module), name), ""
    except Exception as e:  # other people's imports: whatever they raise, the others run
        return None, f"{module}: {type(e).__name__}: {e}".splitlines()[0]


def skipped(device: str) -> list[str]:
    """Why a peer of linear_logprob is not in the run, one line for each that is not."""
    lines = [] if CHUNKED else [f"linear_cross_entropy is not in torch {torch.__version__}, but from 2.13 on"]
    if device == "cpu":
        return [*lines, f"blockwise, {', '.join(PEERS)} need a GPU"]
    return lines + [why for why in (peer(*LIGER)[1], peer(*CUT)[1]) if why]


def _normal(*shape: int, like: tuple[str, torch.dtype], scale: float = 1.0) -> Tensor:
    device, dtype = like
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()


def _compared(ours: Callable, eager: Callable, device: str, compiled: bool) -> list[Candidate]:
    note = "Triton" if device == "cuda" else "on a CPU plain torch, the reference or near it"
    found = [Candidate("conj", ours, note), Candidate("torch eager", eager)]
    return found + ([Candidate("torch.compile", torch.compile(eager, dynamic=False))] if compiled else [])


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        from benchmarks.blockwise_logprob import linear_logprob_blockwise_forward

        logprobs, lse = linear_logprob_blockwise_forward(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return logprobs

    @staticmethod
    def backward(ctx, upstream):
        from benchmarks.blockwise_logprob import linear_logprob_blockwise_backward

        hidden, weight, *rest = ctx.saved_tensors
        grads = linear_logprob_blockwise_backward(hidden, weight, *rest, upstream.contiguous())
        return grads[0].to(hidden.dtype), grads[1].to(weight.dtype), None


def linear_logprob_candidates(device: str, compiled: bool) -> list[Candidate]:
    """conj, torch, and what is installed; a loss is negated, so that all give logprobs."""
    eager, kept, recomputed = logprob.linear_logprob_reference, (1, 2, 3), (1, 3, 4)
    found = [
        Candidate("conj", logprob.linear_logprob, "logits by blocks, made again in the backward", recomputed),
        Candidate("torch eager", eager, "all logits at once", kept),
    ]
    if compiled:
        found.append(Candidate("torch.compile", torch.compile(eager, dynamic=False), "of torch eager", kept))
    if CHUNKED:

        def chunked(*x):
            return -F.linear_cross_entropy(*x, reduction="none", options=torch.nn.LinearCrossEntropyOptions())

        found.append(Candidate("torch chunked", chunked, "linear_cross_entropy, default options", recomputed))
    if device == "cpu":
        return found
    found.append(Candidate("blockwise", _Blockwise.apply, "logits within the kernel, made again twice", (1, 4, 5)))
    if liger := peer(*LIGER)[0]:

        def reduced(how: str) -> Callable:
            settings = (None, None, -100, 0.0, 0.0, how, None, False, torch.float32)
            return lambda *x: -liger.apply(*x, *settings)[0]

        found.append(Candidate("liger", reduced("none"), "reduction none, sums in fp32", recomputed))
        note = "another function: one upstream for all tokens, gradients made in the forward"
        found.append(Candidate("liger sum", reduced("sum"), note, (1, 0, 3), scalar=True))
    if cut := peer(*CUT)[0]:
        for name, note, options in (
            ("cce", "leaves out small gradients; counted as if it did not", {}),
            ("cce exact", "filter_eps=None", {"filter_eps": None}),
        ):
            found.append(Candidate(name, lambda *x, o=options: -cut(*x, reduction="none", **o), note, recomputed))
    return found


def _lift(V: int) -> float:
    """Added to a target's logit among V of about N(0, 1), makes it likely (p about 0.97), as most are in training."""
    return math.log(V) + 4


def _logprob_oracle(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def linear_logprob(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    D, V, device = size["D"], size["V"], like[0]
    hidden, weight = _normal(T, D, like=like), _normal(V, D, like=like, scale=D**-0.5)
    targets = torch.randint(V, (T,), device=device)
    with torch.no_grad():
        rows = weight[targets[::2]].float()
        hidden[::2] += (_lift(V) * rows / rows.square().sum(1, keepdim=True)).to(hidden.dtype)
    once = (T * D + V * D) * hidden.element_size()
    return Problem(
        {"hidden": hidden, "weight": weight, "targets": targets}, {"logprobs": torch.randn(T, device=device)},
        lambda hidden, weight, targets: _logprob_oracle(F.linear(hidden, weight), targets),
        linear_logprob_candidates(device, compiled), (once, 2 * once), 2 * T * D * V,
    )  # fmt: skip


def selected_logprob(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    V, device = size["V"], like[0]
    logits, targets = _normal(T, V, like=like), torch.randint(V, (T,), device=device)
    with torch.no_grad():
        logits[torch.arange(0, T, 2, device=device), targets[::2]] += _lift(V)
    candidates = _compared(logprob.selected_logprob, logprob.selected_logprob_reference, device, compiled)
    once = T * V * logits.element_size()
    upstream = {"logprobs": torch.randn(T, device=device)}
    return Problem({"logits": logits, "targets": targets}, upstream, _logprob_oracle, candidates, (once, 2 * once))


def add_rms_norm(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    D = size["D"]
    x, delta, weight = _normal(T, D, like=like), _normal(T, D, like=like), _normal(D, like=like)

    def eager(x, delta, weight):
        x = x + delta
        return ops.rms_norm_reference(x, weight, EPS), x

    def oracle(x, delta, weight):
        return F.rms_norm(x + delta, (D,), weight, EPS), x + delta

    candidates = _compared(lambda *x: ops.add_rms_norm(*x, EPS), eager, like[0], compiled)
    upstream = {name: _normal(T, D, like=like).detach() for name in ("norm", "sum")}
    inputs, once = {"x": x, "delta": delta, "weight": weight}, T * D * x.element_size()
    return Problem(inputs, upstream, oracle, candidates, (4 * once, 4 * once))


def rope(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    N, K, H = size["N"], size["K"], size["H"]
    inputs = {"q": _normal(T, N, H, like=like), "k": _normal(T, K, H, like=like)}
    cos, sin = ops.rope_tables(torch.arange(T, device=like[0]), H, Rope(theta=1e6), like[1])

    def eager(q, k, cos, sin):
        return ops.rope_reference(q, cos, sin), ops.rope_reference(k, cos, sin)

    def oracle(q, k, cos, sin):
        turn = torch.complex(cos, sin)[:, None, : H // 2]
        turned = [torch.complex(*x.chunk(2, -1)) * turn for x in (q, k)]
        return tuple(torch.cat([z.real, z.imag], -1) for z in turned)

    upstream = {name: torch.randn_like(x).detach() for name, x in inputs.items()}
    moved = 2 * T * (N + K + 1) * H * cos.element_size()
    candidates = _compared(ops.rope, eager, like[0], compiled)
    return Problem(inputs | {"cos": cos, "sin": sin}, upstream, oracle, candidates, (moved, moved))


def swiglu(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    gate, up, upstream = (_normal(T, size["F"], like=like) for _ in range(3))
    candidates = _compared(ops.swiglu, lambda gate, up: F.silu(gate) * up, like[0], compiled)
    oracle, once = lambda gate, up: gate / (1 + (-gate).exp()) * up, gate.numel() * gate.element_size()
    return Problem({"gate": gate, "up": up}, {"out": upstream.detach()}, oracle, candidates, (3 * once, 5 * once))


def gather_rows(size: dict, T: int, like: tuple, compiled: bool) -> Problem:
    """Keys of prompts that eight judgments share: 384 tokens and 8 x 80 of each 1024."""
    C, group = size["K"] * size["H"], min(T, 1024)
    judgment = group * 5 // 64
    lengths, prefix = [], []
    for _ in range(T // group):
        prefix += [None, *[len(lengths)] * 8]
        lengths += [group - 8 * judgment, *[judgment] * 8]
    index, _ = key_rows(lengths, prefix)
    gather, x = to_device(ops.build_gather(index, T), torch.device(like[0])), _normal(T, C, like=like)
    ours, eager = lambda x, index: ops.gather_rows(x, gather), lambda x, index: F.embedding(index, x)
    candidates, moved = _compared(ours, eager, like[0], compiled), (T + len(index)) * C * x.element_size()
    upstream = {"rows": _normal(len(index), C, like=like).detach()}
    inputs = {"x": x, "index": gather.index}
    return Problem(inputs, upstream, lambda x, index: x[index], candidates, (moved, moved))


OPERATIONS = {f.__name__: f for f in (linear_logprob, selected_logprob, add_rms_norm, rope, swiglu, gather_rows)}
