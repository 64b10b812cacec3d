"""AdamW on fp32 master weights, its learning rate, and the norm of all gradients."""

import math

import torch
from torch import Tensor, nn

from conj.model.weights import local_rows, local_tensor
from conj.train.sharding import World

ROWS_AT_ONCE = 1024  # of a gradient, copied to float64 for the norm of audit mode
NORM_PIECE = 1 << 22  # elements of a gradient, where its norm is taken on a CPU, which copies them to float64


def build_optimizer(model: nn.Module, options) -> torch.optim.AdamW:
    """AdamW on the fp32 master weights: bf16 ones would not move at learning rates near 5e-7."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: one pass over memory, and no temporary copies of all gradients. On a CPU it rounds the last elements of a
    # shard otherwise than the others (seen, torch 2.13): where shards end must not matter in audit mode.
    kind = {"foreach": True} if options.audit_mode else {"fused": True}
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, **kind)


def learning_rate_at(step: int, num_steps: int, options) -> float:
    """Linear warm-up, then half a cosine to zero. `step` counts from 0."""
    num_warmup = math.ceil(options.warmup_ratio * num_steps)
    if step < num_warmup:
        return options.learning_rate * (step + 1) / num_warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


@torch.no_grad()
def gradient_norm(model: nn.Module, world: World, *, audit_mode: bool = False) -> Tensor:
    """() float64, on the ranks' device: the norm of all gradients over all ranks, in one pass over them.

    In audit mode its bits do not depend on who holds which rows: float64 sums of each row, then of all in one order. Of
    several copies the first counts, for all ranks: a norm that differed in a bit would let copies drift apart."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    counts = float(world.holds_first_copy)
    if audit_mode:
        return world.sum(counts * _squares_of_rows(parameters)).sum().sqrt().to(world.device)
    gradients = [local_tensor(p.grad) for p in parameters]
    if gradients[0].device.type == "cpu":
        gradients = [piece for gradient in gradients for piece in gradient.flatten().split(NORM_PIECE)]
    squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    return world.sum(counts * squares.to(world.device)).sqrt()


def _squares_of_rows(parameters: list[nn.Parameter]) -> Tensor:
    """(rows of all parameters,) float64: the sum of squares of each gradient row that this rank holds, 0 for others."""
    device = local_tensor(parameters[0].grad).device
    squares = torch.zeros(sum(len(p) for p in parameters), dtype=torch.float64, device=device)
    first = 0
    for parameter in parameters:
        gradient, start = local_tensor(parameter.grad), first + local_rows(parameter).start
        for rows in gradient.flatten(1).split(ROWS_AT_ONCE) if gradient.ndim > 1 else [gradient[:, None]]:
            # float64 before the square: each square is exact, and few rows are copied at a time.
            squares[start : start + len(rows)] = rows.double().square().sum(dim=1)
            start += len(rows)
        first += len(parameter)
    return squares


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scales all gradients, whose norm is `norm`, so that it is at most `max_norm`. Those that are not finite are left."""
    if math.isfinite(norm) and norm > max_norm:
        gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, max_norm / norm)
