"""Can this run be trusted, and can it be repeated? Checks a run folder from the raw data to the exported weights.

    python -m conj.train.audit --run runs/demo
    python -m conj.train.audit --run runs/demo --replay 20 --reference
    python -m conj.train.audit --run runs/demo --against runs/other

Always: every file is what its manifest says and was made from what stands before it; then the reference's key, the
exactness of step 0, the order of the data, and that the exported weights are the last checkpoint's. `--replay` takes
steps again and compares, `--reference` has `transformers` compute a sample, `--against` finds where two runs part.
Prints a line a check, writes them to `audit.json` in the run folder, and exits with 1 if one does not hold. What cannot
be checked here (files that are elsewhere, another device) is listed as such and is no failure.
"""

import functools
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from conj import InputError
from conj.data.files import read_jsonl, write_atomic
from conj.data.manifest import ARTEFACTS, hash_input, list_artefacts, manifest_path, read_manifest
from conj.data.options import option, require, require_each, run_command
from conj.data.packs import plan_packs
from conj.model import backends
from conj.model.weights import local_rows, weight_files
from conj.train.checkpoint import check_checkpoint, list_checkpoints, load_checkpoint, read_tensors, training_state
from conj.train.compare import STEP_FIELDS, compare_runs, first_difference
from conj.train.dpo import DPOOptions, batches_of, build_policy, select_arithmetic, step_order, train_step
from conj.train.optimizer import learning_rate_at
from conj.train.plan import Plan, make_plan
from conj.train.reference import check_reference
from conj.train.second_opinion import second_opinion
from conj.train.sharding import World, build_sharded_model, distributed, ending_process

# Elsewhere than where a run was made, numbers round otherwise: relative to themselves for losses and norms, and for
# weights to the distance that the replayed steps moved them.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
MOVED_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    run: Path = option(help="run folder; audit.json is written there")
    model: Path | None = option(None, help="base model; by default the folder that the run's manifest names")
    device: Literal[backends.DEVICES] = option("auto", help="auto: a GPU if one is visible")
    num_pairs: int = option(64, help="pairs whose logprobs are computed again for step 0 and --reference")
    replay: int | None = option(None, help="optimizer steps to take again and compare")
    reference: bool = option(False, help="have transformers compute logprobs and losses of the pairs, more precisely")
    against: Path | None = option(None, help="another run folder; find where the two part")
    seed: int = option(0, help="seed of the choice of pairs")

    def __post_init__(self):
        require_each(self, ("num_pairs", "replay"), lambda value: value >= 1, "1 or more")


