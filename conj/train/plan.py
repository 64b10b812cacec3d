"""What a run of stage 6 trains on, and in which order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conj.data.options import require
from conj.data.packs import Group, TokenizedPairs, plan_packs, plan_steps
from conj.train.checkpoint import list_checkpoints
from conj.train.fit import after_out_of_memory, settle_options
from conj.train.options import DPOOptions
from conj.train.reference import load_pairs, load_reference, reference_key
from conj.train.sharding import NotEnoughMemory, World


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run trains on, in which order: data, seed and options decide it, the number of ranks does not."""

    options: DPOOptions  # with a value for each automatic one
    pairs: TokenizedPairs
    reference: Tensor  # (N, 2) fp32
    train: list[int]  # pair numbers
    held_out: list[int]
    steps: list[list[list[Group]]]  # packs of each optimizer step
    eval_packs: list[list[Group]]
    stale: list[str]  # fields of the reference's key that are others here; see `make_plan`


def make_plan(options, world: World, *, elsewhere: bool = False) -> Plan:
    """Raises InputError unless pairs, reference logprobs and base model are all there and fit together. `elsewhere`:
    the reference may have been made on another machine or with other versions."""
    path = options.find("reference.safetensors")
    pairs, tokenizer, usable = load_pairs(options.find("pairs.jsonl"), options.model, options.max_length)
    train, held_out = ([i for i in usable if pairs.is_eval[i] is flag] for flag in (False, True))
    require(world.size <= len(train), f"{options.run_dir}: {len(train)} training pairs cannot feed {world.size} ranks")
    of_step = {"pairs_per_step": options.pairs_per_step, "share": options.share}
    seeds = [f"{options.seed}:{epoch}" for epoch in range(options.num_train_epochs)]
    members = [step for seed in seeds for step in plan_steps(pairs, train, seed=seed, **of_step)][: options.max_steps]
    if not elsewhere:  # before files are hashed: what does not fit is refused in the first seconds
        has_begun = any(list_checkpoints(options.run_dir / "checkpoints"))
        options = world.on_main(lambda: settle_options(options, has_begun, pairs, members, world.machine()))

    where = {"dtype": options.dtype, "device": world.device}
    key = world.on_main(lambda: reference_key(options.model, tokenizer, pairs, **where))
    reference, stale = load_reference(path, key, len(pairs), elsewhere=elsewhere)
    missing = int(reference[usable].isnan().any(dim=1).sum())
    require(missing == 0, f"{path}: {missing} pairs have no reference logprob")

    of_pack = {"max_tokens": options.max_tokens_per_pack, "multiple": options.pack_multiple, "share": options.share}
    return Plan(
        options=options, pairs=pairs, reference=reference, train=train, held_out=held_out, stale=stale,
        steps=[plan_packs(pairs, step, **of_pack) for step in members],
        eval_packs=plan_packs(pairs, held_out, **of_pack),
    )  # fmt: skip


@contextmanager
def naming_what_fits(plan: Plan, world: World) -> Iterator[None]:
    """Out of memory becomes an error that names what was asked for and the options that would fit; on any rank."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        asked = ". ".join(str(e).split(". ")[:3])
        can_change = not any(list_checkpoints(plan.options.run_dir / "checkpoints"))
        what_fits = after_out_of_memory(plan.options, plan.pairs, plan.steps, world.machine(), can_change=can_change)
        raise NotEnoughMemory(f"{asked}; {what_fits}") from e
