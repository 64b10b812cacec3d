"""`linear_logprob` against an fp64 oracle, beside the plain-torch reference in the same dtype."""

import pytest
import torch

from conj.model import logprob
from conj.model.logprob import linear_logprob, linear_logprob_reference, selected_logprob


def inputs(T: int, D: int, V: int, dtype: torch.dtype, lift: float):
    generator = torch.Generator().manual_seed(T)
    hidden, weight = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator) / D**0.5
    targets = torch.randint(V, (T,), generator=generator)
    # `lift` makes the target likely (p near 1), where onehot - softmax cancels in low precision.
    hidden = hidden + lift * weight[targets] / weight[targets].square().sum(-1, keepdim=True)
    upstream = torch.randn(T, generator=generator) * 3  # DPO's gradients are signed and differ per token
    return hidden.to(dtype), weight.to(dtype), targets, upstream


def run(function, hidden, weight, targets, upstream):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs = function(hidden, weight, targets)
    return logprobs.detach(), *torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight])


def oracle(hidden, weight, targets, upstream):
    function = lambda h, w, t: reference(torch.nn.functional.linear(h, w), t)  # noqa: E731
    return run(function, hidden.double(), weight.double(), targets, upstream.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lift", [0.0, 10.0])
@pytest.mark.parametrize("T, D, V", [(1, 16, 33), (130, 48, 515), (257, 64, 2000)])
def test_error_is_at_most_twice_that_of_plain_torch(T, D, V, lift, dtype, monkeypatch):
    """Three-way error: both against fp64. Small blocks make every shape but the first cross edges both ways."""
    monkeypatch.setitem(logprob.BLOCK, "cpu", (64, 200))
    arguments = inputs(T, D, V, dtype, lift)
    expected = oracle(*arguments)
    ours, torchs = run(linear_logprob, *arguments), run(linear_logprob_reference, *arguments)
    for name, e, o, t in zip(("logprobs", "hidden", "weight"), expected, ours, torchs):
        errors = [(x.double() - e).norm().item() for x in (o, t)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * e.norm().item(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lift", [0.0, 10.0])
def test_logits_that_exist_are_scored_and_differentiated_as_plain_torch_would(lift, dtype):
    """`selected_logprob` against fp64, on a view whose rows are not next to each other."""
    hidden, weight, targets, upstream = inputs(90, 48, 515, torch.float32, lift)
    logits = torch.nn.functional.pad(hidden @ weight.T, (1, 2)).to(dtype)[:, 1:516]
    outcomes = []
    for function, like in ((reference, torch.float64), (selected_logprob, dtype), (reference, dtype)):
        leaf = logits.to(like).detach().requires_grad_()
        logprobs = function(leaf, targets)
        outcomes.append((logprobs.detach(), *torch.autograd.grad((logprobs * upstream).sum(), leaf)))
    for expected, ours, torchs in zip(*outcomes):
        errors = [(x.double() - expected).norm().item() for x in (ours, torchs)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * expected.norm().item()


def reference(logits, targets):
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("keep_bytes", [150_000, 10**9])
def test_blocks_that_are_kept_change_no_bit(keep_bytes, monkeypatch):
    """Some of the blocks, and all; kept ones are not multiplied again."""
    monkeypatch.setitem(logprob.BLOCK, "cpu", (64, 200))
    arguments, products, matmul = inputs(130, 48, 515, torch.float32, 0.0), [], logprob._matmul
    monkeypatch.setattr(logprob, "_matmul", lambda a, b: products.append(a.shape) or matmul(a, b))
    expected, num_without = run(linear_logprob, *arguments), len(products)
    found = run(lambda *tensors: linear_logprob(*tensors, keep_bytes=keep_bytes), *arguments)
    assert all(torch.equal(f, e) for f, e in zip(found, expected))
    assert num_without / 2 <= len(products) - num_without < num_without


def test_a_row_does_not_depend_on_the_other_rows(monkeypatch):
    monkeypatch.setitem(logprob.BLOCK, "cpu", (128, 300))
    hidden, weight, targets, _ = inputs(200, 64, 999, torch.float32, 0.0)
    whole = linear_logprob(hidden, weight, targets)
    assert torch.equal(linear_logprob(hidden[50:170], weight, targets[50:170]), whole[50:170])


def test_no_rows_give_no_logprobs_and_zero_gradients():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert hidden.grad.shape == (0, 8) and not weight.grad.any()
