"""What ranks send in a step, counted beside what FSDP2 asks of its collectives: one process plays rank 0 of 64."""

import pytest
import torch
import torch.distributed as dist
from conftest import random_pairs
from torch.testing._internal.distributed.fake_pg import FakeStore

from conj.data.packs import plan_packs
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.model.folder import read_decoder
from conj.train.batch import collate
from conj.train.sharding import World, reduce_at, shard_model
from conj.train.speed import step_traffic

NUM_TURNS = 3


CALLS = {  # of torch 2.14 and of those before it
    "gathered": ("all_gather_single", "all_gather_into_tensor"),
    "reduced": ("reduce_scatter_single", "reduce_scatter_tensor"), "between_copies": ("all_reduce",),
}  # fmt: skip


def count_bytes(monkeypatch) -> dict[str, int]:
    """Bytes that rank 0 sends from now on, as a ring does: all but its own part of what is gathered or scattered, and of a
    sum twice that."""
    sent = dict.fromkeys(CALLS, 0)

    def counting(kind: str, function):
        def counted(*tensors, **arguments):
            named = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
            size, whole = arguments["group"].size(), max(tensor.nbytes for tensor in (*tensors, *named))
            sent[kind] += (1 + (kind == "between_copies")) * whole * (size - 1) // size
            return function(*tensors, **arguments)

        return counted

    for kind, names in CALLS.items():
        for name in (name for name in names if hasattr(dist, name)):
            monkeypatch.setattr(dist, name, counting(kind, getattr(dist, name)))
    return sent


@pytest.mark.parametrize(
    ("size", "shard", "tied", "how"),
    [
        (64, 8, False, {}), (64, 64, True, {}), (8, 8, False, {"reshard_after_forward": False}),
        (16, 4, True, {"audit_mode": True}), (4, 1, False, {}), (8, 4, True, {"dtype": "float32"}),
    ],
)  # fmt: skip
def test_a_steps_traffic_is_what_its_collectives_move(size, shard, tied, how, tied_model, untied_model, monkeypatch):
    folder = tied_model if tied else untied_model
    config, pairs = read_decoder(folder).config, tokenize_pairs(random_pairs(9), JudgeTokenizer.load(folder), 600)
    packs = plan_packs(pairs, range(9), max_tokens=10**6, share="prompt", multiple=NUM_TURNS)
    audit, dtype = how.get("audit_mode", False), how.get("dtype", "bfloat16")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        world = World(rank=0, size=size, device=torch.device("cpu"), dp_shard_size=shard)
        model = shard_model(
            config, world, dtype, reduce_dtype=torch.float64 if audit else torch.float32,
            reshard_after_forward=how.get("reshard_after_forward", True),
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        sent = count_bytes(monkeypatch)
        for turn, pack in enumerate(packs, 1):
            reduce_at(model, turn == NUM_TURNS, once=audit)
            batch = collate(pairs, pack)
            batch.pair_logps(model(*batch.inputs)).sum().backward()
    finally:
        dist.destroy_process_group()
    expected = step_traffic(config, num_turns=NUM_TURNS, shard_size=shard, num_copies=size // shard, **how)
    for kind, total in expected.items():
        assert sent[kind] == pytest.approx(total, rel=1e-3), kind
    assert sent["gathered"] > 0 or shard == 1
