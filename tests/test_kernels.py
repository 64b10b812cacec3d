"""`conj.model.kernels` and `logprob_kernels` against fp64 oracles, beside plain torch in the same dtype.

Without a GPU the kernels run in Triton's interpreter, from a copy of the module of this file's own: what other tests
import (vLLM has kernels too) stays compiled. The interpreter replaces a kernel by numpy, so it shows wrong masks,
offsets and formulas, and nothing of races or of the compiler; on a GPU the same tests run the real kernels.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODERS, ROOT, random_pairs, write_model
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.experimental.gluon  # noqa: E402, F811  # it reads tl's functions once: before they are replaced
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as triton_interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from conj.data.packs import plan_packs  # noqa: E402
from conj.data.tokenizer import JudgeTokenizer  # noqa: E402
from conj.data.tokens import tokenize_pairs  # noqa: E402
from conj.model import backends, ops  # noqa: E402
from conj.model import kernels as compiled  # noqa: E402, F401  # before the copy of the head's kernels imports them
from conj.model.logprob import empty_statistics, linear_logprob_reference, logprobs_and_lse  # noqa: E402
from conj.model.ops import rms_norm_reference, rope_reference  # noqa: E402
from conj.model.weights import load_model  # noqa: E402
from conj.train.batch import collate, to_device  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EPS = 1e-6


def load(path: str):
    """A private copy of a module with kernels, interpreted where there is no GPU."""
    spec = importlib.util.spec_from_file_location(f"kernels_under_test_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    before, triton.knobs.runtime.interpret = triton.knobs.runtime.interpret, INTERPRETED
    try:
        spec.loader.exec_module(module)
    finally:
        triton.knobs.runtime.interpret = before
    return module


kernels, logprob_kernels = load("conj/model/kernels.py"), load("conj/model/logprob_kernels.py")
blockwise = load("benchmarks/blockwise_logprob.py")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter, for the time of a test, with three repairs.

    tl.max, tl.sum and their like are kernels too, compiled ones from triton's first import on: interpreted here. bf16,
    for the interpreter, is a bit pattern in 16 bits, cut off instead of rounded and multiplied as an integer. A bound of
    `range` is an array of one number, of which numpy 2.4 makes no int and Triton 3.6 asks for one (3.7 does not)."""
    if not INTERPRETED:
        return
    for name, function in vars(tl.standard).copy().items():
        if isinstance(function, JITFunction):
            interpreted = triton_interpreter.InterpretedFunction(function.fn)
            monkeypatch.setattr(tl.standard, name, interpreted)
            if vars(tl).get(name) is function:
                monkeypatch.setattr(tl, name, interpreted)
    convert, builder = triton_interpreter._convert_float, triton_interpreter.InterpreterBuilder
    dot, patch = builder.create_dot, triton_interpreter._patch_lang_tensor

    def convert_rounding(x, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, rounding_mode)

    def dot_in_fp32(self, a, b, *rest):
        operands = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *operands, *rest)

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(triton_interpreter, "_convert_float", convert_rounding)
    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", patch_and_index)
    monkeypatch.setattr(builder, "create_dot", dot_in_fp32)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def grads(outputs, upstreams, leaves) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, upstreams)


# Each operation: inputs for T rows, this project's kernel, and plain torch, which in fp64 is the oracle.


@dataclass(frozen=True)
class Operation:
    inputs: Callable[[int, int], dict]  # (T, columns) -> tensors by name, in fp32
    ours: Callable[[dict], tuple]
    plain: Callable[[dict], tuple]
    shared: tuple[str, ...] = ()  # inputs that are not rows
    sums: int = 0  # how many of the last outputs are sums over rows

    def in_dtype(self, T: int, columns: int, dtype: torch.dtype) -> dict:
        made = self.inputs(T, columns).items()
        return {k: (v if k in ("targets", "upstream") else v.to(dtype)).to(DEVICE) for k, v in made}


