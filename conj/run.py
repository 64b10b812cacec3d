"""A whole run, or a sweep of runs, from one file of settings.

    conj run demo/demo.toml
    conj run mine.toml --run-dir runs/mine --dpo.learning-rate 1e-6
    conj run mine.toml --dry-run

The file is described in conj/settings.py. The runs of a sweep take from those before them what is the same, so what they
share is made once; in the end one report shows all of them.

All of it is checked before the first stage starts: settings, data, the model folder, and whether what stands in the run
folder was made with them. Complete stages are skipped, and a run that was killed goes on where it stopped: give the same
line again. The resolved settings are written to `settings.toml` in the run folder, which is such a file as well.
"""

import dataclasses
import functools
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tomli_w

from conj import InputError
from conj.data import manifest
from conj.data.benchmarks import locate_data
from conj.data.card import write_card
from conj.data.files import write_atomic
from conj.data.options import flag, require, run_command
from conj.data.readers import read_rows
from conj.model.folder import check_model
from conj.settings import COMMANDS, Run, as_toml, resolve, run_file_options
from conj.train.options import check_machine

ON_ALL_RANKS = ("reference", "dpo")  # under torchrun
SAME_IN_TRAINING = ("dtype", "attention", "kernels", "model")  # a stored reference is of one forward pass
SAME_IN_A_SWEEP = ("data", "subsets", "limit", "seed", "num_resamples")  # of the evaluation: the runs are compared
# On a CPU, threads that spin while they wait lose a factor of ten as soon as another process wants a core.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def check(runs: list[Run]) -> None:
    """Raises InputError for data, model folders and devices that cannot be used, and for stages that do not fit together,
    before hours go into what comes before them."""
    stages = [(stage, options) for run in runs for stage, options in run.options.items()]
    for folder in (run.folder for run in runs):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        require(there.is_dir() and os.access(there, os.W_OK), f"{folder}: expected a folder that can be written")
    for name in SAME_IN_A_SWEEP:
        found = {str(getattr(options, name)): None for stage, options in stages if stage == "evaluate"}
        require(
            len(found) < 2, f"[evaluate] {name}: expected the same in all runs of a sweep, found {', '.join(found)}"
        )
    for run in (run for run in runs if run.options.keys() >= set(ON_ALL_RANKS)):
        for name in SAME_IN_TRAINING:
            first, second = (str(getattr(run.options[stage], name)) for stage in ON_ALL_RANKS)
            require(first == second, f"[dpo] {name}: expected {first}, as in [reference], found {second}")
    for name in {name: None for _, options in stages for name in getattr(options, "data", ())}:
        read_rows(locate_data(name)[0])  # nothing is read before the first row is asked for
    asked = [options for _, options in stages if hasattr(options, "model")]
    # Training takes what fits the model; a sampler that is asked for more refuses.
    for model, most in {(o.model, o.max_length if hasattr(o, "max_new_tokens") else None): None for o in asked}:
        check_model(model, most)
    if trained := [(stage, options) for stage, options in stages if stage in ON_ALL_RANKS]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(check_machine, trained, runs[0].num_processes).result()


def survey(runs: list[Run]) -> dict[Path, str]:
    """What is the case of each file that the stages make: `complete`, `unfinished`, `to do`, `taken from` another run, or
    `stale` and why. Nothing is written."""
    found, made_by, hash_once = {}, {}, functools.cache(manifest.hash_input)
    for run in runs:
        keys, places = {}, {}  # of the run's files, by name: by what settings they are made; where they lie, if they do
        for options in run.options.values():
            for artefact, inputs in options.makes().items():
                base = getattr(options, "model", None)
                inputs = [places.get(p.name, p) if isinstance(p, Path) and p != base else p for p in inputs]
                made_of = [keys.get(p.name, str(p)) if isinstance(p, Path) else p for p in inputs]
                key = keys[artefact.name] = repr((artefact.name, manifest.describe_options(options), made_of))
                first = made_by.setdefault(key, run)
                state, place = _state(options, artefact, inputs, hash_once)
                if state == "to do" and first is not run:
                    state = f"taken from {first.folder}"
                found[artefact], places[artefact.name] = state, place
    return found


