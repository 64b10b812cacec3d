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
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import tomli_w

from conj import InputError
from conj.data import manifest
from conj.data.benchmarks import locate_data
from conj.data.files import write_atomic
from conj.data.options import flag, require, run_command
from conj.data.readers import read_rows
from conj.model.folder import check_model
from conj.settings import COMMANDS, Run, as_toml, resolve, run_file_options

ON_ALL_RANKS = ("reference", "dpo")  # under torchrun
SAME_IN_A_SWEEP = ("data", "subsets", "limit", "seed", "num_resamples")  # of the evaluation: the runs are compared
# On a CPU, threads that spin while they wait lose a factor of ten as soon as another process wants a core.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def check(runs: list[Run]) -> None:
    """Raises InputError for data and model folders that cannot be used, before hours go into what comes before them."""
    for options in (options for run in runs for options in run.options.values()):
        for name in getattr(options, "data", ()):
            read_rows(locate_data(name)[0])  # nothing is read before the first row is asked for
    evaluations = [run.options["evaluate"] for run in runs if "evaluate" in run.options]
    for name in SAME_IN_A_SWEEP:
        found = {str(getattr(options, name)): None for options in evaluations}
        require(
            len(found) < 2, f"[evaluate] {name}: expected the same in all runs of a sweep, found {', '.join(found)}"
        )
    stages = [options for run in runs for options in run.options.values() if hasattr(options, "model")]
    # Training takes what fits the model; a sampler that is asked for more refuses.
    for model, max_length in {(o.model, o.max_length if hasattr(o, "max_new_tokens") else None): None for o in stages}:
        check_model(model, max_length)


def status(options, artefact: Path, inputs: list) -> str:
    """complete, unfinished, or to do. Raises InputError where it was made of other inputs or options."""
    if not _are_there(inputs):
        return "to do"
    return manifest.state(artefact, manifest.describe(inputs, options))


def _are_there(inputs: list) -> bool:
    """Whether no stage before this one has still to make one of them."""
    return all(path.exists() for path in inputs if isinstance(path, Path))


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
            line += [flag(field), *map(str, value)]
        else:
            line.append(f"{flag(field)}={value}")
    return line


def execute(what: str, line: list[str]) -> None:
    """Runs a command; where it fails, so does this one, with its exit code. SIGTERM goes to it, which may save first."""
    print(f"== {what}: {shlex.join(['python', *line[1:]])}", flush=True)
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


def run_stages(run: Run) -> None:
    """The stages in order; those that are complete, here or in a run that this one builds on, are not started."""
    for stage, options in run.options.items():
        if stage != "evaluate" and is_complete(options):
            continue
        execute(stage, command_line(stage, options, run.num_processes))


def is_complete(options) -> bool:
    [(artefact, inputs)] = options.makes().items()
    return _are_there(inputs) and manifest.is_complete(artefact, manifest.describe(inputs, options), options)


def dry_run(runs: list[Run]) -> None:
    """Prints, for each file of each run, whether it is there, and if it is stale why; and the commands that would run."""
    made_by = {}  # what a stage makes from what, by settings alone -> the run that makes it first
    for run in runs:
        print(f"{run.folder}")
        sources = {}  # file name -> what makes it
        for stage, options in run.options.items():
            for artefact, inputs in options.makes().items():
                key = (artefact.name, repr(manifest.describe_options(options)))
                key += tuple(sources.get(Path(path).name, str(path)) for path in inputs)
                sources[artefact.name] = key
                first = made_by.setdefault(key, run)
                try:
                    found = status(options, artefact, inputs)
                except InputError as e:
                    found = f"stale: {e}"
                if found == "to do" and first is not run:
                    found = f"taken from {first.folder}"
                print(f"  {stage:10}  {artefact.name:24}  {found}")
            if found in ("to do", "unfinished") or stage == "evaluate":
                print(f"    {shlex.join(['python', *command_line(stage, options, run.num_processes)[1:]])}")


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
    if given.dry_run:
        dry_run(runs)
        return
    for run in runs:
        for options in run.options.values():  # what is stale is found before anything is made
            for artefact, inputs in options.makes().items():
                status(options, artefact, inputs)
    for run in runs:
        write_atomic(run.folder / "settings.toml", tomli_w.dumps(as_toml(run)).encode())
        run_stages(run)
    if len(runs) > 1 and "evaluate" in runs[0].options:
        compare(runs)
    print(f"open {(runs[0].folder.parent if len(runs) > 1 else runs[0].folder) / 'report.html'}")


if __name__ == "__main__":
    run_command(main, run_file_options(), __doc__)