def logprob_inputs(T: int, V: int, lift: float = 10.0) -> dict:
    """Every second target is likely (lifted), as nearly all are in training; upstream is signed, as DPO's is."""
    logits, targets = normal(T, V), torch.randint(V, (T,), generator=torch.Generator().manual_seed(V))
    logits[torch.arange(0, T, 2), targets[::2]] += lift
    return {"logits": logits, "targets": targets, "upstream": normal(T, seed=1, scale=3)}


def plain_logprob(i: dict) -> Tensor:
    return wide(i["logits"]).log_softmax(-1).gather(-1, i["targets"][:, None]).squeeze(-1)


def our_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs and lse of logits taken as one block."""
    statistics = empty_statistics(logits)
    logprob_kernels.logprob_update(logits, targets, 0, *statistics)
    return logprobs_and_lse(*statistics)


def our_logit_grad(logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logprob_kernels.logprob_grad(logits, targets, 0, lse, upstream, out)
    return out


def our_logprob_grad(i: dict) -> tuple[Tensor]:
    _, lse = our_logprob(i["logits"], i["targets"])
    return (our_logit_grad(i["logits"], i["targets"], lse, i["upstream"]),)


def plain_logprob_grad(i: dict) -> tuple[Tensor]:
    leaf = i["logits"].detach().clone().requires_grad_()
    logprobs = plain_logprob(i | {"logits": leaf})
    return grads(logprobs, i["upstream"].to(logprobs.dtype), leaf)


def plain_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    inv_rms = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + EPS)
    return weight * (wide(x) * inv_rms).to(x.dtype), inv_rms.squeeze(-1)


def plain_add_norm(i: dict) -> tuple[Tensor, Tensor, Tensor]:
    residual = i["x"] + i["delta"] if "delta" in i else i["x"]
    y, inv_rms = plain_norm(residual, i["weight"])
    return y, residual, inv_rms


def our_norm(i: dict) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.add_rms_norm_forward(i["x"], i.get("delta"), i["weight"], EPS)


def our_norm_grad(i: dict) -> tuple[Tensor, Tensor]:
    _, _, inv_rms = our_norm(i)
    return kernels.add_rms_norm_backward(i["grad_y"], i.get("grad_residual"), i["x"], i["weight"], inv_rms)


def plain_norm_grad(i: dict) -> tuple[Tensor, Tensor]:
    x, weight = (i[k].detach().clone().requires_grad_() for k in ("x", "weight"))
    upstreams = [i["grad_y"], i.get("grad_residual", torch.zeros_like(x))]
    return grads([plain_norm(x, weight)[0], x * 1], upstreams, [x, weight])


def rope_inputs(T: int, N: int) -> dict:
    """N query heads of size 12 and a third as many key heads, so that no size is a power of two."""
    angles = normal(T, 6, scale=50).repeat(1, 2)
    return {"q": normal(T, N, 12), "k": normal(T, max(N // 3, 1), 12, seed=1), "cos": angles.cos(), "sin": angles.sin()}


def plain_rope(i: dict) -> tuple[Tensor, ...]:
    return tuple(rope_reference(i[x], i["cos"], i["sin"]) for x in ("q", "k"))


def plain_rope_grad(i: dict) -> tuple[Tensor, ...]:
    leaves = {x: torch.zeros_like(i[x]).requires_grad_() for x in ("q", "k")}
    return grads(plain_rope(i | leaves), [i["q"], i["k"]], list(leaves.values()))


def plain_swiglu_grad(i: dict) -> tuple[Tensor, Tensor]:
    gate, up = (i[x].detach().clone().requires_grad_() for x in ("gate", "up"))
    return grads(F.silu(gate) * up, i["grad"], [gate, up])


def rows(*names: str, **weights: float) -> Callable[[int, int], dict]:
    """Inputs (T, columns) of these names, and vectors (columns,) around 1."""

    def make(T: int, columns: int) -> dict:
        made = {name: normal(T, columns, seed=n, scale=3) for n, name in enumerate(names)}
        return made | {name: 1 + normal(columns, seed=9, scale=scale) for name, scale in weights.items()}

    return make


OPERATIONS = {
    "logprob": Operation(
        logprob_inputs, lambda i: our_logprob(i["logits"], i["targets"]),
        lambda i: (plain_logprob(i), wide(i["logits"]).logsumexp(-1)),
    ),
    "logprob_grad": Operation(logprob_inputs, our_logprob_grad, plain_logprob_grad),
    "norm": Operation(rows("x", weight=0.3), our_norm, plain_add_norm, ("weight",)),
    "add_norm": Operation(rows("x", "delta", weight=0.3), our_norm, plain_add_norm, ("weight",)),
    "norm_grad": Operation(rows("x", "grad_y", weight=0.3), our_norm_grad, plain_norm_grad, ("weight",), sums=1),
    "add_norm_grad": Operation(
        rows("x", "grad_y", "grad_residual", weight=0.3), our_norm_grad, plain_norm_grad, ("weight",), sums=1,
    ),
    "rope": Operation(rope_inputs, lambda i: kernels.rope(**i), plain_rope),
    "rope_grad": Operation(rope_inputs, lambda i: kernels.rope(**i, inverse=True), plain_rope_grad),
    "swiglu": Operation(
        rows("gate", "up"), lambda i: (kernels.swiglu_forward(**i),), lambda i: (F.silu(i["gate"]) * i["up"],),
    ),
    "swiglu_grad": Operation(rows("gate", "up", "grad"), lambda i: kernels.swiglu_backward(**i), plain_swiglu_grad),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", OPERATIONS)


def assert_error_at_most_twice_torchs(ours, torchs, expected, allowed: float = 0.0) -> None:
    """Norms of the errors against fp64; `allowed` is an error that a claim's docstring accounts for."""
    assert len(ours) == len(torchs) == len(expected)
    for n, (o, t, e) in enumerate(zip(ours, torchs, expected)):
        assert o.shape == e.shape
        error, torch_error = ((x.double() - e).norm().item() for x in (o, t))
        assert error <= 2 * torch_error + 1e-6 * e.norm().item() + allowed, (n, error, torch_error)


