"""What a stage takes of a GPU under its options, and what would fit one that is too small. Without torch."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conj.data.packs import Group
from conj.data.tokens import TokenizedPairs
from conj.model.config import ModelConfig, read_config
from conj.train.memory import GIB, Block, Memory, PackShape, pack_shape, reference_memory, step_memory, usable
from conj.train.options import DPOOptions, ReferenceOptions

WIDTHS = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What runs stages 5 and 6."""

    num_ranks: int
    num_local: int  # of them on one machine
    num_shards: int  # of them that hold one copy of the model together
    gpu_bytes: int | None = None  # of each rank's GPU; None on a CPU

    @property
    def usable(self) -> int:
        return usable(self.gpu_bytes, self.num_ranks)


def count_step(options: DPOOptions, config: ModelConfig, shape: PackShape, num_turns: int, machine: Machine) -> Memory:
    """A GPU's memory at the peak of a step, under these options."""
    return step_memory(
        config, shape, num_ranks=machine.num_ranks, num_shards=machine.num_shards, num_turns=num_turns, width=WIDTHS[options.dtype],
        activation_checkpointing=options.activation_checkpointing, audit_mode=options.audit_mode,
        cpu_offload=options.cpu_offload, reshard_after_forward=options.reshard_after_forward is not False,
    )  # fmt: skip


def count_reference(options: ReferenceOptions, config: ModelConfig, shape: PackShape, machine: Machine) -> int:
    return reference_memory(
        config, shape, num_ranks=machine.num_ranks, num_shards=machine.num_shards, width=WIDTHS[options.dtype]
    ).total


def largest_of(pairs: TokenizedPairs, steps: Sequence[list[list[Group]]], config: ModelConfig) -> PackShape:
    shapes = {pack_shape(pairs, pack) for packs in steps for pack in packs}
    return max(shapes, key=lambda shape: Block.of(config, shape, "none", 2).kept)


def largest_pack(
    pairs: TokenizedPairs, steps: Sequence[list[list[Group]]], config: ModelConfig, num_ranks: int
) -> tuple[PackShape, int]:
    """The pack that takes most memory, and the most packs that a rank has in a step."""
    return largest_of(pairs, steps, config), max(-(-len(packs) // num_ranks) for packs in steps)


def does_not_fit(
    options: DPOOptions,
    config: ModelConfig,
    shape: PackShape,
    num_turns: int,
    machine: Machine,
    *,
    can_change: bool = True,
) -> str:
    """One line: what stage 6 takes, what there is, and what would fit."""
    found = count_step(options, config, shape, num_turns, machine)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.parts.items() if size > GIB / 2)
    what_fits = advice(options, config, shape, num_turns, machine, can_change=can_change)
    return f"{too_large(6, found.total, machine)} ({parts}); {what_fits}"


def advice(
    options: DPOOptions, config: ModelConfig, shape: PackShape, num_turns: int, machine: Machine,
    *, can_change: bool = True, most: int | None = None,
) -> str:  # fmt: skip
    """The options that would fit, or take no more than `most` bytes, with what they take by count; else how many GPUs."""
    found, changes = [], _changes(options, shape) if can_change else [{"reshard_after_forward": True}]
    for change in changes:
        tokens = change.get("max_tokens_per_pack", shape.tokens)
        turns = num_turns if tokens == shape.tokens else 2
        total = count_step(dataclasses.replace(options, **change), config, shape.scaled(tokens), turns, machine).total
        if total <= min(machine.usable, most or machine.usable):
            given = " ".join(flag_of(name, value) for name, value in change.items())
            found.append(f"{given} takes {total / GIB:.1f} GiB")
    if found:
        return ", or ".join(found[:3])
    for num_ranks in (2**i for i in range(1, 11) if 2**i > machine.num_ranks):
        more = dataclasses.replace(machine, num_ranks=num_ranks, num_shards=num_ranks)
        how = (
            dataclasses.replace(options, activation_checkpointing="full", cpu_offload=False) if can_change else options
        )
        if (total := count_step(how, config, shape, num_turns, more).total) <= more.usable:
            with_what = " with --activation-checkpointing full" if can_change else ""
            return f"{num_ranks} such GPUs take {total / GIB:.1f} GiB each{with_what}"
    return "a smaller model"


def _changes(options: DPOOptions, shape: PackShape) -> Iterator[dict]:
    """What takes less memory, the cheapest first."""
    more = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[options.activation_checkpointing]
    if options.reshard_after_forward is False:
        yield {"reshard_after_forward": True}
    for how in more:
        if how != "selective" or options.kernels != "compile":
            yield {"activation_checkpointing": how}
    yield from (
        {"max_tokens_per_pack": shape.tokens * share // 8 // 256 * 256} for share in (6, 4, 3, 2) if shape.tokens > 2048
    )
    full = {"activation_checkpointing": "full"} if more else {}
    if shape.tokens > 2048:
        yield full | {"max_tokens_per_pack": shape.tokens // 4 // 256 * 256}
    if options.audit_mode:
        yield full | {"audit_mode": False}
    if not options.cpu_offload:
        yield full | {"cpu_offload": True}


def flag_of(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


def too_large(stage: int, found: int, machine: Machine) -> str:
    there = f"{machine.usable / GIB:.1f} GiB for it on a GPU of {machine.gpu_bytes / GIB:.1f}"
    return f"stage {stage}: expected at most {there}, found {found / GIB:.1f} by count"


def after_out_of_memory(
    options: DPOOptions, pairs: TokenizedPairs, steps: Sequence[list], machine: Machine, *, can_change: bool
) -> str:
    """What to give a run that fits by count, and did not at run time: a twentieth less than was counted at least."""
    config = read_config(options.model)
    shape, num_turns = largest_pack(pairs, steps, config, machine.num_ranks)
    counted = count_step(options, config, shape, num_turns, machine).total
    what_fits = advice(options, config, shape, num_turns, machine, can_change=can_change, most=counted * 19 // 20)
    return f"{counted / GIB:.1f} GiB by count; {what_fits}"
