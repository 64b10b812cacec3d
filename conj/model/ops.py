"""The block's memory-bound steps: a reference in plain torch beside a fused Triton kernel, one function each.

The kernels (`kernels.py`) run where `backends.current.kernels` is "triton"; under "torch" the references run (RoPE in fewer
passes), and under "compile" the references again, fused by torch.compile (`decoder.py`). All are deterministic, and no row's
result depends on another row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conj.model import backends
from conj.model.config import Rope
from conj.model.recompute import note, recomputed


def _use_triton() -> bool:
    return backends.current.kernels == "triton"


def _kernels():
    from conj.model import kernels  # here: Triton is not on every machine

    return kernels


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * recomputed(_normalized, x, eps)


def _normalized(x: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (T, D), (D,) -> (T, D)
    """Root mean square norm over the last dimension (arXiv 1910.07467), in fp32 inside."""
    return recomputed(_RMSNorm.apply if _use_triton() else rms_norm_reference, x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its RMS norm: (T, D), (T, D), (D,) -> (norm (T, D), sum (T, D))."""
    if not _use_triton():
        total = x + delta
        return rms_norm(total, weight, eps), total
    norm, total = _AddRMSNorm.apply(x, delta, weight, eps)
    note(norm, _RMSNorm.apply, total, weight, eps)
    return norm, total


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, _, inv_rms = _kernels().add_rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, inv_rms)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, inv_rms = ctx.saved_tensors
        grad_x, grad_weight = _kernels().add_rms_norm_backward(grad.contiguous(), None, x, weight, inv_rms)
        return grad_x, grad_weight.to(weight.dtype), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        y, total, inv_rms = _kernels().add_rms_norm_forward(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, inv_rms)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        total, weight, inv_rms = ctx.saved_tensors
        grads = grad.contiguous(), grad_total.contiguous()
        grad_x, grad_weight = _kernels().add_rms_norm_backward(*grads, total, weight, inv_rms)
        return grad_x, grad_x, grad_weight.to(weight.dtype), None


def rope_frequencies(head_dim: int, rope: Rope, device: torch.device) -> Tensor:  # (H/2,) fp32, radians a token
    """Rotary position embedding (arXiv 2104.09864), stretched to a longer context by YaRN (arXiv 2309.00071, section
    3.2) or as Llama 3.1 does it: low frequencies are divided by the factor, high ones stay, between them is a ramp."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "llama3":
        rotations = rope.original_context / (2 * math.pi / frequencies)  # in the original context
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        bounds = [
            head_dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
            for rotations in (rope.beta_fast, rope.beta_slow)
        ]
        low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), head_dim - 1)
        dimensions = torch.arange(head_dim // 2, device=device).float()
        kept = 1 - (dimensions - low) / (high - low if high != low else 0.001)
    kept = kept.clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


def rope_tables(positions: Tensor, head_dim: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, H), computed in fp32."""
    angles = positions.float()[:, None] * rope_frequencies(head_dim, rope, positions.device)  # (T, H/2)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos.to(dtype), sin.to(dtype)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates (T, N, H) and (T, K, H) by their positions; the halves of H are the two coordinates."""
    if backends.current.kernels == "compile":
        return rope_reference(q, cos, sin), rope_reference(k, cos, sin)
    return _Rope.apply(q, k, cos, sin)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    if _use_triton():
        return _kernels().rope(q.contiguous(), k.contiguous(), cos, sin, inverse=inverse)
    sign, half = (-1 if inverse else 1), cos.shape[-1] // 2
    rotated = [x * cos[:, None] for x in (q, k)]  # three passes over memory, where the reference takes eight
    for x, y in zip((q, k), rotated):
        y[..., :half].addcmul_(x[..., half:], sin[:, None, half:], value=-sign)
        y[..., half:].addcmul_(x[..., :half], sin[:, None, :half], value=sign)
    return tuple(rotated)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rotate(grad_q, grad_k, *ctx.saved_tensors, inverse=True), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # (T, F), (T, F) -> (T, F)
    """silu(gate) * up (arXiv 2002.05202)."""
    return recomputed(_SwiGLU.apply if _use_triton() else swiglu_reference, gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return recomputed(F.silu, gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _kernels().swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, grad):
        return _kernels().swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Rows to take from a (T, …) tensor, and the same read backwards: who took row t."""

    index: Tensor  # (G,) int64, rows of T
    takers: Tensor | None = None  # (G,) int64, numbers of G, those that took row 0 first; Triton only
    starts: Tensor | None = None  # (T + 1,) int64: row t's takers are takers[starts[t]:starts[t + 1]]


def build_gather(index: Tensor, num_rows: int) -> Gather:
    """A gather of `index` from `num_rows` rows, on the CPU as `index` is."""
    if not _use_triton():
        return Gather(index=index)
    starts = F.pad(torch.bincount(index, minlength=num_rows).cumsum(0), (1, 0))
    return Gather(index=index, takers=index.argsort(stable=True), starts=starts)


def gather_rows(x: Tensor, gather: Gather) -> Tensor:  # (T, C) -> (G, C)
    """x[index], whose backward sums a row's gradients in a fixed order, where indexing adds them up by atomics."""
    return _GatherRows.apply(x, gather) if _use_triton() else F.embedding(gather.index, x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gather):
        ctx.gather = gather
        return x.index_select(0, gather.index)

    @staticmethod
    def backward(ctx, grad):
        return _kernels().sum_rows(grad.contiguous(), ctx.gather.starts, ctx.gather.takers), None
