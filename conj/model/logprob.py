"""Logprobs of selected tokens from hidden states, without the (T, V) logits in memory.

`linear_logprob` walks the tokens in chunks: a chunk's logits live for one matmul, forward and again backward, so peak
memory is chunk x V and the gradient of the head, whatever T is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # logits held at a time; 128 MiB in fp32
MIN_CHUNK = 64


def linear_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T, D), (V, D), (T,) -> (T,) fp32: log softmax(hidden @ weight.T) at each row's target, all logits at once."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def linear_logprob(
    hidden: Tensor,  # (T, D) fp32 or bf16
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor,  # (T,) int64, each in [0, V)
) -> Tensor:  # (T,) fp32, nats
    """log softmax(hidden @ weight.T) at each row's target; differentiable in hidden and weight."""
    return _LinearLogprob.apply(hidden, weight, targets)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)
        logprobs = torch.empty_like(lse)
        for rows in _chunks(hidden, weight):
            logits = F.linear(hidden[rows], weight).float()  # (C, V)
            lse[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, lse)
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            logits = F.linear(hidden[rows], weight).float()
            # d logprob / d logits = onehot - softmax; the difference is taken in fp32, before any rounding to bf16.
            grad_logits = logits.sub_(lse[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(-1, targets[rows, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits = grad_logits.mul_(grad[rows, None]).to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(MIN_CHUNK, CHUNK_ELEMENTS // len(weight))
    return [slice(i, i + size) for i in range(0, len(hidden), size)]
