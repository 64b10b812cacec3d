"""What fits the machine: automatic options of stage 6 and refusals, before weights load. Without torch.

A run's first start chooses what was left automatic, from the pairs, the number of ranks and the memory of a GPU: packs for
every rank; no recomputation if it fits, then selective, then full, then smaller packs; gathered weights kept from forward to
backward where there is room. The choice is written into the manifest, and later starts keep it on any number of ranks. On a
CPU nothing is recomputed. What cannot fit is refused, with what would.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence

from conj import InputError
from conj.data import manifest
from conj.data.options import require, unresolved
from conj.data.packs import Group, copies_tokens, plan_packs, plan_steps
from conj.data.tokens import TokenizedPairs
from conj.model.config import ModelConfig, read_config
from conj.train.advice import (
    Machine,
    count_reference,
    count_step,
    does_not_fit,
    flag_of,
    largest_of,
    largest_pack,
    too_large,
)
from conj.train.memory import (
    GIB,
    PackShape,
    disk_bytes,
    host_memory,
)
from conj.train.options import DPOOptions, ReferenceOptions

Pack = Callable[[DPOOptions], list[list[list[Group]]]]
LARGEST_PACK = 16384  # tokens: more gain nothing, a block's matmuls are long enough
SMALLEST_PACK = 1024
MOST_IDLE = 0.5  # of the ranks' turns
NOT_AUTOMATIC = {
    "activation_checkpointing": "none",
    "reshard_after_forward": True,
}  # where memory is not counted: on a CPU


def plan_members(options: DPOOptions, pairs: TokenizedPairs, train: list[int]) -> list[list[int]]:
    """The pair numbers of each step of a run, all epochs, from those that it trains on."""
    of_step = {"pairs_per_step": options.pairs_per_step, "share": options.share, "multiple": options.balanced_packs}
    seeds = [f"{options.seed}:{epoch}" for epoch in range(options.num_train_epochs)]
    return [step for seed in seeds for step in plan_steps(pairs, train, seed=seed, **of_step)][: options.max_steps]


def packer(pairs: TokenizedPairs, members: Sequence[Sequence[int]]) -> Pack:
    """What gives the packs of all steps under options. Asked for the same again it has them: they take seconds at 400,000 pairs."""
    planned = functools.lru_cache(1)(lambda **how: [plan_packs(pairs, step, **how) for step in members])
    return lambda options: planned(**of_pack(options))


def settle_options(
    options: DPOOptions, has_begun: bool, pairs: TokenizedPairs, members: Sequence[Sequence[int]], machine: Machine, pack: Pack
) -> DPOOptions:  # fmt: skip
    """The options as they were settled when the run began, or else as they suit the machine now. `members`: the pair numbers
    of each step; `pack`: their `packer`. Raises InputError for a run that does not fit, and for one that begins with most
    of the ranks idle."""
    made = find_recorded(options, has_begun)
    options = with_recorded(options, made)
    if made and made["complete"]:
        return options
    config = read_config(options.model)
    options = choose_options(options, pairs, members, config, machine, pack, can_change=not has_begun)
    if options.cpu_offload:
        check_host(config, machine, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if not has_begun:
        check_idle(options, pack(options), machine.num_ranks)
    return options


def find_recorded(options: DPOOptions, has_begun: bool = False) -> dict | None:
    """The manifest that says how automatic options were settled: the stage's own, if it is complete or `has_begun` to make
    anything; that of what it took from another run, or finds in those it builds on, if otherwise the options are the same."""
    [(artefact, inputs)] = options.makes().items()
    made = manifest.read_manifest(artefact)
    is_taken = made is not None and "taken_from" in made
    if made and not is_taken and (has_begun or made["complete"]):
        return made
    if not is_taken and not options.from_runs:
        return None
    now = manifest.describe(inputs, options)
    if is_taken and manifest.state(artefact, now) == "complete":
        return made
    there = manifest.find_complete(artefact.name, now, options)
    return there and manifest.read_manifest(there)


def with_recorded(options: DPOOptions, made: dict | None) -> DPOOptions:
    """The options with the automatic ones that are left open as a manifest has them. Raises InputError where one is given
    another value than a run began with: it would take the other's place in the manifest, and no later start would fit the
    checkpoints."""
    if made is None:
        return options
    recorded = {field.name: made["options"][field.name] for field in dataclasses.fields(options)
                if field.metadata["automatic"] and field.name in made["options"]}  # fmt: skip
    for name, value in recorded.items():
        given = getattr(options, name)
        require(
            made["complete"] or given in (None, value),
            f"{options.run_dir}: expected {flag_of(name, value)}, with which it began, or none, found {given}; to begin anew, "
            f"delete {options.run_dir / 'checkpoints'}",
        )
    return dataclasses.replace(options, **{name: recorded.get(name) for name in unresolved(options)})


def check_host(config: ModelConfig, machine: Machine, host_bytes: int, cpu_offload: bool = True) -> None:
    """Raises InputError where the memory of a machine's host is too small for stage 6."""
    host = host_memory(config, num_shards=machine.num_shards, num_local=machine.num_local, cpu_offload=cpu_offload)
    found = sum(host.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in host.items())
    advice = "; without --cpu-offload, on more GPUs, it is less" if cpu_offload else ""
    require(
        found <= host_bytes,
        f"stage 6: expected at most the {host_bytes / GIB:.1f} GiB of host memory that a machine has, found "
        f"{found / GIB:.1f} by count ({parts}){advice}",
    )