def rounding_of_lse(i: dict) -> float:
    """lse is kept in fp32: half a unit in its last place is a relative error of all probabilities of the row."""
    lse = wide(i["logits"]).logsumexp(-1).abs().max().item()
    return 2.0 ** (math.floor(math.log2(lse)) - 24) * i["upstream"].norm().item()


def check(operation: Operation, i: dict) -> None:
    oracle = operation.plain({k: v.double() if v.is_floating_point() else v for k, v in i.items()})
    allowed = rounding_of_lse(i) if "logits" in i else 0.0
    assert_error_at_most_twice_torchs(operation.ours(i), operation.plain(i), oracle, allowed)


def in_poison(x: Tensor) -> Tensor:
    """The same values as a view into NaN: odd storage offset, odd stride of rows, NaN before, behind and between."""
    if not x.is_floating_point():
        return x
    flat = x.flatten(1) if x.dim() > 1 else x[None]
    margin = 4 + flat.shape[1] % 2
    buffer = flat.new_full((len(flat) + 2, flat.shape[1] + margin + 1), math.nan)
    assert buffer.stride(0) % 2
    view = buffer[1:-1, 2 : 2 + flat.shape[1]]
    view.copy_(flat)
    return view.unflatten(1, x.shape[1:]) if x.dim() > 1 else view[0]


@DTYPES
@pytest.mark.parametrize("T, columns", [(1, 33), (35, 6), (5, 515), (3, 1000), (2, 5000)])
@EVERY
def test_error_is_at_most_twice_that_of_plain_torch(name, T, columns, dtype):
    """A wrong formula, mask or cast. 5000 columns take a second block; 35 rows a second share of a weight's gradient."""
    if name.startswith("rope"):
        columns = columns % 31 + 1  # heads: 3, 7, 20, 9, 10
    check(OPERATIONS[name], OPERATIONS[name].in_dtype(T, columns, dtype))