def _state(options, artefact: Path, inputs: list, hash: Callable) -> tuple[str, Path]:
    """The case of one file, and where it lies; where it is still to be made, a path at which nothing is."""
    nowhere = artefact.with_name(f"{artefact.name} to be made")
    try:
        if awaited := [path for path in inputs if isinstance(path, Path) and not path.exists()]:
            made = manifest.read_manifest(artefact)
            if artefact.exists() and made is not None:
                raise InputError(
                    f"{artefact}: was made from another {awaited[0].name} than will be made now; delete it"
                )
            return "to do", nowhere
        now = manifest.describe(inputs, options, hash)
        state = manifest.state(artefact, now)
        if state == "to do" and (there := manifest.find_complete(artefact.name, now, options)):
            return f"taken from {there.parent}", there
        return state, manifest.locate(artefact) if state == "complete" else nowhere
    except InputError as e:
        return f"stale: {e}", artefact


def command_line(stage: str, options, num_processes: int) -> list[str]:
    """The stage as a command: every option that is not its default."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    launch = launch if stage in ON_ALL_RANKS and num_processes > 1 else []
    line = [sys.executable, *launch, "-m", COMMANDS[stage].module]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or value is None:
            continue
        if isinstance(value, bool):
            line.append(flag(field) if value else flag(field).replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            line += [f"{flag(field)}={part}" for part in value]
        else:
            line.append(f"{flag(field)}={value}")
    return line


def shown(line: list[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", *line[1:]])


def execute(what: str, line: list[str]) -> None:
    """Runs a command; where it fails, so does this one, with its exit code. SIGTERM goes to it, which may save first."""
    print(f"== {what}: {shown(line)}", flush=True)
    child = subprocess.Popen(line, env=ENVIRONMENT | os.environ)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child has it too
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def run_stages(run: Run, found: dict[Path, str]) -> None:
    """The stages in order; those that are complete, here or in a run that this one builds on, are not started."""
    for stage, options in run.options.items():
        if stage != "evaluate":  # the report is made anew
            [(artefact, inputs)] = options.makes().items()
            if found[artefact] == "complete":
                print(f"{manifest.locate(artefact)}: already complete")
                continue
            if options.from_runs and manifest.is_complete(artefact, manifest.describe(inputs, options), options):
                continue
        execute(stage, command_line(stage, options, run.num_processes))


def dry_run(runs: list[Run], found: dict[Path, str]) -> None:
    """Prints the case of each file, and the commands that would run."""
    for run in runs:
        print(run.folder)
        for stage, options in run.options.items():
            states = {artefact: found[artefact] for artefact in options.makes()}
            for artefact, state in states.items():
                print(f"  {stage:10}  {artefact.name:24}  {state}")
            if {"to do", "unfinished"} & set(states.values()):
                print(f"    {shown(command_line(stage, options, run.num_processes))}")


def compare(runs: list[Run]) -> None:
    """One report over the runs of a sweep, in the folder above theirs."""
    first = runs[0].options["evaluate"]
    files = {"base": first.find("judgments_base.jsonl")}
    files |= {run.name: manifest.locate(run.folder / "judgments_trained.jsonl") for run in runs}
    judgments = tuple(f"{name}={path}" for name, path in files.items() if path.exists())
    same = {name: getattr(first, name) for name in SAME_IN_A_SWEEP}
    execute(
        "all runs", command_line("evaluate", type(first)(run_dir=first.run_dir.parent, judgments=judgments, **same), 1)
    )


def main(given) -> None:
    runs = resolve(given)
    check(runs)
    found = survey(runs)
    if given.dry_run:
        dry_run(runs, found)
        return
    for state in found.values():  # before anything is made
        require(not state.startswith("stale: "), state.removeprefix("stale: "))
    for run in runs:
        kept = run.folder / "settings.toml"
        before = tomllib.loads(kept.read_text("utf-8")) if kept.exists() else {}
        write_atomic(kept, tomli_w.dumps(as_toml(run, before)).encode())
        run_stages(run, found)
        write_card(run.folder)  # also where every stage was complete
    if "evaluate" in runs[0].options:
        if len(runs) > 1:
            compare(runs)
        print(f"open {(runs[0].folder.parent if len(runs) > 1 else runs[0].folder) / 'report.html'}")


if __name__ == "__main__":
    run_command(main, run_file_options(), __doc__)
