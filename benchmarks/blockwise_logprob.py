"""The rival of `conj.model.logprob.linear_logprob`: logits made and used up inside one kernel, never written.

Measured against the other design, not part of the package. What it saves is the traffic of the logits, 2V bytes a token
and block; what it costs is a matmul that is Triton's and not cuBLAS's, and two more of them in the backward pass, where
a gradient tile needs the whole row of D twice and its sums, too wide for registers, go through memory in fp32.
Deterministic: each row of every result has one program that adds to it, in one order.

Dimension letters: T tokens, D hidden, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 128, 128, 64  # the tile of logits that a program holds, and how much of D a step takes
GRAD_WEIGHT_ROWS = 64  # fewer there: registers spill at 128
SPLITS = 8  # of the vocabulary: with few rows, one program a row tile would leave most of the device idle
WARPS, STAGES = 8, 3


def _options(hidden: Tensor) -> dict:
    """Tile sizes and precision; fp32, which only checks run, has half the depth so that its stages fit."""
    fp32 = hidden.dtype == torch.float32
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH // 2 if fp32 else DEPTH}
    return sizes | {
        "PRECISION": "ieee" if fp32 else "tf32",
        "num_warps": WARPS,
        "num_stages": STAGES,
        "enable_fp_fusion": True,
    }


@triton.jit
def _logit_tile(
    hidden, weight, row, column, num_rows, num_columns, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[row] @ weight[column].T, (ROWS, COLUMNS) fp32; columns past the vocabulary are -inf."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = (row < num_rows)[:, None] & (depth < SIZE)[None, :]
        right = (column < num_columns)[None, :] & (depth < SIZE)[:, None]
        a = tl.load(hidden + row[:, None] * SIZE + depth[None, :], mask=left, other=0.0)
        b = tl.load(weight + column[None, :] * SIZE + depth[:, None], mask=right, other=0.0)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
    return tl.where((column < num_columns)[None, :], tile, float("-inf"))


@triton.jit
def _blockwise_forward(
    hidden, weight, targets, maxima, sums, target_logits, num_rows, num_columns, columns_per_split,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < num_rows, other=-1)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    target_logit = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns_per_split, COLUMNS):
        column = tl.cast(split * columns_per_split + start, tl.int64) + tl.arange(0, COLUMNS)
        tile = _logit_tile(hidden, weight, row, column, num_rows, num_columns, SIZE, ROWS, COLUMNS, DEPTH, PRECISION)
        new_max = tl.maximum(row_max, tl.max(tile, 1))
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - origin) + tl.sum(tl.exp(tile - origin[:, None]), 1)
        row_max = new_max
        target_logit += tl.sum(tl.where(column[None, :] == target[:, None], tile, 0.0), 1)
    place = split * tl.cast(num_rows, tl.int64) + row
    tl.store(maxima + place, row_max, mask=row < num_rows)
    tl.store(sums + place, row_sum, mask=row < num_rows)
    tl.store(target_logits + place, target_logit, mask=row < num_rows)


def linear_logprob_blockwise_forward(
    hidden: Tensor,  # (T, D) bf16 or fp32, contiguous
    weight: Tensor,  # (V, D) same
    targets: Tensor,  # (T,) int64, each in [0, V)
) -> tuple[Tensor, Tensor]:  # logprobs (T,) fp32 in nats, lse (T,) fp32
    """log softmax(hidden @ weight.T) at each row's target; every split of the vocabulary has a max and a sum of its own."""
    (T, D), V = hidden.shape, len(weight)
    assert hidden.is_contiguous() and weight.is_contiguous() and targets.is_contiguous()
    assert weight.shape == (V, D) and weight.dtype == hidden.dtype and targets.shape == (T,)
    per_split = triton.cdiv(triton.cdiv(V, COLUMNS), SPLITS) * COLUMNS
    maxima, sums, target_logits = (hidden.new_empty((SPLITS, T), dtype=torch.float32) for _ in range(3))
    arguments = (hidden, weight, targets, maxima, sums, target_logits, T, V, per_split)
    _blockwise_forward[(triton.cdiv(T, ROWS), SPLITS)](*arguments, SIZE=D, **_options(hidden))
    row_max = maxima.amax(0)
    log_sum = (sums * (maxima - row_max).exp()).sum(0).log()
    return (target_logits.sum(0) - row_max) - log_sum, row_max + log_sum


