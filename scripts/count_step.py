"""What a training step holds and does on one rank, counted with the real code and no GPU.

    python scripts/count_step.py --model 7B --tokens 16384
    python scripts/count_step.py --model 7B --tokens 16384 --ranks 8 --audit-mode

A Qwen2 of that geometry in fake tensors: they have shapes and no values, kernels are counted and do not run, and the other
ranks are not there. Triton kernels, varlen attention and the head's blocks are a GPU's; master weights are fp32,
computation bf16. A step of two packs, AdamW's moments there as from the second step on. For each
`--activation-checkpointing`: GiB that a pack keeps for its backward; the most that stands on the GPU and when; the same by the
formulas of conj/train/memory.py; casts of weights, launches of Triton kernels, waits of the host for the device in a pack;
then the launches and bytes of the gradients' norm.
"""

import weakref
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from bench_common import QWEN2, argument_parser, config_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from conj.data.packs import Group
from conj.data.tokens import TokenizedPairs
from conj.model import attention, backends, decoder, logprob
from conj.model.config import ModelConfig
from conj.model.weights import local_tensor
from conj.train import sharding
from conj.train.batch import Batch, collate
from conj.train.checkpoint import training_state
from conj.train.memory import GIB, PackShape, reference_memory, step_memory
from conj.train.optimizer import build_optimizer, clip_gradients, gradient_norm
from conj.train.options import ACTIVATION_CHECKPOINTING, DPOOptions
from conj.train.sharding import World, shard_model

# The host waits for the device: it reads a value, or looks how many there are.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made inside and are still held by somebody, graphs included; and what ran.

    With `--cpu-offload` some of them are the host's: `on_host` has their storages, and what is made of those alone is the host's
    as well."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # by storage
        self.on_host: set[int] = set()
        self.ops: Counter[str] = Counter()
        self.live = self.peak = self.host = 0
        self.peaks: dict[str, int] = {}  # by phase
        self.phase = ""
        self.crossing = False  # between host and device: what is made lies on the other side

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ops[str(function).rpartition(".")[0]] += 1
        inputs = {key_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        of_host = bool(inputs) and inputs <= self.on_host
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            is_of_others = (
                key_of(tensor) in inputs and key_of(tensor) not in self.sizes
            )  # a view of what was there before
            if local_tensor(tensor).device.type != "meta" and not is_of_others:
                self.hold(local_tensor(tensor).untyped_storage(), of_host != self.crossing)
        return result

    def hold(self, storage: torch.UntypedStorage, of_host: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.drop, key)
            if of_host:
                self.on_host.add(key)
        self._add(key, size - self.sizes.get(key, 0))
        self.sizes[key] = size

    def drop(self, key: int) -> None:
        self._add(key, -self.sizes.pop(key))
        self.on_host.discard(key)

    def _add(self, key: int, size: int) -> None:
        if key in self.on_host:
            self.host += size
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)


def key_of(tensor: Tensor) -> int:
    return local_tensor(tensor).untyped_storage()._cdata


