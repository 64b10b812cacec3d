"""What backward can make again for little is not kept for it: kept is how to make it.

Autograd keeps every input of every matmul. Two kinds of them need not stand in memory until the backward: results of
elementwise steps (a norm's output, SwiGLU's product), whose own inputs are kept anyway, and weights cast to the dtype of
computation, whose masters stay where they are. `recomputing()` is entered around a block; inside it, `recomputed(f, …)` gives
f(…) and notes it, and a tensor that autograd keeps and that was noted is replaced by the note (torch's hooks for saved
tensors). Backward calls f again, on the same inputs: the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class _Recipe:
    function: Callable
    inputs: list  # tensors, recipes of tensors, other arguments
    num_kept: int = 0  # times that autograd keeps the result; made once, it stays until as many reads
    made: Tensor | None = None

    def make(self) -> Tensor:
        inputs = [x.make() if isinstance(x, _Recipe) else x for x in self.inputs]
        with torch.no_grad():
            return self.function(*inputs)

    def read(self) -> Tensor:
        made = self.make() if self.made is None else self.made
        self.num_kept -= 1
        self.made = made if self.num_kept > 0 else None
        return made


_noted: dict[int, tuple[Tensor, _Recipe]] | None = None  # by storage; holding the tensor keeps its address its own
_activations = False


@contextmanager
def recomputing(*, activations: bool) -> Iterator[None]:
    """Around a block's forward: casts of weights are made again in backward, and with `activations` what
    `recomputed` makes too. Blocks do not nest."""
    global _noted, _activations

    def keep(tensor: Tensor):
        _, recipe = _noted.get(_address(tensor), (None, None))
        if recipe is None:
            return tensor.detach()  # itself would be a cycle that only a backward breaks: an output keeps its graph
        recipe.num_kept += 1
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()

    def read(kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].read().as_strided(*kept[1:])

    _noted, _activations = {}, activations
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, read):
            yield
    finally:
        _noted, _activations = None, False


def recomputed(function: Callable, *inputs) -> Tensor:
    """function(*inputs): one tensor, of inputs that are kept or recomputed themselves."""
    result = function(*inputs)
    note(result, function, *inputs)
    return result


def note(result: Tensor, function: Callable, *inputs) -> None:
    """Says that `result`, which may have been made in another way, is function(*inputs), bit for bit."""
    if _activations:
        _keep_recipe(result, function, inputs)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: itself where it has it, as what FSDP2 gathers does."""
    if weight.dtype == dtype:
        return weight
    result = weight.to(dtype)
    if _noted is not None:
        _keep_recipe(result, Tensor.to, (weight, dtype))
    return result


def _keep_recipe(result: Tensor, function: Callable, inputs: tuple) -> None:
    _noted[_address(result)] = result, _Recipe(function, [_as_input(x) for x in inputs])


def _as_input(value):
    if not isinstance(value, Tensor):
        return value
    noted, recipe = _noted.get(_address(value), (None, None))
    return recipe if noted is value else value.detach()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
