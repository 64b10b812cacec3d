"""What a run will take, before it starts: memory, disk, packs, tokens, hours.

    conj plan skywork.toml
    conj plan skywork.toml --gpu-memory 79 --nproc-per-node 8 --train-tflops 400

It reads the data, the model's config.json and its tokenizer, and what the run folder holds so far; no weights. Before there
are pairs it takes the lengths of a sample of prompts, and assumes the rest, which it says. Memory is by count
(conj/train/memory.py). Hours are said where a rate is known: given, or that of the run's own files, or measured by `--probe`,
which takes a few rows through the stages here. A run that does not fit is refused with what would, exit code 2.
"""

import dataclasses
import statistics
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cyclopts import Group

from conj.data.files import stream_jsonl
from conj.data.hub import find_texts, name_of
from conj.data.judges import judge_prompt, load_judge
from conj.data.options import option, require, require_each, run_command
from conj.data.packs import plan_packs
from conj.data.preprocess import as_mapping, in_both_orders, load_prompts, read_prompts
from conj.data.prompts import question_of
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import PAIR_COLUMNS, TokenizedPairs, tokenize_pairs
from conj.model.config import ModelConfig, read_config
from conj.rates import Rates, find_rates, probe
from conj.settings import Run, check_file_options, resolve
from conj.train.advice import Machine, count_reference, largest_of
from conj.train.fit import (
    check_host,
    check_idle,
    check_reference_fits,
    choose_options,
    describe_training,
    packer,
    plan_members,
)
from conj.train.flops import step_flops
from conj.train.memory import GIB, Sizes
from conj.train.options import DPOOptions, choose_shard_size

NUM_SAMPLED = 512  # prompts whose tokens are counted
MOST_PLANNED = 4000  # prompts in the plan of what is not there yet; their steps stand for all
BYTES_A_TOKEN = 12  # of a row of judgments: its text and its token ids
PLAN = Group("The plan", sort_key=0)


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    gpu_memory: float | None = option(
        None,
        group=PLAN,
        help="GiB of each GPU, as nvidia-smi shows them (80 GB cards have 79); by default those that are here",
    )
    host_memory: float | None = option(
        None, group=PLAN, help="GiB of host memory of each machine; not compared if not given"
    )
    train_tflops: float | None = option(
        None,
        group=PLAN,
        help="TFLOP/s of each GPU in stages 5 and 6, what is computed again not counted; by default the run's own",
    )
    sample_tokens_per_second: float | None = option(
        None, group=PLAN, help="tokens that each GPU writes a second in stages 2, 3 and 7; by default the run's own"
    )
    num_prompts: int | None = option(
        None, group=PLAN, help="prompts of the data, to plan without it; with --prompt-tokens"
    )
    prompt_tokens: int | None = option(None, group=PLAN, help="tokens of each prompt, to plan without the data")
    pairs_per_prompt: float = option(4.0, group=PLAN, help="pairs that a prompt gives, while there is no pairs.jsonl")
    judgment_tokens: int | None = option(
        None,
        group=PLAN,
        help="tokens of a judgment, while there is no pairs.jsonl; half of what stage 2 may write if not given",
    )
    probe: int | None = option(
        None, group=PLAN, help="rows of the data to take through stages 1 to 6 here, for their rates"
    )

    def __post_init__(self):
        super().__post_init__()
        above_0 = ("gpu_memory", "host_memory", "train_tflops", "sample_tokens_per_second", "pairs_per_prompt")
        above_0 += ("num_prompts", "prompt_tokens", "judgment_tokens", "probe")
        require_each(self, above_0, lambda value: value > 0, "more than 0")
        both = (self.num_prompts is None) == (self.prompt_tokens is None)
        require(both, "--num-prompts, --prompt-tokens: expected both, found one")


