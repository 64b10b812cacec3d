"""What one pack of a training step keeps and does, counted with the real code and no GPU.

    python scripts/count_step.py --model 7B --tokens 16384

A Qwen2 of that geometry in fake tensors: they have shapes and no values, kernels are counted and do not run. Triton kernels,
varlen attention and the head's blocks are a GPU's; master weights are fp32, computation bf16, on one rank. For each
`--activation-checkpointing`: GiB that are kept for the backward, the most that stands beside the weights, casts of
weights, launches of Triton kernels, waits of the host for the device; then the launches and bytes of the gradients' norm.
"""

from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from unittest import mock

import torch
from bench_common import QWEN2, argument_parser, config_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from conj.data.packs import Group
from conj.data.tokens import TokenizedPairs
from conj.model import attention, backends, decoder, logprob
from conj.model.config import ModelConfig
from conj.model.decoder import Decoder
from conj.train.batch import Batch, collate
from conj.train.optimizer import gradient_norm
from conj.train.options import ACTIVATION_CHECKPOINTING
from conj.train.sharding import World

# The host waits for the device: it reads a value, or looks how many there are.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made inside and are still held by somebody, graphs included; and what ran."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ops: Counter[str] = Counter()
        self.peak = self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ops[str(function).rpartition(".")[0]] += 1
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata in inputs:  # a view
                continue
            if storage._cdata not in self.storages or self.storages[storage._cdata][0].expired():
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.made += storage.nbytes()
                if self.made > 1 << 25:  # looking at all of them takes time
                    self.made = 0
                    self.now()
        return result

    def now(self) -> int:
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        live = sum(size for _, size in self.storages.values())
        self.peak = max(self.peak, live)
        return live


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
    """In place of torch's varlen attention: keeps what its flash kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def nothing_runs(launches: Counter):
    """Tensors without values; Triton kernels are counted by name."""
    with (
        # On the "cpu": a build of torch for CPUs has no autograd for others.
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.dict(logprob.BLOCK, cpu=logprob.BLOCK["cuda"]),
        mock.patch.dict(decoder.KEPT_LOGITS, cpu=decoder.KEPT_LOGITS["cuda"]),
        mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")),
        mock.patch.object(attention, "_varlen_attention", lambda: lambda q, k, v, *_: _Attention.apply(q, k, v)),
        mock.patch.object(JITFunction, "run", lambda self, *_, **__: launches.update([self.fn.__name__])),
    ):
        yield


def without_values(value):
    """A batch as the step finds it, on the device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if is_dataclass(value):
        return replace(value, **{f.name: without_values(getattr(value, f.name)) for f in fields(value)})
    return value


def count_pack(config: ModelConfig, how: str, pairs: TokenizedPairs, pack: list[Group]) -> dict:
    """Forward and backward of the first pack of a step, and the norm of its gradients."""
    launches: Counter[str] = Counter()
    with mock.patch.object(backends, "current", backends.Backends(attention="varlen", kernels="triton")):
        real: Batch = collate(pairs, pack)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    with nothing_runs(launches), LiveBytes() as live, mock.patch.object(World, "sum", lambda self, x: x):
        with torch.device("meta"):  # then as `shard_model` leaves it on one rank
            model = Decoder(config)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        model.model.dtype, batch = torch.bfloat16, without_values(real)
        for layer in model.model.layers:
            layer.activation_checkpointing = how
        before = live.now()
        live.ops.clear()
        live.peak = 0
        logps = batch.pair_logps(model(*batch.inputs))
        kept = live.now() - before
        logps.sum().backward()
        ops, gradients = live.ops.copy(), sum(p.grad.nbytes for p in model.parameters())
        live.now()
        live.ops.clear()
        gradient_norm(model, world)
    return {
        "kept": kept, "peak": live.peak - before, "casts": ops["aten._to_copy"], "launches": launches,
        "reads": sum(ops[name] for name in READS), "norm": live.ops, "gradients": gradients,
    }  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=QWEN2, default="7B", help="geometry")
    parser.add_argument("--tokens", type=int, default=16384, help="of the pack")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--judgment-tokens", type=int, default=250)
    parser.add_argument("--pairs-per-prompt", type=int, default=4)
    args = parser.parse_args()
    config = config_of(QWEN2[args.model], QWEN2[args.model]["L"])
    pairs, pack = uniform_pack(args.tokens, args.prompt_tokens, args.judgment_tokens, args.pairs_per_prompt)
    print(
        "| `--activation-checkpointing` | kept, GiB | peak with gradients, GiB | dtype casts | Triton launches ", end=""
    )
    print("| host waits |\n|---|---|---|---|---|---|")
    for how in ACTIVATION_CHECKPOINTING:
        row = count_pack(config, how, pairs, pack)
        print(f"| {how} | {row['kept'] / 2**30:.1f} | {row['peak'] / 2**30:.1f} | {row['casts']} | "
              f"{row['launches'].total()} | {row['reads']} |", flush=True)  # fmt: skip
    print(f"norm of {row['gradients'] / 2**30:.1f} GiB of gradients: {dict(row['norm'])}")


if __name__ == "__main__":
    main()