@DTYPES
@pytest.mark.parametrize("name", ["logprob", "logprob_grad"])
@pytest.mark.parametrize("lift", [0.0, 20.0])
def test_error_holds_at_a_real_vocabulary(name, lift, dtype):
    """Qwen2's 151936 columns: a sum that grows over 38 chunks, and targets with p = 1 - 1e-3."""
    i = {k: v.to(DEVICE) for k, v in logprob_inputs(2, 151936, lift).items()}
    check(OPERATIONS[name], i | {"logits": i["logits"].to(dtype)})


@DTYPES
@EVERY
def test_nothing_but_the_rows_is_read_or_left_unwritten(name, dtype):
    """An offset without its stride, a load without its mask, an output element that no program writes.

    Inputs are views into NaN with odd offsets and strides; fresh memory is filled with NaN too."""
    operation = OPERATIONS[name]
    i = operation.in_dtype(6, 10 if name.startswith("rope") else 1025, dtype)
    i = {k: in_poison(v) for k, v in i.items()}
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        ours = operation.ours(i)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in ours)
    check(operation, i)


@DTYPES
@EVERY
def test_a_row_is_the_same_alone_among_others_and_again(name, dtype):
    """Bit for bit: a sum whose order follows T or the row's place in a pack, or memory left from another run."""
    operation = OPERATIONS[name]
    i = operation.in_dtype(40, 10 if name.startswith("rope") else 515, dtype)
    whole, again = operation.ours(i), operation.ours(i)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for picked in (slice(7, 8), slice(3, 39)):
        part = operation.ours({k: v if k in operation.shared else v[picked] for k, v in i.items()})
        for a, b in list(zip(part, whole))[: len(part) - operation.sums]:
            assert torch.equal(a, b[picked])


@EVERY
def test_no_rows_are_no_work(name):
    operation = OPERATIONS[name]
    i = {k: v if k in operation.shared else v[:0] for k, v in operation.in_dtype(2, 10, torch.float32).items()}
    ours = operation.ours(i)
    assert not any(x.any() for x in ours) and [len(x) for x in ours[: len(ours) - operation.sums]].count(0)


# Logprobs in blocks of columns


def logprob_by_blocks(i: dict, widths: list[int], shift: int = 0) -> tuple[Tensor, Tensor]:
    """Logprobs and gradients, each block in memory of its own. `shift` misnumbers all blocks but the first."""
    logits, targets = i["logits"], i["targets"]
    state = [torch.full((len(logits),), value, device=logits.device) for value in (-math.inf, 0.0, math.nan)]
    starts = [sum(widths[:n]) for n in range(len(widths))]
    assert sum(widths) == logits.shape[1]
    blocks = [in_poison(logits[:, start : start + width]) for start, width in zip(starts, widths)]
    blocks = [(start + shift * (start > 0), block) for start, block in zip(starts, blocks)]
    for first_column, block in blocks:
        logprob_kernels.logprob_update(block, targets, first_column, *state)
    row_max, row_sum, target_logit = state
    lse = row_max + row_sum.log()
    out = torch.full_like(logits, math.nan)
    for start, (first_column, block) in zip(starts, blocks):
        columns = out[:, start : start + block.shape[1]]
        logprob_kernels.logprob_grad(block, targets, first_column, lse, i["upstream"], columns)
    return target_logit - lse, out


def check_blocks(i: dict, widths: list[int], shift: int = 0) -> None:
    double = i | {"logits": i["logits"].double()}
    plain, oracle = ((plain_logprob(x), *plain_logprob_grad(x)) for x in (i, double))
    assert_error_at_most_twice_torchs(logprob_by_blocks(i, widths, shift), plain, oracle, rounding_of_lse(i))