@triton.jit
def _grad_tile(
    hidden, weight, targets, lse, upstream, row, column, num_rows, num_columns, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient to a tile of logits, upstream * (onehot - softmax); 0 outside."""
    tile = _logit_tile(hidden, weight, row, column, num_rows, num_columns, SIZE, ROWS, COLUMNS, DEPTH, PRECISION)
    target = tl.load(targets + row, mask=row < num_rows, other=-1)
    row_lse = tl.load(lse + row, mask=row < num_rows, other=0.0)
    scale = tl.load(upstream + row, mask=row < num_rows, other=0.0)
    onehot = (column[None, :] == target[:, None]).to(tl.float32)
    return scale[:, None] * (onehot - tl.exp(tile - row_lse[:, None]))


@triton.jit
def _add_product(
    tile, source, total, taken, given, num_taken, num_given, SIZE: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total[given] += tile @ source[taken], rows of SIZE, a piece of the depth at a time."""
    for start in range(0, SIZE, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        there = (taken < num_taken)[:, None] & (depth < SIZE)[None, :]
        b = tl.load(source + taken[:, None] * SIZE + depth[None, :], mask=there, other=0.0)
        inside = (given < num_given)[:, None] & (depth < SIZE)[None, :]
        place = total + given[:, None] * SIZE + depth[None, :]
        so_far = tl.load(place, mask=inside, other=0.0)
        tl.store(place, tl.dot(tile, b, so_far, input_precision=PRECISION), mask=inside)
    tl.debug_barrier()  # the next tile reads the sums that other threads may have stored


@triton.jit
def _blockwise_grad_hidden(
    hidden, weight, targets, lse, upstream, grad_hidden, num_rows, num_columns, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for start in range(0, num_columns, COLUMNS):
        column = tl.cast(start, tl.int64) + tl.arange(0, COLUMNS)
        tile = _grad_tile(
            hidden, weight, targets, lse, upstream, row, column, num_rows, num_columns, SIZE, ROWS, COLUMNS, DEPTH,
            PRECISION,
        ).to(weight.dtype.element_ty)  # fmt: skip
        _add_product(tile, weight, grad_hidden, column, row, num_columns, num_rows, SIZE, DEPTH, PRECISION)


@triton.jit
def _blockwise_grad_weight(
    hidden, weight, targets, lse, upstream, grad_weight, num_rows, num_columns, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    for start in range(0, num_rows, ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        tile = _grad_tile(
            hidden, weight, targets, lse, upstream, row, column, num_rows, num_columns, SIZE, ROWS, COLUMNS, DEPTH,
            PRECISION,
        ).to(hidden.dtype.element_ty)  # fmt: skip
        _add_product(tl.trans(tile), hidden, grad_weight, row, column, num_rows, num_columns, SIZE, DEPTH, PRECISION)


def linear_logprob_blockwise_backward(
    hidden: Tensor,  # (T, D) bf16 or fp32, contiguous
    weight: Tensor,  # (V, D) same
    targets: Tensor,  # (T,) int64
    lse: Tensor,  # (T,) fp32
    upstream: Tensor,  # (T,) fp32, gradient of each logprob
) -> tuple[Tensor, Tensor]:  # grad_hidden (T, D) fp32, grad_weight (V, D) fp32
    """Gradients of `linear_logprob_blockwise_forward`: each tile of logits is made again, once for each of the two."""
    (T, D), V = hidden.shape, len(weight)
    assert all(x.is_contiguous() for x in (hidden, weight, targets, lse, upstream))
    grad_hidden, grad_weight = (torch.zeros_like(x, dtype=torch.float32) for x in (hidden, weight))
    arguments, options = (hidden, weight, targets, lse, upstream), _options(hidden)
    _blockwise_grad_hidden[(triton.cdiv(T, ROWS),)](*arguments, grad_hidden, T, V, SIZE=D, **options)
    options["ROWS"] = GRAD_WEIGHT_ROWS
    _blockwise_grad_weight[(triton.cdiv(V, COLUMNS),)](*arguments, grad_weight, T, V, SIZE=D, **options)
    return grad_hidden, grad_weight
