"""What a run of stage 6 trains on, in which order, and when it evaluates what.

Evaluations take at most EVAL_SHARE of a run, by tokens, whatever its size; a forward costs a third of a step. The rule is a
function of data, seed and options, as the steps are.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conj.data.options import require
from conj.data.packs import Group, group_tokens, pairs_of, plan_packs
from conj.data.tokens import TokenizedPairs
from conj.train.advice import after_out_of_memory
from conj.train.checkpoint import list_checkpoints
from conj.train.fit import of_pack, packer, plan_members, settle_options
from conj.train.options import DPOOptions
from conj.train.reference import load_reference, map_pairs, reference_key
from conj.train.sharding import NotEnoughMemory, World

EVAL_SHARE = 0.03  # of a run's time
FEWEST_EVALUATIONS = 4  # before fewer pairs are evaluated


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run trains on, in which order: data, seed and options decide it, the number of ranks does not."""

    options: DPOOptions  # with a value for each automatic one
    pairs: TokenizedPairs
    reference: Tensor  # (N, 2) fp32
    train: list[int]  # pair numbers
    held_out: list[int]
    steps: list[list[list[Group]]]  # packs of each optimizer step
    evaluations: dict[int, list[list[Group]]]  # packs of held-out pairs, by the step after which they are evaluated
    stale: list[str]  # fields of the reference's key that are others here; see `make_plan`


def make_plan(options, world: World, *, elsewhere: bool = False, folders: Sequence[Path] | None = None) -> Plan:
    """Raises InputError unless pairs, reference logprobs and base model are all there and fit together. `elsewhere`:
    the reference may have been made on another machine or with other versions; `folders`: where tokens are looked for."""
    path = options.find("reference.safetensors")
    pairs, tokenizer, usable = map_pairs(options, world, folders)
    train, held_out = ([i for i in usable if pairs.is_eval[i] is flag] for flag in (False, True))
    require(world.size <= len(train), f"{options.run_dir}: {len(train)} training pairs cannot feed {world.size} ranks")
    members = world.on_main(lambda: plan_members(options, pairs, train))
    pack = packer(pairs, members)
    if not elsewhere:  # before files are hashed: what does not fit is refused in the first seconds
        has_begun = any(list_checkpoints(options.run_dir / "checkpoints"))
        options = world.on_main(lambda: settle_options(options, has_begun, pairs, members, world.machine(), pack))

    where = {"dtype": options.dtype, "device": world.device}
    key = world.on_main(lambda: reference_key(options.model, tokenizer, pairs, judge=options.read_judge(), **where))
    reference, stale = load_reference(path, key, len(pairs), elsewhere=elsewhere)
    missing = int(reference[usable].isnan().any(dim=1).sum())
    require(missing == 0, f"{path}: {missing} pairs have no reference logprob")

    steps = pack(options)
    return Plan(
        options=options, pairs=pairs, reference=reference, train=train, held_out=held_out, stale=stale, steps=steps,
        evaluations=plan_evaluations(pairs, held_out, steps, options),
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


def plan_evaluations(
    pairs: TokenizedPairs, held_out: list[int], steps: list[list[list[Group]]], options
) -> dict[int, list[list[Group]]]:
    """The packs of each evaluation, by the step after which it comes; none without held-out pairs.

    A sample of `eval_pairs`, drawn by the seed, every `eval_steps`; after the last step all of them. Steps that are asked for by
    number are taken at their word. Of those that are a share there are fewer where all is more than EVAL_SHARE, down to
    FEWEST_EVALUATIONS, and then fewer pairs."""
    if not held_out:
        return {}
    packs_of = partial(plan_packs, pairs, **of_pack(options))
    order = random.Random(f"{options.seed}:eval").sample(held_out, len(held_out))
    sample, last = packs_of(order[: options.eval_pairs]), packs_of(order)
    if options.eval_steps >= 1:
        after = range(int(options.eval_steps), len(steps), int(options.eval_steps))
        return dict.fromkeys(after, sample) | {len(steps): last}

    def within(packs: list[list[Group]], members: list[int], limit: float) -> list[list[Group]]:
        """The packs of members, or of as many of the first of them as take no more tokens."""
        while packs and num_tokens(pairs, packs) > limit:
            members = members[: len(members) * 9 // 10]
            packs = packs_of(members)
        return packs

    room = EVAL_SHARE / (1 - EVAL_SHARE) * 3 * sum(num_tokens(pairs, packs) for packs in steps)
    wanted = min(round(1 / options.eval_steps), len(steps))
    fewest = min(wanted, FEWEST_EVALUATIONS)
    sample = within(sample, order[: options.eval_pairs], room / fewest)
    last = within(last, order, room - (fewest - 1) * num_tokens(pairs, sample)) or packs_of(order[:1])
    fit = (room - num_tokens(pairs, last)) // num_tokens(pairs, sample) if sample else 0
    number = min(wanted, 1 + int(max(fit, 0)))
    return {len(steps) * i // number: sample for i in range(1, number)} | {len(steps): last}


def num_tokens(pairs: TokenizedPairs, packs: list[list[Group]]) -> int:
    return sum(group_tokens(pairs, group) for pack in packs for group in pack)


def evaluation_share(plan: Plan) -> float:
    """Of the run's time, by tokens."""
    trained = 3 * sum(num_tokens(plan.pairs, packs) for packs in plan.steps)
    evaluated = sum(num_tokens(plan.pairs, packs) for packs in plan.evaluations.values())
    return evaluated / (trained + evaluated)


def describe_evaluations(plan: Plan) -> str:
    """A line for who watches a run."""
    if not plan.evaluations:
        return "no pair is held out: nothing is evaluated"
    *earlier, last = plan.evaluations
    said = f"{len(pairs_of(plan.evaluations[last]))} of {len(plan.held_out)} held-out pairs are evaluated after step {last}"
    if earlier:
        said += f", and {len(pairs_of(plan.evaluations[earlier[0]]))} of them {len(earlier)} times before"
    return f"{said}: {evaluation_share(plan):.1%} of the run, by tokens"