class Check(NamedTuple):
    name: str
    outcome: Literal["holds", "BROKEN", "unchecked"]
    found: str


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trained run as its manifest and its log tell it, and what it was trained on."""

    options: DPOOptions
    num_steps: int
    plan: Plan
    log: list[dict]  # rows of metrics.jsonl
    is_here: bool  # made by these versions on such a machine: its bits can be had again


def check_chain(run: Path, base: Path | None) -> list[Check]:
    """Every artefact against its manifest, and every manifest against those of its inputs, in the order of the stages."""
    artefacts = list_artefacts(run)
    require(bool(artefacts), f"{run}: expected a run folder with manifests, found none")
    # Prompts and pairs may be one's own; nothing else comes without a manifest.
    made_here = [run / name for name in ARTEFACTS if name not in ("prompts.jsonl", "pairs.jsonl")]
    artefacts += [artefact for artefact in made_here if artefact.exists() and artefact not in artefacts]
    # The run and its base may have been moved since.
    here = {artefact.name: artefact for artefact in artefacts}
    recorded_base = _recorded_base(run)
    sha256 = functools.cache(hash_input)

    def find(path: Path) -> Path:
        if path.name in here and path.parent.name == run.resolve().name:
            return here[path.name]
        return base if base is not None and str(path) == recorded_base else path

    def check(artefact: Path) -> str:
        made = read_manifest(artefact)
        require(made is not None, "has no manifest")
        require(made["complete"], "was cut short; run its stage again to finish it")
        away = []
        for name, expected in ({artefact.name: made["sha256"]} | made.get("also", {})).items():
            if Path(name).parts[0] == "checkpoints" and not (run / name).parent.exists():
                away.append(name)  # deleted, as a whole: it takes three times the model's room
                continue
            require((run / name).exists(), f"{name} is missing")
            require(sha256(run / name) == expected, f"{name} was changed: its sha256 is not the manifest's")
        for entry in made["inputs"]:
            path = find(Path(entry["path"]))
            if entry["sha256"] is None or not path.exists():
                away.append(entry["path"])
            elif sha256(path) != entry["sha256"]:
                raise InputError(f"was made from another {path} than the one that stands there now")
        num_rows = len(read_jsonl(artefact)) if artefact.suffix == ".jsonl" else made["num_rows"]
        require(num_rows == made["num_rows"], f"expected {made['num_rows']} rows, found {num_rows}")
        not_here = f"; not here, so not compared: {', '.join(away)}" if away else ""
        return f"{num_rows} rows, sha256 {made['sha256'][:12]}{not_here}"

    checks = [_check(artefact.name, lambda artefact=artefact: check(artefact)) for artefact in artefacts]
    for path in reversed(list_checkpoints(run / "checkpoints")):
        checks.append(_check(f"checkpoints/{path.name}", lambda path=path: f"step {check_checkpoint(path)['step']}"))
    return checks


def _check(name: str, check: Callable[[], str]) -> Check:
    """What `check` returns is what it found; an InputError is a break."""
    try:
        return Check(name, "holds", check())
    except (InputError, OSError) as e:
        return Check(name, "BROKEN", str(e))


def _recorded_base(run: Path) -> str | None:
    """The base model's folder as the run's manifests name it: the last input of the training stages."""
    for name in ("model", "reference.safetensors"):
        with suppress(InputError):  # found by the check of that artefact
            if made := read_manifest(run / name):
                return made["inputs"][-1]["path"]
    return None


def _base(options: AuditOptions) -> Path:
    return options.model or Path(_recorded_base(options.run))


def read_run(options: AuditOptions, world: World) -> TrainedRun:
    """Options, plan and log of a finished run. Raises InputError when pairs, reference and base do not fit together."""
    made = read_manifest(options.run / "model")
    try:
        trained = DPOOptions(run=options.run, model=_base(options), **made["options"])
    except TypeError as e:
        raise InputError(f"{manifest_path(options.run / 'model')}: options of another version of conj: {e}") from None
    select_arithmetic(trained, world.device)
    plan = make_plan(trained, world, elsewhere=True)
    log = read_jsonl(options.run / "metrics.jsonl", {"step": int, "order": str, "num_ranks": int})
    here, there = world.describe(), made["machine"]
    if trained.audit_mode:
        is_here = here["device"] == there["device"]
    else:
        is_here = here == there and {row["num_ranks"] for row in log} == {world.size}
    return TrainedRun(
        options=trained, num_steps=made["num_rows"], plan=plan, log=log, is_here=is_here and not plan.stale
    )


def check_run(run: TrainedRun, options: AuditOptions, world: World) -> Iterator[Check]:
    """The reference's key, step 0, the order of the data, and the exported weights."""
    stale = run.plan.stale
    fields = f"; made elsewhere: another {', '.join(stale)}" if stale else ""
    yield Check("reference key", "holds", f"weights, config, tokenizer, tokens and dtype are those of the base{fields}")

    yield _check("step 0", lambda: check_step_0(run, options, world))
    yield _check("data order", lambda: check_order(run))
    newest = next(iter(list_checkpoints(options.run / "checkpoints")), None)
    if newest is None or check_checkpoint(newest)["step"] != run.num_steps:
        yield Check("exported weights", "unchecked", f"the checkpoint of step {run.num_steps} is not there any more")
    else:
        yield _check("exported weights", lambda: check_export(options.run / "model", newest))


def check_step_0(run: TrainedRun, options: AuditOptions, world: World) -> str:
    """The base model, in packs of the training, gives the stored logprobs: every margin starts at 0."""
    exact, sample = run.is_here and world.device.type == "cpu", draw_pairs(run, options)
    packs = plan_packs(run.plan.pairs, sample, max_tokens=run.options.max_tokens_per_pack, share=run.options.share)
    model = build_sharded_model(run.options.model, world, run.options.dtype)
    check_reference(model, run.plan.pairs, run.plan.reference, packs, world, run.options.dtype, exact=exact)
    margin = run.log[0]["margin"]
    require(margin == 0 or not exact, f"metrics.jsonl: step 1: expected a margin of 0, found {margin}")
    return f"{len(sample)} pairs have the stored logprobs {'bit for bit' if exact else 'within rounding'}"


def draw_pairs(run: TrainedRun, options: AuditOptions) -> list[int]:
    usable = run.plan.train + run.plan.held_out
    return sorted(random.Random(options.seed).sample(usable, min(options.num_pairs, len(usable))))


def check_order(run: TrainedRun) -> str:
    """Each step of the log took the pairs that the seed gives it, at the learning rate of the schedule."""
    steps = run.plan.steps
    require(
        len(steps) == run.num_steps == len(run.log), f"expected {len(steps)} steps, found {len(run.log)} in the log"
    )
    for number, (packs, row) in enumerate(zip(steps, run.log), 1):
        expected = {"step": number, "order": step_order(packs)}
        expected["lr"] = learning_rate_at(number - 1, len(steps), run.options)
        if name := first_difference(expected, row, tuple(expected)):
            raise InputError(
                f"metrics.jsonl:{number}: step {number}: {name}: expected {expected[name]} by seed and options, "
                f"found {row.get(name)}"
            )
    return f"{len(steps)} steps follow from seed {run.options.seed}"