def plan_options() -> type:
    """The options of `conj plan`: those of `conj check`, the machine, rates and assumptions."""
    bases = (MachineOptions, check_file_options())
    return dataclasses.make_dataclass("PlanOptions", [], bases=bases, frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the stages have to do: read from the run's files, or assumed."""

    num_prompts: int
    prompt_tokens: float  # on average
    judgment_tokens: float
    pairs: TokenizedPairs
    share: float  # of the run's pairs that `pairs` holds
    notes: list[str]


def read_workload(run: Run, given, tokenizer: JudgeTokenizer, config: ModelConfig) -> Workload:
    """The run's pairs, or pairs as they can be expected of its data."""
    some = next(iter(run.options.values()))
    prompts_file, pairs_file = some.find("prompts.jsonl"), some.find("pairs.jsonl")
    if given.num_prompts:
        number, lengths = given.num_prompts, [given.prompt_tokens]
        notes = [f"assumed: {number} prompts of {given.prompt_tokens} tokens"]
    else:
        rows, source = read_rows(run, prompts_file)
        sample = rows[:: -(-len(rows) // NUM_SAMPLED)]
        judge = load_judge(next((made.judge for made in run.options.values() if hasattr(made, "judge")), "con-j"))
        messages = [judge_prompt(judge, question_of(row), row["answer_1"], row["answer_2"]) for row in sample]
        number, lengths = len(rows), [len(tokenizer.prompt_ids(one)) for one in messages]
        notes = [f"{number} prompts of {source}; tokens of {len(lengths)} of them"]
    if pairs_file.exists() and not given.num_prompts:
        rows = (row for _, row in stream_jsonl(pairs_file, PAIR_COLUMNS))
        pairs = tokenize_pairs(rows, tokenizer, config.vocab_size)
        judgment = statistics.fmean(len(ids) for pair in pairs.judgments for ids in pair)
        share = 1.0
        notes.append(f"{len(pairs)} pairs of {pairs_file}")
    else:
        judgment = given.judgment_tokens or getattr(run.options.get("repeated"), "max_new_tokens", 0) // 2
        require(
            judgment > 0, "--judgment-tokens: expected a number, as there is no stage 2 to take it from, found none"
        )
        planned = min(number, MOST_PLANNED)
        pairs, share = (expected_pairs(lengths, planned, given.pairs_per_prompt, judgment, run), planned / number)
        notes.append(f"assumed: {given.pairs_per_prompt:g} pairs a prompt, {judgment} tokens a judgment")
    return Workload(
        num_prompts=number, prompt_tokens=statistics.fmean(lengths), judgment_tokens=judgment, pairs=pairs,
        share=share, notes=notes,
    )  # fmt: skip


def read_rows(run: Run, prompts_file: Path) -> tuple[list[dict], str]:
    """The run's prompts, made already or as stage 1 would make them, and where they are from."""
    if prompts_file.exists():
        return read_prompts(prompts_file), str(prompts_file)
    asked = run.options.get("preprocess")
    require(asked is not None, f"{prompts_file}: no such file; make it by its stage first")
    columns = as_mapping(asked.columns)  # what --exclude takes out is little, and may be on the hub
    rows = load_prompts(asked.data, asked.seed, asked.subsets, asked.limit, columns=columns)[0]
    return list(in_both_orders(rows)) if asked.both_orders else rows, " ".join(asked.data)


def expected_pairs(
    lengths: Sequence[int], num_prompts: int, pairs_per_prompt: float, judgment: int, run: Run
) -> TokenizedPairs:
    """Pairs of prompts with these lengths in turns, each as many as the mean rounds to, all judgments of one length."""
    prompts = [array("i", [0]) * length for length in lengths]
    prompts = [prompts[i % len(prompts)] for i in range(num_prompts)]
    counts = [int((i + 1) * pairs_per_prompt) - int(i * pairs_per_prompt) for i in range(num_prompts)]
    require(
        any(counts),
        f"--pairs-per-prompt {pairs_per_prompt:g}: expected a pair at least, found none of {num_prompts} prompts",
    )
    prompt_of = [i for i, count in enumerate(counts) for _ in range(count)]
    ids = array("i", [0]) * max(judgment, 2)
    num_held_out = round(getattr(run.options.get("pairs"), "eval_fraction", 0.0) * num_prompts)
    return TokenizedPairs(
        ids=[str(i) for i in prompt_of], is_eval=[i < num_held_out for i in prompt_of], prompts=prompts,
        prompt_of=prompt_of, judgments=[(ids, ids)] * len(prompt_of),
    )  # fmt: skip


# ---- The text ----


def hours(amount: float, rate: float | None, num_gpus: int) -> str:
    """`, 3.1 hours` for what a rate is known of, else nothing."""
    return f", {amount / rate / num_gpus / 3600:.1f} hours" if rate else ""


def training_steps(options: DPOOptions, pairs: TokenizedPairs, max_length: int) -> tuple[list[list[int]], list[int]]:
    """The pair numbers of each step of the run, and all that are within the length."""
    usable = pairs.within(max_length)
    train = [i for i in usable if not pairs.is_eval[i]]
    require(bool(train), "expected pairs to train on, found none within --max-length")
    return plan_members(options, pairs, train), usable


def plan_run(run: Run, given, machine: Machine) -> None:
    """Prints what a run will take. Raises InputError where a stage does not fit the machine."""
    model = find_texts(run.options["dpo"].model)
    config, tokenizer = read_config(model), JudgeTokenizer.load(model)
    work, size = read_workload(run, given, tokenizer, config), Sizes.of(config).all
    rates = find_rates(given, run.folder, machine.num_ranks)
    if given.probe:
        train, sample = probe(run, given.probe)
        rates = Rates(train_flops=train, sample_tokens=sample, source=f"a probe of {given.probe} rows")
    gpus = (
        f"{machine.num_ranks} GPU{'s' * (machine.num_ranks > 1)} of {machine.gpu_bytes / GIB:.1f} GiB"
        if machine.gpu_bytes
        else f"{machine.num_ranks} CPU process{'es' * (machine.num_ranks > 1)}"
    )
    print(f"{run.folder}: {name_of(model)}, {size / 1e9:.2f} billion parameters, on {gpus}")
    print("\n".join(f"        {note}" for note in work.notes))
    if rates.train_flops or rates.sample_tokens:
        known = [f"{rates.train_flops / 1e12:.4g} TFLOP/s in training" if rates.train_flops else "",
                 f"{rates.sample_tokens:.4g} tokens/s written" if rates.sample_tokens else ""]  # fmt: skip
        print(f"        rates of a GPU, {rates.source}: {', '.join(filter(None, known))}")
    print_sampling(run, work, rates, machine.num_ranks)
    print_training(run, work, config, rates, machine, given.host_memory)
    print("stage 7 and the evaluation while training are not counted")


def print_sampling(run: Run, work: Workload, rates: Rates, num_gpus: int) -> None:
    """Judgments, tokens and hours of stages 2 and 3, and what they leave on the disk."""
    disk = 0.0
    for stage, number in (("repeated", 2), ("hinted", 3)):
        if (options := run.options.get(stage)) is None:
            continue
        judgments = work.num_prompts * getattr(options, "num_samples", 2)
        written = judgments * work.judgment_tokens
        disk += written * BYTES_A_TOKEN
        by = hours(written, rates.sample_tokens, num_gpus)
        by = f", by {options.api_model} behind an endpoint" if options.api_model else by
        print(f"stage {number} {judgments:,} judgments, {written / 1e6:,.1f} million tokens written, prompts of "
              f"{work.prompt_tokens:.0f} tokens{by}")  # fmt: skip
    if disk:
        print(f"        disk {disk / 1e9:.1f} GB of judgments")


def print_training(
    run: Run, work: Workload, config: ModelConfig, rates: Rates, machine: Machine, host_gib: float | None
) -> None:
    """Stages 5 and 6: memory, packs, FLOPs, hours. Raises InputError where they do not fit."""
    pairs, reference, options = work.pairs, run.options.get("reference"), run.options["dpo"]
    members, usable = training_steps(options, pairs, min(options.max_length, config.max_position_embeddings))
    if reference is not None:
        packs = plan_packs(pairs, usable, max_tokens=reference.max_tokens_per_pack, share="prompt")
        check_reference_fits(reference, pairs, packs, config, machine)
        flops = sum(step_flops(pairs, packs, config)) / work.share
        taken = ""
        if machine.gpu_bytes is not None:
            found = count_reference(reference, config, largest_of(pairs, [packs], config), machine)
            taken = f"; GPU {found / GIB:.1f} of {machine.usable / GIB:.1f} GiB, by count"
        print(f"stage 5 {len(packs) / work.share:.0f} packs, {flops / 1e15:,.0f} PFLOP"
              f"{hours(flops, rates.train_flops, machine.num_ranks)}{taken}")  # fmt: skip
    pack = packer(pairs, members)
    options = choose_options(options, pairs, members, config, machine, pack)
    steps = pack(options)
    check_idle(options, steps, machine.num_ranks)
    num_steps = len(steps) if work.share == 1 else min(round(len(steps) / work.share), options.max_steps or sys.maxsize)
    print(describe_training(options, pairs, steps, machine, config=config, num_steps=num_steps))
    flops = 3 * sum(sum(step_flops(pairs, packs, config)) for packs in steps) * num_steps / len(steps)
    print(
        f"        {flops / 1e15:,.0f} PFLOP, what is computed again not counted{hours(flops, rates.train_flops, machine.num_ranks)}"
    )
    if host_gib is not None:
        check_host(config, machine, int(host_gib * GIB), options.cpu_offload)


def machine_of(given, run: Run) -> Machine:
    """The GPUs that are given, or those that are here; none where training is asked to stay on the CPU."""
    options, size = run.options["dpo"], given.gpu_memory and int(given.gpu_memory * GIB)
    if options.device == "cpu":
        size = None
    elif size is None:
        import torch

        size = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    num_shards = choose_shard_size(options.dp_shard_size, run.num_ranks, run.num_processes)
    return Machine(num_ranks=run.num_ranks, num_local=run.num_processes, num_shards=num_shards, gpu_bytes=size)


def main(given) -> None:
    for run in resolve(given):
        require("dpo" in run.options, "stages: expected dpo among them, found none to plan")
        plan_run(run, given, machine_of(given, run))


if __name__ == "__main__":
    run_command(main, plan_options(), __doc__)