def uniform_pack(tokens: int, prompt: int, judgment: int, pairs_per_prompt: int) -> tuple[TokenizedPairs, list[Group]]:
    """As many prompts with their pairs as fill a pack of `tokens` tokens, all of the same lengths."""
    count = tokens // (prompt + 2 * pairs_per_prompt * (judgment - 1))
    ids, num_pairs = array("i", [1]), count * pairs_per_prompt
    pairs = TokenizedPairs(
        ids=[""] * num_pairs, is_eval=[False] * num_pairs, prompts=[ids * prompt] * count,
        prompt_of=[i // pairs_per_prompt for i in range(num_pairs)], judgments=[(ids * judgment,) * 2] * num_pairs,
    )  # fmt: skip
    k = pairs_per_prompt
    return pairs, [Group(prompt=i, pairs=list(range(i * k, (i + 1) * k))) for i in range(count)]


class _Attention(torch.autograd.Function):
    """In place of torch's varlen attention: keeps what its flash kernel keeps, and has its scratch."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        gradients = tuple(torch.empty_like(t) for t in (q, k, v))
        scratch = [torch.empty_like(q, dtype=torch.float32)]  # sums of the queries' gradients
        scratch += [k.new_empty(len(k), *q.shape[1:]) for _ in range(2)]  # keys' and values', one for each query head
        del scratch
        return gradients


class _Unpinned(CPUOffloadPolicy):
    def __init__(self):
        super().__init__(pin_memory=False)


@contextmanager
def nothing_runs(launches: Counter, live: LiveBytes, num_ranks: int = 1) -> Iterator[World]:
    """Tensors without values, on the main one of so many ranks; Triton kernels are counted by name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    resize, to, to_empty = torch.UntypedStorage.resize_, Tensor.to, nn.Module.to_empty

    def resize_and_tell(storage, size):  # as FSDP2 frees and refills what it gathers, past the dispatcher
        resize(storage, size)
        if storage._cdata in live.sizes:
            live.hold(storage, False)

    def copy_across(tensor, *args, **kwargs):  # FSDP2 alone says non_blocking, and only with --cpu-offload
        if not (live.on_host and "non_blocking" in kwargs):
            return to(tensor, *args, **kwargs)
        live.crossing = True
        try:
            return tensor.clone()
        finally:
            live.crossing = False

    def fill(module, *, device):  # torch's own wants to swap fake tensors, and cannot
        if any(isinstance(p, DTensor) for p in module.parameters()):
            return to_empty(module, device=device)
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        return module

    try:
        with (
            # On the "cpu": a build of torch for CPUs has no autograd for others.
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.dict(logprob.BLOCK, cpu=logprob.BLOCK["cuda"]),
            mock.patch.dict(decoder.KEPT_LOGITS, cpu=decoder.KEPT_LOGITS["cuda"]),
            mock.patch.object(logprob, "_matmul", lambda a, b: a.new_empty(len(a), b.shape[1], dtype=torch.float32)),
            mock.patch.object(logprob, "_add_matmul", lambda total, a, b: None),
            mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")),
            mock.patch.object(attention, "_varlen_attention", lambda: lambda q, k, v, *_: _Attention.apply(q, k, v)),
            mock.patch.object(JITFunction, "run", lambda self, *_, **__: launches.update([self.fn.__name__])),
            mock.patch("torch.optim.adam._get_value", lambda count: 2),
            mock.patch.object(World, "sum", lambda self, values: values),
            mock.patch.object(sharding, "init_device_mesh", lambda *_, **__: mesh),
            mock.patch.object(sharding, "CPUOffloadPolicy", _Unpinned),
            mock.patch.object(nn.Module, "to_empty", fill),
            mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell),
            mock.patch.object(Tensor, "to", copy_across),
            live,
        ):
            yield World(rank=0, size=num_ranks, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def without_values(value):
    """A batch as the step finds it, on the device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if is_dataclass(value):
        return replace(value, **{f.name: without_values(getattr(value, f.name)) for f in fields(value)})
    return value


def count_step(
    config: ModelConfig, pairs: TokenizedPairs, pack: list[Group], *, num_turns: int = 2, num_ranks: int = 1,
    activation_checkpointing: str = "none", audit_mode: bool = False, cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> dict:  # fmt: skip
    """A step of `num_turns` times the same pack on the main rank: bytes, by phase too, and what ran in its first pack."""
    launches, live = Counter(), LiveBytes()
    with mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")):
        real: Batch = collate(pairs, pack)
    with nothing_runs(launches, live, num_ranks) as world:
        model = shard_model(
            config, replace(world, device=torch.device("cuda" if cpu_offload else "cpu")), "bfloat16",
            activation_checkpointing=activation_checkpointing, cpu_offload=cpu_offload,
            reduce_dtype=torch.float64 if audit_mode else torch.float32, reshard_after_forward=reshard_after_forward,
        )  # fmt: skip
        if cpu_offload:
            live.on_host, live.host, live.live = set(live.sizes), live.live, live.host
        optimizer = build_optimizer(model, DPOOptions(run_dir=Path(), model=Path(), audit_mode=audit_mode))
        training_state(model, optimizer)
        batch, seen = without_values(real), {}
        live.ops.clear()
        live.peak, live.peaks = live.live, {}
        for turn in range(num_turns):
            before, live.phase = live.live, f"forward {turn + 1}"
            sharding.reduce_at(model, turn == num_turns - 1, once=audit_mode)
            logps = batch.pair_logps(model(*batch.inputs))
            kept, live.phase = live.live - before, f"backward {turn + 1}"
            logps.sum().backward()
            del logps
            seen = seen or {"kept": kept, "launches": launches.copy(), "ops": live.ops.copy()}
        gradients = sum(local_tensor(p.grad).nbytes for p in model.parameters())
        live.phase = "norm"
        live.ops.clear()
        gradient_norm(model, world, audit_mode=audit_mode)
        norm, live.phase = live.ops.copy(), "optimizer"
        clip_gradients(model, 2.0, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen | {"peak": live.peak, "peaks": live.peaks, "host": live.host, "norm": norm, "gradients": gradients}


def count_reference(config: ModelConfig, pairs: TokenizedPairs, pack: list[Group], *, num_ranks: int = 1) -> int:
    """The most bytes that stand while stage 5 computes a pack, the second of its kind."""
    live = LiveBytes()
    with mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")):
        real = collate(pairs, pack)
    with nothing_runs(Counter(), live, num_ranks) as world, torch.no_grad():
        model, batch = shard_model(config, world, "bfloat16"), without_values(real)
        live.peak = live.live
        for _ in range(2):
            batch.pair_logps(model(*batch.inputs))
    return live.peak


def shape_of(pairs: TokenizedPairs, pack: list[Group]) -> PackShape:
    """A pack as the formulas take it."""
    with mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")):
        batch = collate(pairs, pack)
    return PackShape(tokens=len(batch.input_ids), predicted=len(batch.targets), keys=len(batch.segments.keys.index))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=QWEN2, default="7B", help="geometry")
    parser.add_argument("--layers", type=int, help="all if not given")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pack, at most")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--judgment-tokens", type=int, default=250)
    parser.add_argument("--pairs-per-prompt", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2, help="packs of a rank in a step")
    for name in ("--audit-mode", "--cpu-offload", "--no-reshard-after-forward"):
        parser.add_argument(name, action="store_true")
    args = parser.parse_args()
    config = config_of(QWEN2[args.model], args.layers or QWEN2[args.model]["L"])
    pairs, pack = uniform_pack(args.tokens, args.prompt_tokens, args.judgment_tokens, args.pairs_per_prompt)
    how = {"num_ranks": args.ranks, "num_turns": args.turns, "audit_mode": args.audit_mode}
    how |= {"cpu_offload": args.cpu_offload, "reshard_after_forward": not args.no_reshard_after_forward}
    shape = shape_of(pairs, pack)
    print(f"packs of {shape.tokens} tokens, of which {shape.predicted} are predicted; {args.ranks} ranks, GiB a GPU")
    print(
        "| `--activation-checkpointing` | kept by a pack | peak | in | by formula | in | dtype casts | Triton launches ",
        end="",
    )
    print("| host waits |\n|---|---|---|---|---|---|---|---|---|")
    for checkpointing in ACTIVATION_CHECKPOINTING:
        row = count_step(config, pairs, pack, activation_checkpointing=checkpointing, **how)
        formula = step_memory(config, shape, activation_checkpointing=checkpointing, **how)
        print(f"| {checkpointing} | {row['kept'] / GIB:.1f} | {row['peak'] / GIB:.1f} | {max(row['peaks'], key=row['peaks'].get)} "
              f"| {formula.total / GIB:.1f} | {formula.moment} | {row['ops']['aten._to_copy']} | {row['launches'].total()} "
              f"| {sum(row['ops'][name] for name in READS)} |", flush=True)  # fmt: skip
    reference = count_reference(config, pairs, pack, num_ranks=args.ranks)
    formula = reference_memory(config, shape, num_ranks=args.ranks)
    print(f"stage 5: {reference / GIB:.1f}, by formula {formula.total / GIB:.1f}")
    print(f"norm of {row['gradients'] / GIB:.1f} GiB of gradients: {dict(row['norm'])}")


if __name__ == "__main__":
    main()
