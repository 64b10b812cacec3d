"""The head's Triton kernels: the log-sum-exp of a block of logits and its gradient, by the rules of `kernels.py`.

Their reference and their autograd are in `logprob.py`. Not checked, since it would wait for the device: targets out of
range. Dimension letters: R rows and C columns of a block of logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conj.model.kernels import ELEMENT_BLOCK, block_size, check, launch_options

ROW_BLOCK = 4096  # columns that a program holds at a time where it walks along a row


@triton.jit
def _logprob_update(
    logits, targets, row_max, row_sum, target_logit, stride, first_column, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    old_max = tl.load(row_max + row)
    new_max = old_max
    # Each lane keeps a sum of its own, so that a chunk costs one reduction (the max) and not two.
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        last_max = new_max
        new_max = tl.maximum(last_max, tl.max(logit, 0))
        # While all logits were -inf, so is the max, and -inf - -inf would be NaN: count from 0 instead.
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        sums = sums * tl.exp(last_max - origin) + tl.exp(logit - origin)
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    old_sum = tl.load(row_sum + row)
    tl.store(row_max + row, new_max)
    tl.store(row_sum + row, old_sum * tl.exp(old_max - origin) + tl.sum(sums, 0))
    target = tl.load(targets + row) - first_column
    if (target >= 0) & (target < columns):
        tl.store(target_logit + row, tl.load(logits + target).to(tl.float32))


def logprob_update(
    logits: Tensor,  # (R, C) bf16 or fp32: columns [first_column, first_column + C) of the vocabulary
    targets: Tensor,  # (R,) int64, numbered in the whole vocabulary
    first_column: int,
    row_max: Tensor,  # (R,) fp32, updated: the largest logit so far; -inf before the first block
    row_sum: Tensor,  # (R,) fp32, updated: the sum of exp(logit - row_max) so far; 0 before the first block
    target_logit: Tensor,  # (R,) fp32, written where the row's target lies in the block, else left alone
) -> None:
    """Takes one block of columns into each row's running log-sum-exp.

    Afterwards lse = row_max + log(row_sum). Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867)."""
    R, C = logits.shape
    check(logits, (R, C), torch.bfloat16, torch.float32)
    check(targets, (R,), torch.int64)
    for state in (row_max, row_sum, target_logit):
        check(state, (R,), torch.float32)
    block = block_size(C, ROW_BLOCK)
    arguments = (logits, targets, row_max, row_sum, target_logit, logits.stride(0), first_column, C)
    _logprob_update[(R,)](*arguments, BLOCK=block, **launch_options(block))


@triton.jit
def _logprob_grad(logits, targets, lse, upstream, out, stride, out_stride, first_column, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    logit = tl.load(logits + row * stride + column, mask=mask, other=float("-inf")).to(tl.float32)
    probability = tl.exp(logit - tl.load(lse + row))
    onehot = (column == tl.load(targets + row) - first_column).to(tl.float32)
    grad = tl.load(upstream + row) * (onehot - probability)
    tl.store(out + row * out_stride + column, grad, mask=mask)


def logprob_grad(
    logits: Tensor,  # (R, C) bf16 or fp32: columns [first_column, first_column + C) of the vocabulary
    targets: Tensor,  # (R,) int64, numbered in the whole vocabulary
    first_column: int,
    lse: Tensor,  # (R,) fp32, over the whole vocabulary
    upstream: Tensor,  # (R,) fp32, gradient of each row's logprob
    out: Tensor,  # (R, C) bf16 or fp32, written; may be `logits` itself
) -> None:
    """out = upstream * (onehot(target) - softmax): the gradient of log softmax at the target to this block of logits.

    The difference is taken in fp32: for a likely target it cancels, and bf16 would leave little of it. The grid has a
    program for each piece of each row, since no piece needs another and few rows still fill the device."""
    R, C = logits.shape
    check(logits, (R, C), torch.bfloat16, torch.float32)
    check(targets, (R,), torch.int64)
    check(lse, (R,), torch.float32)
    check(upstream, (R,), torch.float32)
    check(out, (R, C), torch.bfloat16, torch.float32)
    block = block_size(C, ELEMENT_BLOCK)
    arguments = (logits, targets, lse, upstream, out, logits.stride(0), out.stride(0), first_column, C)
    _logprob_grad[(R, triton.cdiv(C, block))](*arguments, BLOCK=block, **launch_options(block))