def of_pack(options: DPOOptions) -> dict:
    """The options that `plan_packs` takes."""
    return {"max_tokens": options.max_tokens_per_pack, "multiple": options.pack_multiple, "share": options.share}


def idle_turns(steps: Sequence[list], num_ranks: int) -> float:
    """The share of the ranks' turns that have no pack."""
    places = sum(-(-len(packs) // num_ranks) * num_ranks for packs in steps)
    return 1 - sum(map(len, steps)) / places


def check_idle(options: DPOOptions, steps: Sequence[list], num_ranks: int) -> None:
    """Raises InputError where more than half of the ranks' turns have no pack, with the option that gives them one."""
    idle = idle_turns(steps, num_ranks)
    better = f"--pack-multiple {num_ranks}"
    if options.pack_multiple % num_ranks == 0:
        better = f"--pairs-per-step of {num_ranks} or more, or at most {options.pairs_per_step} ranks"
    require(
        idle <= MOST_IDLE,
        f"expected work for {num_ranks} ranks, found {idle:.0%} of their turns without a pack; {better}",
    )


def choose_options(
    options: DPOOptions, pairs: TokenizedPairs, members: Sequence[Sequence[int]], config: ModelConfig, machine: Machine,
    pack: Pack, *, can_change: bool = True,
) -> DPOOptions:  # fmt: skip
    """The options with a value for each automatic one; `members` and `pack` as in `settle_options`.

    Raises InputError where nothing fits the machine, with what would; of a run that has begun (not `can_change`), that is
    more GPUs alone."""
    if options.pack_multiple is None:
        # In audit mode the same for 1, 2, 4 and 8 ranks: their bits are then the same, whichever number begins.
        of_any = options.audit_mode and options.balanced_packs % machine.num_ranks == 0
        multiple = options.balanced_packs if of_any else machine.num_ranks
        options = dataclasses.replace(options, pack_multiple=multiple)
    longest = max(pair_tokens(pairs, pair, options.share) for step in members for pair in step)
    if machine.gpu_bytes is None:
        chosen = NOT_AUTOMATIC | {"max_tokens_per_pack": max(LARGEST_PACK, longest)}
        return dataclasses.replace(options, **{k: v for k, v in chosen.items() if getattr(options, k) is None})

    @functools.cache
    def largest(size: int) -> tuple[PackShape, int]:
        steps = pack(dataclasses.replace(options, max_tokens_per_pack=size))
        return largest_pack(pairs, steps, config, machine.num_ranks)

    for trial in _candidates(options, pairs, members, longest):
        shape, num_turns = largest(trial.max_tokens_per_pack)
        if count_step(trial, config, shape, num_turns, machine).total <= machine.usable:
            kept = dataclasses.replace(trial, reshard_after_forward=False)
            if trial.reshard_after_forward is not None or machine.num_ranks == 1:  # one rank gathers nothing
                return trial
            fits = count_step(kept, config, shape, num_turns, machine).total <= machine.usable
            return kept if fits else dataclasses.replace(trial, reshard_after_forward=True)
    raise InputError(does_not_fit(trial, config, shape, num_turns, machine, can_change=can_change))


def _candidates(
    options: DPOOptions, pairs: TokenizedPairs, members: Sequence[Sequence[int]], longest: int
) -> Iterator[DPOOptions]:
    """What is automatic, in the order in which it is preferred. Packs lose a quarter each time, first while a prompt's pairs fit one, and
    only then, with full recomputation, down to the longest pair."""
    hows = (options.activation_checkpointing,)
    if hows == (None,):
        hows = ("none", "full") if options.kernels == "compile" else ("none", "selective", "full")
    sizes = [options.max_tokens_per_pack]
    if sizes == [None]:
        sizes = [max(LARGEST_PACK, longest)]
        while sizes[-1] > max(longest, SMALLEST_PACK):
            sizes.append(max(longest, SMALLEST_PACK, sizes[-1] * 3 // 4))
    whole = max(longest, *(prompt_tokens(pairs, step, options.share) for step in members))
    for how in hows:
        for size in (size for size in sizes if size >= whole or size == sizes[0]):
            yield dataclasses.replace(options, activation_checkpointing=how, max_tokens_per_pack=size)
    for size in (size for size in sizes if size < whole):
        yield dataclasses.replace(options, activation_checkpointing=hows[-1], max_tokens_per_pack=size)


def pair_tokens(pairs: TokenizedPairs, pair: int, share: str) -> int:
    """Tokens that a pair takes alone in a pack."""
    return copies_tokens(pairs, pair, share) + pairs.judgment_tokens[pair]


def prompt_tokens(pairs: TokenizedPairs, step: Sequence[int], share: str) -> int:
    """The most tokens that a prompt with all its pairs of the step takes."""
    if share != "prompt":
        return max(pair_tokens(pairs, pair, share) for pair in step)
    totals: dict[int, int] = {}
    for pair in step:
        prompt = pairs.prompt_of[pair]
        totals[prompt] = totals.get(prompt, pairs.prompt_tokens[prompt]) + pairs.judgment_tokens[pair]
    return max(totals.values())


def check_reference_fits(
    options: ReferenceOptions, pairs: TokenizedPairs, packs: list[list[Group]], config: ModelConfig, machine: Machine
) -> None:
    """Raises InputError where a pack of stage 5 does not fit a GPU, with the packs that would."""
    if machine.gpu_bytes is None or not packs:
        return
    shape = largest_of(pairs, [packs], config)
    sizes = [shape.tokens, *(size for size in (12288, 8192, 6144, 4096, 2048) if size < shape.tokens)]
    taken = {size: count_reference(options, config, shape.scaled(size), machine) for size in sizes}
    fitting = next((f"--max-tokens-per-pack {size}" for size in sizes if taken[size] <= machine.usable), "more GPUs")
    require(taken[shape.tokens] <= machine.usable, f"{too_large(5, taken[shape.tokens], machine)}; {fitting} would fit")


def describe_training(
    options: DPOOptions, pairs: TokenizedPairs, steps: Sequence[list], machine: Machine, *, config: ModelConfig | None = None,
    num_steps: int | None = None,
) -> str:  # fmt: skip
    """What a run of stage 6 will do and take, in a few lines: packs, ranks, memory, disk, by count. `num_steps` of a run of
    which `steps` are some."""
    config, num_packs = config or read_config(options.model), sum(map(len, steps)) / len(steps)
    shape, num_turns = largest_pack(pairs, steps, config, machine.num_ranks)
    idle = idle_turns(steps, machine.num_ranks)
    chosen = " ".join(
        flag_of(name, value)
        for name in ("max_tokens_per_pack", "pack_multiple", "activation_checkpointing", "reshard_after_forward")
        if (value := getattr(options, name)) is not None
    )
    ranks = f"{machine.num_ranks} rank{'s' if machine.num_ranks > 1 else ''}"
    lines = [
        f"{num_steps or len(steps)} steps of {options.pairs_per_step} pairs, {num_packs:.1f} packs a step, the largest of {shape.tokens} tokens; "
        f"{ranks}, {idle:.0%} of their turns without a pack",
        chosen,
    ]
    if machine.gpu_bytes is not None:
        found = count_step(options, config, shape, num_turns, machine)
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.parts.items() if size >= GIB / 20)
        lines.append(f"GPU {found.total / GIB:.1f} of {machine.usable / GIB:.1f} GiB ({parts}), by count")
    offload = options.cpu_offload
    host = host_memory(config, num_shards=machine.num_shards, num_local=machine.num_local, cpu_offload=offload)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in host.items())
    disk = disk_bytes(config, options.keep_checkpoints)
    lines.append(
        f"host {sum(host.values()) / GIB:.1f} GiB a machine ({parts}); disk {sum(disk.values()) / 1e9:.1f} GB, by count"
    )
    return "\n".join(f"{'stage 6' if i == 0 else '       '} {line}" for i, line in enumerate(lines))


def check_least(stage: str, options: DPOOptions | ReferenceOptions, machine: Machine) -> None:
    """Raises InputError for a stage that fits no GPU of the machine whatever the pairs are: even with the smallest pack."""
    config, shape = read_config(options.model), PackShape(tokens=256, predicted=64, keys=256)
    if stage == "reference":
        least = count_reference(options, config, shape, machine)
        require(
            least <= machine.usable, f"{too_large(5, least, machine)} with the smallest pack; more GPUs take less each"
        )
        return
    how = options.activation_checkpointing or "full"
    options = dataclasses.replace(options, activation_checkpointing=how, reshard_after_forward=True)
    if count_step(options, config, shape, 1, machine).total > machine.usable:
        raise InputError(does_not_fit(options, config, shape, 1, machine))