def check_export(model: Path, checkpoint: Path) -> str:
    """The weights in model/ are the last checkpoint's, in the model's dtype, bit for bit."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(model)]
        exported = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (an open file, not a dict)
        for key, tensor in read_tensors(checkpoint):
            kind, _, name = key.partition(".")
            if kind == "weight":
                require(name in exported, f"model/: {name} is missing")
                found = exported[name].get_tensor(name)
                require(torch.equal(tensor.to(found.dtype), found), f"model/: {name} is not {checkpoint.name}'s")
    return f"model/ is {checkpoint.name} in {str(found.dtype).removeprefix('torch.')}, bit for bit"


def replay(run: TrainedRun, folder: Path, num_steps: int, world: World) -> Iterator[Check]:
    """Takes steps again from the latest start that reaches a checkpoint (a start is step 0 or a checkpoint), and
    compares each row of the log and the state at checkpoints: bit for bit here, within TOLERANCE elsewhere."""
    require(num_steps <= run.num_steps, f"--replay: expected at most {run.num_steps} steps, found {num_steps}")
    saved = {check_checkpoint(path)["step"]: path for path in list_checkpoints(folder / "checkpoints")}
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
    for step in tqdm(range(start + 1, start + num_steps + 1), desc="replay", unit="step", disable=not world.is_main):
        row, packs = run.log[step - 1], run.plan.steps[step - 1]
        lr = learning_rate_at(step - 1, run.num_steps, run.options)
        metrics = train_step(model, optimizer, run.plan.pairs, packs, batches, lr, run.options, world)
        metrics["step"] = step
        tolerance = 0.0 if run.is_here else TOLERANCE[run.options.dtype]
        if name := first_difference(row, metrics, STEP_FIELDS, tolerance):
            differing.append(f"step {step}: {name}: expected {row.get(name)}, found {metrics[name]}")
        if step in saved:
            compared += 1
            if name := _first_moved(saved[step], model, optimizer, before, world):
                differing.append(f"step {step}: {name} differs from {saved[step].name}'s")
    how = (
        "bit for bit"
        if run.is_here
        else f"within {TOLERANCE[run.options.dtype]:g}, since this is another machine or version"
    )
    name = f"replay of steps {start + 1} to {start + num_steps}"
    found = (
        differing[0] + f" ({len(differing)} differences)" if differing else (f"log and {compared} checkpoints {how}")
    )
    yield Check(name, "BROKEN" if differing else "holds", found)


def _first_moved(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, before: dict, world: World
) -> str | None:
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


def report(checks: list[Check], run: Path) -> bool:
    """Prints a line a check and writes `audit.json`. Returns whether nothing is broken."""
    broken = [check for check in checks if check.outcome == "BROKEN"]
    for check in checks:
        print(f"{check.outcome:9}  {check.name}: {check.found}")
    content = {"holds": not broken, "first_broken": broken[0].name if broken else None}
    content["checks"] = [check._asdict() for check in checks]
    write_atomic(run / "audit.json", (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())
    if broken:
        print(f"first broken link: {broken[0].name}: {broken[0].found}")
    return not broken


def main(options: AuditOptions) -> None:
    """The checks in the order of the chain; those that run the model come last, and only on a chain that holds."""
    with distributed(options.device) as world:
        checks = world.on_main(lambda: check_chain(options.run, options.model))
        holds = all(check.outcome == "holds" for check in checks)
        why = "the chain is broken" if not holds else "there is no trained model yet"
        if holds and (options.run / "model").exists() and not _base(options).is_dir():
            holds, why = False, f"the base model {_base(options)} is not there; name its folder with --model"
        if holds and (options.run / "model").exists():
            try:
                run = read_run(options, world)
            except InputError as e:
                checks.append(Check("reference key", "BROKEN", str(e)))
            else:
                checks += check_run(run, options, world)
                if options.replay:
                    checks += replay(run, options.run, options.replay, world)
                if options.reference:
                    opinion = second_opinion(run.options, run.plan, draw_pairs(run, options), world)
                    checks += [Check(name, "holds" if holds else "BROKEN", found) for name, holds, found in opinion]
        else:
            checks.append(Check("training", "unchecked", why))
        if options.against:
            for name, same, found in world.on_main(lambda: list(compare_runs(options.run, options.against))):
                checks.append(Check(f"against {options.against}: {name}", "holds" if same else "BROKEN", found))
        sound = world.on_main(lambda: report(checks, options.run))
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    with ending_process():
        run_command(main, AuditOptions, __doc__)
