"""Takes steps of a run again, and compares what comes out."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from conj.data.options import require
from conj.data.progress import progress
from conj.model.weights import local_rows
from conj.train.audit.chain import Check
from conj.train.audit.compare import STEP_FIELDS, first_difference
from conj.train.audit.training import TrainedRun
from conj.train.checkpoint import check_checkpoint, list_checkpoints, load_checkpoint, read_tensors, training_state
from conj.train.dpo import batches_of, build_policy, train_step
from conj.train.optimizer import learning_rate_at
from conj.train.sharding import World

# Elsewhere than where a run was made, numbers round otherwise: relative to themselves for losses and norms, and for
# weights to the distance that the replayed steps moved them.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
MOVED_TOLERANCE = 0.1


def replay(run: TrainedRun, num_steps: int, world: World) -> Iterator[Check]:
    """Takes steps again from the latest start that reaches a checkpoint (a start is step 0 or a checkpoint), and
    compares each row of the log and the state at checkpoints: bit for bit here, within TOLERANCE elsewhere."""
    require(num_steps <= run.num_steps, f"--replay: expected at most {run.num_steps} steps, found {num_steps}")
    folder = run.options.find("model").with_name("checkpoints")
    saved = {check_checkpoint(path)["step"]: path for path in list_checkpoints(folder)}
    starts = [start for start in (0, *saved) if start + num_steps <= run.num_steps]
    reaching = [start for start in starts if any(start < step <= start + num_steps for step in saved)]
    start = max(reaching or starts)
    model, optimizer = build_policy(run.options, world)
    if start:
        load_checkpoint(saved[start], model, optimizer)
    before = {} if run.is_here else {name: t.clone() for name, t in training_state(model, optimizer).items()}
    differing, compared = [], 0
    steps = run.plan.steps[start : start + num_steps]
    batches = batches_of(run.plan.pairs, run.plan.reference, steps, world)
    numbers, tolerance = range(start + 1, start + num_steps + 1), TOLERANCE[run.options.dtype]
    for step in progress(numbers, desc="replay", unit="step", disable=not world.is_main):
        row, packs = run.log[step - 1], run.plan.steps[step - 1]
        lr = learning_rate_at(step - 1, run.num_steps, run.options)
        metrics = train_step(model, optimizer, run.plan.pairs, packs, batches, lr, run.options, world) | {"step": step}
        if name := first_difference(row, metrics, STEP_FIELDS, 0.0 if run.is_here else tolerance):
            differing.append(f"step {step}: {name}: expected {row.get(name)}, found {metrics[name]}")
        if step in saved:
            compared += 1
            if name := _first_moved(saved[step], model, optimizer, before, world):
                differing.append(f"step {step}: {name} differs from {saved[step].name}'s")
    how = "bit for bit" if run.is_here else f"within {tolerance:g}, since this is another machine or version"
    name = f"replay of steps {start + 1} to {start + num_steps}"
    found = f"{differing[0]} ({len(differing)} differences)" if differing else f"log and {compared} checkpoints {how}"
    yield Check(name, "BROKEN" if differing else "holds", found)


def _first_moved(path: Path, model: nn.Module, optimizer, before: dict, world: World) -> str | None:
    """The first tensor of the state that is not the checkpoint's: in any bit, or, if the state `before` the replay is
    given, by more than MOVED_TOLERANCE of the way that the checkpoint's went from there. Collective."""
    state = training_state(model, optimizer)
    rows = {name: local_rows(parameter) for name, parameter in model.named_parameters()}
    for key, whole in read_tensors(path):
        found, expected = state[key].cpu(), whole[rows[key.partition(".")[2]]]
        if before:
            way, off = (expected - before[key].cpu()).double().norm(), (found - expected).double().norm()
            same = bool(off <= MOVED_TOLERANCE * way)
        else:
            same = torch.equal(found, expected)
        if world.any(not same):
            return key
    return None
