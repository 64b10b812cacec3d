"""Logprobs of selected tokens from hidden states, without the (T, V) logits in memory.

`linear_logprob` walks the vocabulary in blocks of columns, and the tokens in blocks of rows. A block of logits lives
for one matmul, forward and again backward; the forward keeps a running log-sum-exp (Milakov and Gimelshein, arXiv
1805.02867), the backward turns the block into its own gradient. So peak memory is one block beside the gradients of
`hidden` and of the weight, whatever T and V are (and the blocks that a caller with memory to spare has kept). Blocks of
columns come first in the backward: a block of the weight's gradient is then summed in fp32 over all tokens and rounded
once, where walking the tokens first would read and write the whole (V, D) gradient for each block of rows.

The matmuls are the vendor library's; what lies between them is one Triton kernel a block on a GPU (`logprob_kernels.py`), and a
few passes of torch over a block that fits the cache on a CPU. A matmul inside the kernel, which would never write the
block, is the rival design: `benchmarks/blockwise_logprob.py`.

The split of the columns does not depend on T, and rows do not meet: a row's bits do not depend on its neighbours, as far
as the matmuls keep that. On CPUs they were seen to; a GPU's library may choose another kernel for another T.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from conj.model import backends

BLOCK = {"cpu": (1024, 2048), "cuda": (8192, 8192)}  # rows, columns of logits held at a time: 8 MiB, 256 MiB in fp32


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T, D), (V, D), (T,) -> (T,) fp32: log softmax(hidden @ weight.T) at each row's target, all logits at once."""
    return selected_logprob_reference(F.linear(hidden, weight), targets)


def selected_logprob_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """(T, V), (T,) -> (T,) fp32: log softmax(logits) at each row's target."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def linear_logprob(
    hidden: Tensor,  # (T, D) fp32 or bf16
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor,  # (T,) int64, each in [0, V)
    *,
    keep_bytes: int = 0,  # of logits, from forward to backward: blocks that need not be multiplied again
) -> Tensor:  # (T,) fp32, nats
    """log softmax(hidden @ weight.T) at each row's target; differentiable in hidden and weight."""
    return _LinearLogprob.apply(hidden, weight, targets, keep_bytes if torch.is_grad_enabled() else 0)


def selected_logprob(
    logits: Tensor,  # (T, V) fp32 or bf16, its last dimension contiguous
    targets: Tensor,  # (T,) int64, each in [0, V)
) -> Tensor:  # (T,) fp32, nats
    """log softmax(logits) at each row's target, for logits that exist; differentiable, saving no copy of them."""
    return _SelectedLogprob.apply(logits, targets)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, room):
        statistics, ctx.kept = empty_statistics(hidden), {}
        for columns, rows in _blocks(hidden, weight):
            block = _matmul(hidden[rows], weight[columns].T)
            update_statistics(block, targets[rows], columns.start, *(s[rows] for s in statistics))
            if block.nbytes <= room:
                room -= block.nbytes
                ctx.kept[columns.start, rows.start] = block
        logprobs, lse = logprobs_and_lse(*statistics)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return logprobs

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets, lse = ctx.saved_tensors
        upstream = upstream.contiguous()
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if len(hidden) else torch.zeros_like(weight)
        one_block = len(hidden) <= BLOCK[hidden.device.type][0]  # the matmul itself then sums over all tokens
        for columns, rows in _blocks(hidden, weight):
            block = ctx.kept.pop((columns.start, rows.start), None)
            block = _matmul(hidden[rows], weight[columns].T) if block is None else block
            block = grad_of_block(block, targets[rows], columns.start, lse[rows], upstream[rows], weight.dtype)
            _add_matmul(grad_hidden[rows], block, weight[columns])
            if one_block:
                torch.mm(block.T, hidden, out=grad_weight[columns])
                continue
            if rows.start == 0:
                column_sum = torch.zeros_like(weight[columns], dtype=torch.float32)
            _add_matmul(column_sum, block.T, hidden[rows])
            if rows.stop == len(hidden):
                grad_weight[columns] = column_sum
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


class _SelectedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        statistics = empty_statistics(logits)
        update_statistics(logits, targets, 0, *statistics)
        logprobs, lse = logprobs_and_lse(*statistics)
        ctx.save_for_backward(logits, targets, lse)
        return logprobs

    @staticmethod
    def backward(ctx, upstream):
        logits, targets, lse = ctx.saved_tensors
        return grad_of_block(logits, targets, 0, lse, upstream.contiguous(), logits.dtype), None


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """(columns, rows) of each block of logits, columns first."""
    num_rows, num_columns = BLOCK[hidden.device.type]
    for column in range(0, len(weight), num_columns):
        for row in range(0, len(hidden), num_rows):
            yield slice(column, min(column + num_columns, len(weight))), slice(row, min(row + num_rows, len(hidden)))


def empty_statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Running maximum, sum of exp(logit - maximum), and the target's logit of each row, all (T,) fp32."""
    row_max = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
    return row_max, torch.zeros_like(row_max), torch.full_like(row_max, -torch.inf)


def update_statistics(
    block: Tensor,  # (R, C) logits of columns first_column … first_column + C
    targets: Tensor,  # (R,) int64, in the numbers of the whole vocabulary
    first_column: int,
    row_max: Tensor,  # (R,) fp32, and the two below: changed in place
    row_sum: Tensor,
    target_logit: Tensor,
) -> None:
    """Takes a block of columns into the running log-sum-exp, and the target's logit where it lies in the block."""
    if backends.current.kernels == "triton":
        from conj.model.logprob_kernels import logprob_update

        return logprob_update(block, targets, first_column, row_max, row_sum, target_logit)
    block = block.float()
    column = targets - first_column
    inside = (column >= 0) & (column < block.shape[1])
    found = block.gather(1, column.clamp(0, block.shape[1] - 1)[:, None]).squeeze(1)
    target_logit.copy_(torch.where(inside, found, target_logit))
    highest = torch.maximum(row_max, block.amax(1))
    shift = highest.clamp(min=torch.finfo(torch.float32).min)  # a row of -inf alone must not become inf - inf
    row_sum.mul_((row_max - shift).exp_()).add_((block - shift[:, None]).exp_().sum(1))
    row_max.copy_(highest)


def logprobs_and_lse(row_max: Tensor, row_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = row_sum.log()
    # In this order: near p = 1 the target is the maximum, the first difference is exact and nothing cancels.
    return (target_logit - row_max) - log_sum, row_max + log_sum


def grad_of_block(
    block: Tensor,  # (R, C) logits
    targets: Tensor,
    first_column: int,
    lse: Tensor,  # (R,) fp32
    upstream: Tensor,  # (R,) fp32 gradient of each row's logprob
    dtype: torch.dtype,
) -> Tensor:  # (R, C) dtype
    """Gradient of the logits: upstream x (onehot - softmax), the difference taken in fp32 before it is rounded."""
    if backends.current.kernels == "triton":
        from conj.model.logprob_kernels import logprob_grad

        out = torch.empty_like(block, dtype=dtype)
        logprob_grad(block, targets, first_column, lse, upstream, out)
        return out
    grad = (block.float() - lse[:, None]).exp_().neg_()
    column = targets - first_column
    inside = (column >= 0) & (column < block.shape[1])
    grad.scatter_add_(1, column.clamp(0, block.shape[1] - 1)[:, None], inside.float()[:, None])
    return grad.mul_(upstream[:, None]).to(dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on a GPU in fp32 as the tensor cores summed it, which costs bandwidth and saves the logits a rounding."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else torch.mm(a, b)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
