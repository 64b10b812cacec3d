"""The Triton kernels of a block's memory-bound steps, each beside the function that launches it on plain tensors.

Their references and their autograd are in `ops.py`; the head's kernels are in `logprob_kernels.py`, by the same rules.

Why: torch needs several passes over memory for each of these (cast, square, mean, multiply, ...), keeps what it made in
between, or sums by atomics in an order that changes from run to run. Here each tensor is read and written once, the
arithmetic is fp32 with one rounding at the store, and all sums have a fixed order: the same inputs give the same bits.
A row's result depends on that row alone, not on T and not on its neighbours, which a sequence that scores the same in any pack needs.
Block sizes follow from the sizes by the rules below and nothing is autotuned, since another block is another order of
summation. (The compiler also picks the order by alignment: a view that starts at an odd address may round otherwise
than its aligned copy.)

Refused, by assertion: a last dimension that is not contiguous (strides of rows are honoured), mixed dtypes, shapes that
do not fit. Not checked, since it would wait for the device: targets and row numbers out of range.

Dimension letters: T packed tokens, D hidden, F mlp, N query heads, K key/value heads, H head size, C columns, G gathered
rows. tests/test_kernels.py runs all of this on a CPU, through Triton's interpreter; scripts/kernel_report.py compiles it
for GPUs that need not be there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENT_BLOCK = 1024  # columns of a program where elements do not need each other
ELEMENTS_PER_THREAD = 16  # two 16-byte loads of bf16 in flight for each tensor
NORM_ROWS = 8  # rows whose share of the gradient of a norm's weight one program adds up


def block_size(columns: int, most: int | None = None) -> int:
    """The power of two that holds `columns`, capped at `most`; at least one warp's worth."""
    block = max(triton.next_power_of_2(columns), 32)
    return block if most is None else min(block, most)