@DTYPES
@pytest.mark.parametrize("widths", [[515], [1, 514], [200, 200, 115], [33] * 15 + [20]], ids=len)
def test_any_split_into_blocks_of_columns_gives_the_logprob(widths, dtype):
    """A running sum that is not rescaled when the max rises, or a target read in a block that it is not in."""
    check_blocks(OPERATIONS["logprob"].in_dtype(6, 515, dtype), widths)


def test_the_check_fails_for_misnumbered_blocks():
    """Negative control: a check that cannot fail would pass the test above."""
    with pytest.raises(AssertionError):
        check_blocks(OPERATIONS["logprob"].in_dtype(6, 515, torch.bfloat16), [200, 315], shift=1)


@pytest.mark.parametrize("damage", ["lse", "rows", "targets"])
def test_the_check_fails_for_a_wrong_gradient(damage):
    """Negative control: lse of other rows or off by a hundredth, targets off by one."""
    i = OPERATIONS["logprob_grad"].in_dtype(6, 515, torch.bfloat16)
    double = i | {"logits": i["logits"].double()}
    _, lse = our_logprob(i["logits"], i["targets"])
    lse = {"lse": lse + 0.01, "rows": lse.roll(1), "targets": lse}[damage]
    targets = (i["targets"] + (damage == "targets")) % 515
    ours = our_logit_grad(i["logits"], targets, lse, i["upstream"])
    plain, exact = plain_logprob_grad(i), plain_logprob_grad(double)
    with pytest.raises(AssertionError):
        assert_error_at_most_twice_torchs((ours,), plain, exact, rounding_of_lse(i))


@DTYPES
def test_masked_columns_count_for_nothing(dtype):
    """-inf - -inf is NaN: a masked first block, or rows masked up to their target, would poison the whole sum."""
    i = OPERATIONS["logprob"].in_dtype(6, 515, dtype)
    i["targets"] = i["targets"] % 115 + 400
    i["logits"][:, :400] = -math.inf
    i["logits"][3] = -math.inf
    i["logits"][3, i["targets"][3]] = 2.0
    logprobs, grad = logprob_by_blocks(i, [200, 200, 115])
    assert not grad[:, :400].any() and not grad[3].any() and logprobs[3] == 0
    kept = i | {"logits": i["logits"][:, 400:], "targets": i["targets"] - 400}
    whole = logprob_by_blocks(kept, [115])
    assert torch.equal(logprobs, whole[0]) and torch.equal(grad[:, 400:], whole[1])
    check_blocks(kept, [100, 15])


@DTYPES
def test_huge_logits_neither_overflow_nor_vanish(dtype):
    """exp without the max taken off: inf for large logits, log 0 for very negative ones."""
    i = OPERATIONS["logprob"].in_dtype(4, 515, dtype)
    i["logits"] += torch.tensor([3e4, -3e4, 300.0, -300.0], device=DEVICE, dtype=dtype)[:, None]
    check_blocks(i, [200, 315])


@DTYPES
def test_a_gradient_in_place_of_its_logits_is_the_same(dtype):
    """A program that reads logits which another has overwritten; also: memory beyond the block stays as it was."""
    i = OPERATIONS["logprob_grad"].in_dtype(5, 1025, dtype)
    (expected,) = our_logprob_grad(i)
    _, lse = our_logprob(i["logits"], i["targets"])
    logits = in_poison(i["logits"])
    logprob_kernels.logprob_grad(logits, i["targets"], 0, lse, i["upstream"], logits)
    assert torch.equal(logits, expected)
    assert logits._base.isnan().sum() == logits._base.numel() - logits.numel()


# RMSNorm


