"""What a run says while it trains: a row of `metrics.jsonl` a step, the same numbers to TensorBoard and others, the bar.

Names are TRL's, the same in every place; what is measured on held-out pairs is `eval/…`: a sample of
them, the same at each step but the last, where it is all that fit (`eval/num_pairs`). Beside the training's own numbers
(`loss`, `rewards/…` and `logps/…` are means over the step's pairs, `logps/…` in nats) a row has:

    epoch                passes over the training pairs so far, a fraction
    order                which pairs the step took, as a hash
    time                 when the row was written, in seconds since 1970
    flops_per_second     of all ranks: three forwards (backward is two), where a prompt that pairs share counts once;
                         what is computed again, as by activation checkpointing, does not count
    share_of_ceiling     the same beside matmuls of this dtype, timed on the main rank as the run starts, times the ranks
    peak_memory_bytes    of the main rank, since it started: allocated on its GPU, or resident on a CPU
    idle_share           of the ranks' time: what passes in waiting for a fuller pack, by tokens
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from conj.data.files import dump_line, recover_jsonl, write_jsonl
from conj.data.packs import Group, group_tokens, pairs_of
from conj.data.progress import progress
from conj.data.tokens import TokenizedPairs
from conj.model.config import ModelConfig, read_config
from conj.train.flops import idle_share, step_flops
from conj.train.options import DPOOptions
from conj.train.plan import Plan, describe_evaluations
from conj.train.sharding import World
from conj.train.speed import peak_memory_bytes, quick_ceiling

COLUMNS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")  # of each pair
# What of a row differs from run to run.
TIMES = {"time", "step_seconds", "pairs_per_second", "tokens_per_second", "flops_per_second", "share_of_ceiling"}
TIMES |= {"peak_memory_bytes"}
Sink = Callable[[dict[str, float], int], None]  # takes the numbers of a row, and the step


def summary(values: Tensor, pairs: TokenizedPairs, packs: list[list[Group]]) -> dict:
    """What a row says of the pairs of `packs`, from their `values` (P, len(COLUMNS)): means, accuracies (of each type of
    pair too), num_pairs, num_tokens; and not_finite_ids, if there are any."""
    members, margins = pairs_of(packs), values[:, 1] - values[:, 2]
    means = torch.column_stack([values, margins]).double().mean(dim=0).tolist()
    metrics = dict(zip((*COLUMNS, "rewards/margins"), means)) | {"rewards/accuracies": accuracy(margins)}
    types = [pairs.pair_types[i] for i in members] if pairs.pair_types else []
    for kind in sorted(set(types)):
        metrics[f"rewards/accuracies/{kind}"] = accuracy(margins[torch.tensor([t == kind for t in types])])
    metrics |= {"num_pairs": len(members), "num_tokens": sum(group_tokens(pairs, g) for pack in packs for g in pack)}
    not_finite = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
    return metrics | ({"not_finite_ids": sorted({pairs.ids[members[i]] for i in not_finite})} if not_finite else {})


def accuracy(margins: Tensor) -> float | None:  # (P,)
    """The share of pairs with a margin above 0. None while all of them are exactly 0: at step 1 the policy is the
    reference, and no pair is right or wrong yet."""
    return (margins > 0).double().mean().item() if (margins != 0).any() else None


def step_order(packs: list[list[Group]]) -> str:
    """A short hash of which pairs a step takes, pack by pack: what the log keeps of the order of the data."""
    return hashlib.sha256(repr([pairs_of([pack]) for pack in packs]).encode()).hexdigest()[:16]


def step_speed(
    pairs: TokenizedPairs, packs: list[list[Group]], metrics: dict, config: ModelConfig, ceiling: float, world: World
) -> dict:
    """How fast a step was, from its `step_seconds`, and on what; see the module's docstring."""
    done = {name: metrics[f"num_{name}"] for name in ("pairs", "tokens")}
    done["flops"] = 3 * sum(step_flops(pairs, packs, config))
    speed = {f"{name}_per_second": number / metrics["step_seconds"] for name, number in done.items()}
    return speed | {
        "share_of_ceiling": speed["flops_per_second"] / (ceiling * world.size), "num_ranks": world.size,
        "peak_memory_bytes": peak_memory_bytes(world.device.type), "idle_share": idle_share(pairs, packs, world.size),
    }  # fmt: skip


@contextmanager
def training_log(
    options: DPOOptions, plan: Plan, num_steps_done: int, identity: str, world: World
) -> Iterator[Callable[[int, dict], None]]:
    """Gives the function that takes a step's metrics, for `metrics.jsonl`, sinks and bar; on other ranks it does nothing.

    Rows past `num_steps_done`, which a killed run wrote after its last checkpoint, are dropped: they come again."""
    if not world.is_main:
        yield lambda step, metrics: None
        return
    print(describe_evaluations(plan))
    path = options.run_dir / "metrics.jsonl"
    write_jsonl(path, [row for row in recover_jsonl(path) if row["step"] <= num_steps_done])
    config, ceiling = read_config(options.model), quick_ceiling(world.device.type, options.dtype)
    steps_per_epoch = -(-len(plan.train) // options.pairs_per_step)
    with ExitStack() as opened:
        sinks = [opened.enter_context(open_sink(name, options, num_steps_done, identity)) for name in options.report_to]
        file = opened.enter_context(open(path, "a", encoding="utf-8"))
        bar = opened.enter_context(progress(total=len(plan.steps), desc="dpo", unit="step", initial=num_steps_done))

        def log(step: int, metrics: dict) -> None:
            speed = step_speed(plan.pairs, plan.steps[step - 1], metrics, config, ceiling, world)
            row = {"step": step, "epoch": step / steps_per_epoch, **metrics, **speed, "time": time.time()}
            file.write(dump_line(row))
            file.flush()
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            for sink in sinks:  # each of which has a step and a time of its own
                sink({name: value for name, value in numbers.items() if name not in ("step", "time")}, step)
            shown = {name: row[name] for name in ("loss", "rewards/margins", "rewards/accuracies")}
            short = {name.rpartition("/")[2]: "–" if v is None else f"{v:.3f}" for name, v in shown.items()}
            bar.set_postfix(short, refresh=False)
            bar.update()

        yield log


@contextmanager
def open_sink(name: str, options: DPOOptions, num_steps_done: int, identity: str) -> Iterator[Sink]:
    """TensorBoard's events in the run folder, or a run of wandb or trackio, which have the same functions.

    A resumed run goes on in the same one: named after its folder and identity, it is found again. What it repeats of steps
    after its last checkpoint is the same numbers."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        with SummaryWriter(options.run_dir / name, purge_step=num_steps_done + 1) as events:
            rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
            events.add_text("options", f"| option | value |\n|---|---|\n{rows}", num_steps_done)
            yield lambda numbers, step: [events.add_scalar(key, value, step) for key, value in numbers.items()]
        return
    sink, run = import_module(name), f"{options.run_dir.resolve().name}-{identity[:12]}"
    found_by = {"id": re.sub(r"[^\w-]", "-", run, flags=re.ASCII)} if name == "wandb" else {}  # trackio's: the name
    sink.init(project="conj", name=run, config=settings, resume="allow", **found_by)
    try:
        yield lambda numbers, step: sink.log(numbers, step=step)
    finally:
        sink.finish()