def launch_options(elements: int) -> dict:
    """For a program that holds this many elements of each tensor.

    Multiply-adds are fused by request: Triton's default will change (3.10), and with it would the bits of every run."""
    return {"num_warps": min(max(elements // (32 * ELEMENTS_PER_THREAD), 1), 16), "enable_fp_fusion": True}


def check(x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    assert x.shape == shape and x.dtype in dtypes, (tuple(x.shape), x.dtype, shape, dtypes)
    assert x.numel() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1, f"last dimension has stride {x.stride(-1)}"


# RMSNorm of a residual stream


@triton.jit
def _add_rms_norm(
    x, delta, weight, y, residual, inv_rms, x_stride, delta_stride, SIZE: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if delta is not None:
        added = tl.load(delta + row * delta_stride + column, mask=mask, other=0.0)
        # Rounded before the norm reads it: the norm is of the stream as it is stored.
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(residual + row * SIZE + column, value, mask=mask)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + EPS)
    tl.store(inv_rms + row, scale)
    normalised = (exact * scale).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + column, factor * normalised, mask=mask)


def add_rms_norm_forward(
    x: Tensor,  # (T, D) fp32 or bf16
    delta: Tensor | None,  # (T, D) same dtype, or None to norm x as it is
    weight: Tensor,  # (D,) same dtype
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # y (T, D), residual (T, D) (x itself without delta), inv_rms (T,) fp32
    """y = RMSNorm(x + delta), with the rounding of `ops.rms_norm_reference` after an addition in x's dtype.

    Source: Zhang and Sennrich (arXiv 1910.07467), equation 4."""
    T, D = x.shape
    check(x, (T, D), torch.bfloat16, torch.float32)
    check(weight, (D,), x.dtype)
    y = torch.empty((T, D), dtype=x.dtype, device=x.device)
    inv_rms = torch.empty(T, dtype=torch.float32, device=x.device)
    residual, delta_stride = None, 0
    if delta is not None:
        check(delta, (T, D), x.dtype)
        residual, delta_stride = torch.empty_like(y), delta.stride(0)
    block = block_size(D)
    arguments = (x, delta, weight, y, residual, inv_rms, x.stride(0), delta_stride)
    _add_rms_norm[(T,)](*arguments, SIZE=D, EPS=eps, BLOCK=block, **launch_options(block))
    return y, x if residual is None else residual, inv_rms


@triton.jit(do_not_specialize=["num_rows"])  # else each kind of pack length would be compiled, and in mid-training
def _add_rms_norm_grad(
    grad_y, grad_residual, residual, weight, inv_rms, grad_x, partial_sums, grad_y_stride, grad_residual_stride,
    residual_stride, num_rows, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        valid = column < tl.where(row < num_rows, SIZE, 0)
        scale = tl.load(inv_rms + row, mask=row < num_rows, other=0.0)
        stored = tl.load(residual + row * residual_stride + column, mask=valid, other=0.0)
        grad = tl.load(grad_y + row * grad_y_stride + column, mask=valid, other=0.0).to(tl.float32)
        normalised = stored.to(tl.float32) * scale
        grad_weight += grad * normalised.to(stored.dtype).to(tl.float32)  # what the weight multiplied was rounded
        grad *= factor
        # A change of x along itself changes nothing but the scale, which the norm divides out: take that part away.
        grad = scale * (grad - normalised * (tl.sum(grad * normalised, 0) / SIZE))
        if grad_residual is not None:
            passed = tl.load(grad_residual + row * grad_residual_stride + column, mask=valid, other=0.0)
            grad += passed.to(tl.float32)
        tl.store(grad_x + row * SIZE + column, grad, mask=valid)
    tl.store(partial_sums + program * SIZE + column, grad_weight, mask=mask)


def add_rms_norm_backward(
    grad_y: Tensor,  # (T, D) fp32 or bf16
    grad_residual: Tensor | None,  # (T, D) same dtype: what reaches the residual from further on
    residual: Tensor,  # (T, D) same dtype
    weight: Tensor,  # (D,) same dtype
    inv_rms: Tensor,  # (T,) fp32
) -> tuple[Tensor, Tensor]:  # grad_x (T, D), of x and of delta alike; grad_weight (D,) fp32
    """Gradients of `add_rms_norm_forward`; the weight's in two stages, NORM_ROWS rows at a time and then over those."""
    T, D = residual.shape
    check(residual, (T, D), torch.bfloat16, torch.float32)
    check(grad_y, (T, D), residual.dtype)
    check(weight, (D,), residual.dtype)
    check(inv_rms, (T,), torch.float32)
    grad_residual_stride = 0
    if grad_residual is not None:
        check(grad_residual, (T, D), residual.dtype)
        grad_residual_stride = grad_residual.stride(0)
    grad_x = torch.empty((T, D), dtype=residual.dtype, device=residual.device)
    programs, block = triton.cdiv(T, NORM_ROWS), block_size(D)
    partial_sums = torch.empty((programs, D), dtype=torch.float32, device=residual.device)
    arguments = (grad_y, grad_residual, residual, weight, inv_rms, grad_x, partial_sums)
    strides = (grad_y.stride(0), grad_residual_stride, residual.stride(0))
    sizes = {"SIZE": D, "ROWS": NORM_ROWS, "BLOCK": block}
    _add_rms_norm_grad[(programs,)](*arguments, *strides, T, **sizes, **launch_options(block))
    return grad_x, partial_sums.sum(0)


# Rotary position embedding


@triton.jit
def _rope(
    q, k, cos, sin, q_out, k_out, q_stride, k_stride, cos_stride, sin_stride, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, HEADS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # One tile: the query heads, then the key heads. 28 + 4 of Qwen2-7B fill its 32 rows.
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HALF
    is_q = (head < Q_HEADS) & inside
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + K_HEADS) & inside
    q_place = head * (2 * HALF) + column
    k_place = (head - Q_HEADS) * (2 * HALF) + column
    q += row * q_stride
    k += row * k_stride
    # Each place is read from one of the two; the other load is masked and gives the 0 that is added.
    first = tl.load(q + q_place, mask=is_q, other=0.0).to(tl.float32)
    first += tl.load(k + k_place, mask=is_k, other=0.0).to(tl.float32)
    second = tl.load(q + q_place + HALF, mask=is_q, other=0.0).to(tl.float32)
    second += tl.load(k + k_place + HALF, mask=is_k, other=0.0).to(tl.float32)
    cosine = tl.load(cos + row * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * sin_stride + column, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    turned_first, turned_second = first * cosine - second * sine, second * cosine + first * sine
    q_out += row * (Q_HEADS * 2 * HALF)
    k_out += row * (K_HEADS * 2 * HALF)
    tl.store(q_out + q_place, turned_first, mask=is_q)
    tl.store(q_out + q_place + HALF, turned_second, mask=is_q)
    tl.store(k_out + k_place, turned_first, mask=is_k)
    tl.store(k_out + k_place + HALF, turned_second, mask=is_k)


def rope(
    q: Tensor,  # (T, N, H) fp32 or bf16, heads next to each other (strides of rows are free)
    k: Tensor,  # (T, K, H) same
    cos: Tensor,  # (T, H) same dtype, its second half the same as its first
    sin: Tensor,  # (T, H) same
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:  # q (T, N, H), k (T, K, H)
    """Rotates queries and keys by their positions, or back: the rotation's transpose, so its backward pass.

    The coordinates of a rotation are the two halves of H, as in `ops.rope_reference` (arXiv 2104.09864)."""
    T, N, H = q.shape
    K = k.shape[1]
    assert H % 2 == 0, H
    for x, heads in ((q, N), (k, K)):
        check(x, (T, heads, H), torch.bfloat16, torch.float32)
        assert x.stride(1) == H or heads == 1, f"heads have stride {x.stride(1)}, expected {H}"
    for table in (k, cos, sin):
        assert table.dtype == q.dtype, (table.dtype, q.dtype)
    check(cos, (T, H), q.dtype)
    check(sin, (T, H), q.dtype)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    heads_block, block = triton.next_power_of_2(N + K), triton.next_power_of_2(H // 2)
    arguments = (q, k, cos, sin, q_out, k_out, q.stride(0), k.stride(0), cos.stride(0), sin.stride(0))
    sizes = {"Q_HEADS": N, "K_HEADS": K, "HALF": H // 2, "HEADS_BLOCK": heads_block, "BLOCK": block}
    _rope[(T,)](*arguments, INVERSE=inverse, **sizes, **launch_options(2 * heads_block * block))
    return q_out, k_out


# SwiGLU


@triton.jit
def _swiglu(gate, up, out, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, g * tl.sigmoid(g) * u, mask=mask)


def swiglu_forward(
    gate: Tensor,  # (T, F) fp32 or bf16
    up: Tensor,  # (T, F) same dtype
) -> Tensor:  # (T, F)
    """silu(gate) * up. Source: Shazeer (arXiv 2002.05202), equation 6, without its matmuls."""
    T, F = gate.shape
    check(gate, (T, F), torch.bfloat16, torch.float32)
    check(up, (T, F), gate.dtype)
    out = torch.empty((T, F), dtype=gate.dtype, device=gate.device)
    block = block_size(F, ELEMENT_BLOCK)
    grid = (T, triton.cdiv(F, block))
    _swiglu[grid](gate, up, out, gate.stride(0), up.stride(0), F, BLOCK=block, **launch_options(block))
    return out


@triton.jit
def _swiglu_grad(grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    upstream = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + row * columns + column, upstream * u * slope, mask=mask)
    tl.store(grad_up + row * columns + column, upstream * g * sigmoid, mask=mask)


def swiglu_backward(
    grad: Tensor,  # (T, F) fp32 or bf16
    gate: Tensor,  # (T, F) same dtype
    up: Tensor,  # (T, F) same dtype
) -> tuple[Tensor, Tensor]:  # grad_gate (T, F), grad_up (T, F)
    """Gradients of `swiglu_forward`; the sigmoid is computed again rather than kept."""
    T, F = gate.shape
    check(gate, (T, F), torch.bfloat16, torch.float32)
    check(up, (T, F), gate.dtype)
    check(grad, (T, F), gate.dtype)
    grad_gate, grad_up = (torch.empty((T, F), dtype=gate.dtype, device=gate.device) for _ in range(2))
    block = block_size(F, ELEMENT_BLOCK)
    grid = (T, triton.cdiv(F, block))
    arguments = (grad, gate, up, grad_gate, grad_up, grad.stride(0), gate.stride(0), up.stride(0), F)
    _swiglu_grad[grid](*arguments, BLOCK=block, **launch_options(block))
    return grad_gate, grad_up


# Backward of a gather of rows


@triton.jit
def _sum_rows(x, row_starts, rows, out, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(row_starts + row), tl.load(row_starts + row + 1)):
        source = tl.load(rows + i)
        total += tl.load(x + source * stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, total, mask=mask)


def sum_rows(
    x: Tensor,  # (G, C) fp32 or bf16
    row_starts: Tensor,  # (T + 1,) int32 or int64, not falling; the last is len(rows)
    rows: Tensor,  # int64, each in [0, G)
) -> Tensor:  # (T, C)
    """out[t] = the sum of x[rows[i]] over i in [row_starts[t], row_starts[t + 1]), in that order; 0 where there is none.

    With (row_starts, rows) the places of each t in an index, that is the backward pass of source[index] without the
    atomics of torch's: added in fp32 in one order, rounded once."""
    G, C = x.shape
    T = len(row_starts) - 1
    check(x, (G, C), torch.bfloat16, torch.float32)
    check(row_starts, (T + 1,), torch.int32, torch.int64)
    check(rows, (len(rows),), torch.int64)
    out = torch.empty((T, C), dtype=x.dtype, device=x.device)
    block = block_size(C, ELEMENT_BLOCK)
    arguments = (x, row_starts, rows, out, x.stride(0), C)
    _sum_rows[(T, triton.cdiv(C, block))](*arguments, BLOCK=block, **launch_options(block))
    return out