def test_the_norm_rounds_as_the_model_does():
    """bf16 twice, before the weight and after it: a kernel that rounds once differs in a quarter of all elements."""
    i = OPERATIONS["add_norm"].in_dtype(9, 1000, torch.bfloat16)
    y, residual, _ = kernels.add_rms_norm_forward(i["x"], i["delta"], i["weight"], EPS)
    expected = rms_norm_reference(residual, i["weight"], EPS)
    assert torch.equal(residual, i["x"] + i["delta"])
    assert (y != expected).float().mean() < 0.002
    once = i["weight"].float() * F.rms_norm(residual.float(), (1000,), eps=EPS)
    assert (once.bfloat16() != expected).float().mean() > 0.1  # negative control


def test_without_a_delta_the_residual_is_x_itself():
    i = OPERATIONS["norm"].in_dtype(3, 64, torch.bfloat16)
    assert kernels.add_rms_norm_forward(i["x"], None, i["weight"], EPS)[1] is i["x"]


# Sums of gathered rows


def inverse_index(index: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """row_starts and rows: the places of each of T rows in the index, in order."""
    counts = torch.bincount(index, minlength=T)
    return F.pad(counts.cumsum(0), (1, 0)).to(dtype), index.argsort(stable=True)


def gathered(dtype: torch.dtype, T: int = 9, G: int = 40, C: int = 515) -> tuple[Tensor, Tensor]:
    index = torch.randint(T - 1, (G,), generator=torch.Generator().manual_seed(G))  # the last row is never gathered
    return normal(G, C).to(DEVICE, dtype), index.to(DEVICE)


def summed(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(9, 515, dtype=dtype, device=DEVICE).index_add(0, index, x.to(dtype))


@DTYPES
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_summed_rows_are_the_gradient_of_a_gather(offsets, dtype):
    """Against index_add in fp64; rows that nobody gathered get exact zeros, and NaN around x is not read."""
    x, index = gathered(dtype)
    ours = kernels.sum_rows(in_poison(x), *inverse_index(index, 9, offsets))
    assert_error_at_most_twice_torchs((ours,), (summed(x, index, dtype),), (summed(x, index, torch.double),))
    assert not ours[-1].any()
    assert torch.equal(ours, kernels.sum_rows(x, *inverse_index(index, 9, offsets)))


def test_a_sum_does_not_depend_on_the_other_sums():
    x, index = gathered(torch.bfloat16)
    row_starts, rows = inverse_index(index, 9, torch.int32)
    assert torch.equal(kernels.sum_rows(x, row_starts[3:6], rows), kernels.sum_rows(x, row_starts, rows)[3:5])


def test_the_check_fails_for_a_dropped_row():
    """Negative control: one of 40 rows left out of its sum."""
    x, index = gathered(torch.bfloat16)
    row_starts, rows = inverse_index(index, 9, torch.int64)
    row_starts[1:] -= 1
    ours, expected = kernels.sum_rows(x, row_starts, rows), summed(x, index, torch.double)
    with pytest.raises(AssertionError):
        assert_error_at_most_twice_torchs((ours,), (expected.bfloat16(),), (expected,))


# Offsets past 2^31


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logprob_grad", "add_norm", "add_norm_grad", "rope", "swiglu_grad", "sum_rows"])
def test_rows_lie_where_they_should_past_2_to_the_31_elements(name):
    """An offset in 32 bits wraps around: at a vocabulary of 151936 from row 14,135 on.

    Three rows 2^30 + 8 elements apart, in 4.3 GB that are reserved and hardly touched."""
    stride, gigabytes = 2**30 + 16, 5
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if INTERPRETED else torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory")
    buffer, used = torch.empty(2 * stride + 4096, dtype=torch.bfloat16, device=DEVICE), 0

    def far(x: Tensor) -> Tensor:
        nonlocal used
        view = buffer[used:].as_strided(x.shape, (stride, *x.stride()[1:]))
        used += math.prod(x.shape[1:])
        return view.copy_(x)

    if name == "sum_rows":
        x = normal(3, 64).to(DEVICE, torch.bfloat16)
        places = inverse_index(torch.tensor([1, 0, 1], device=DEVICE), 2, torch.int64)
        assert torch.equal(kernels.sum_rows(far(x), *places), kernels.sum_rows(x, *places))
        return
    operation = OPERATIONS[name]
    i = operation.in_dtype(3, 9 if name == "rope" else 64, torch.bfloat16)
    moved = {k: far(v) if v.dim() > 1 and k not in operation.shared else v for k, v in i.items()}
    for a, b in zip(operation.ours(moved), operation.ours(i)):
        assert torch.equal(a, b)
    if name == "logprob_grad":
        _, lse = our_logprob(i["logits"], i["targets"])
        logprob_kernels.logprob_grad(i["logits"], i["targets"], 0, lse, i["upstream"], moved["logits"])
        assert torch.equal(moved["logits"], our_logprob_grad(i)[0])


# The rival that never writes logits


@pytest.mark.parametrize("T, D, V", [(5, 40, 33), (130, 48, 515)])
@DTYPES
def test_blockwise_logprobs_keep_the_error_of_plain_torch(T, D, V, dtype):
    """What a benchmark compares must be right first; tiles of 128 make the second shape cross their edges."""
    hidden, weight = normal(T, D).to(DEVICE, dtype), normal(V, D, scale=D**-0.5).to(DEVICE, dtype)
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(V)).to(DEVICE)
    upstream = normal(T, seed=1, scale=3).to(DEVICE)

    def plain(h, w):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        logprobs = plain_logprob({"logits": F.linear(h, w), "targets": targets})
        return logprobs.detach(), *grads(logprobs, upstream.to(logprobs.dtype), [h, w])

    assert torch.equal(plain(hidden, weight)[0], linear_logprob_reference(hidden, weight, targets))
    logprobs, lse = blockwise.linear_logprob_blockwise_forward(hidden, weight, targets)
    ours = logprobs, *blockwise.linear_logprob_blockwise_backward(hidden, weight, targets, lse, upstream)
    allowed = rounding_of_lse({"logits": F.linear(hidden, weight), "upstream": upstream})
    assert_error_at_most_twice_torchs(ours, plain(hidden, weight), plain(hidden.double(), weight.double()), allowed)


# The model on these kernels


def logps_and_gradients(folder: Path, pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """Every pair's logprobs, in one pack, and every parameter's gradient under signed weights."""
    model = load_model(folder, device=DEVICE)
    (pack,) = plan_packs(pairs, range(len(pairs)), max_tokens=10**6, share="prompt")
    batch = to_device(collate(pairs, pack), torch.device(DEVICE))
    logps = batch.pair_logps(model(*batch.inputs))
    upstream = normal(*logps.shape).to(DEVICE)
    found = torch.autograd.grad((logps * upstream).sum(), list(model.parameters()))
    return logps.detach(), dict(zip((name for name, _ in model.named_parameters()), found))


@pytest.mark.parametrize(("kind", "damage"), [("qwen3", None), ("qwen2", "sum_rows")])
def test_the_model_on_triton_equals_the_model_on_torch(kind, damage, tmp_path, monkeypatch):
    """Forward and backward of every kernel where it is used; with a gather's backward that loses a row it must fail."""
    folder = write_model(tmp_path / "model", tied=False, **DECODERS[kind])
    pairs = tokenize_pairs(random_pairs(2), JudgeTokenizer.load(folder), 600)
    monkeypatch.setattr(backends.current, "attention", "sdpa")
    monkeypatch.setattr(backends.current, "kernels", "torch")
    expected_logps, expected = logps_and_gradients(folder, pairs)
    monkeypatch.setattr(backends.current, "kernels", "triton")
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    monkeypatch.setitem(sys.modules, "conj.model.logprob_kernels", logprob_kernels)
    if damage:
        right = kernels.sum_rows
        monkeypatch.setattr(kernels, "sum_rows", lambda x, starts, rows: right(x, starts, rows.roll(1)))
    logps, found = logps_and_gradients(folder, pairs)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=0)
    errors = [((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()]
    assert (max(errors) < 1e-4) == (damage is None), max(errors)
