"""A whole run, or a sweep of runs, from one file of settings.

    conj run demo/demo.toml
    conj run mine.toml --run-dir runs/mine --dpo.learning-rate 1e-6
    conj run mine.toml --dry-run

The file is described in conj/settings.py. The runs of a sweep take from those before them what is the same, so what they
share is made once; in the end one report shows all of them.

All of it is checked before the first stage starts: settings, data, the model folder, and whether what stands in the run
folder was made with them. Complete stages are skipped, and a run that was killed goes on where it stopped: give the same
line again. With `nnodes` and a `launcher` it is started on one node, runs the other stages there, and starts stages 5 and 6 on
all of them: docs/clusters.md. The resolved settings are written to `settings.toml` in the run folder, which is such a file as well.
"""

import dataclasses
import hashlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import tomli_w

from conj.data import manifest
from conj.data.card import write_card
from conj.data.files import write_atomic
from conj.data.options import flag, run_command, unresolved
from conj.preflight import ON_ALL_RANKS, SAME_IN_A_SWEEP, at_hand, check, check_costly, survey
from conj.settings import COMMANDS, Run, as_toml, resolve, run_file_options
from conj.train.fit import find_recorded, with_recorded

ENVIRONMENT = {
    # On a CPU, threads that spin while they wait lose a factor of ten as soon as another process wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A node that is lost and comes back waits for an address that the others, by default, say only once (torch 2.13).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def torchrun(num_processes: int, nodes: Mapping, run_dir: Path) -> list[str]:
    """A command's beginning that starts it on every rank of every node. `nodes`: see `Run`. Nodes of another run folder that meet
    at the same endpoint have another id, and are kept apart by it."""
    nnodes, restarts = nodes.get("nnodes", 1), nodes.get("max_restarts", 0)
    ranks = [f"--nproc_per_node={num_processes}", *([f"--max_restarts={restarts}"] if restarts else [])]
    line = [sys.executable, "-m", "torch.distributed.run"]
    if nnodes == 1:
        return [*line, "--standalone", *ranks] if num_processes > 1 or restarts else [sys.executable]
    endpoint = nodes.get("rdzv_endpoint") or f"{socket.gethostname()}:29400"
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    meet = [f"--nnodes={nnodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", f"--rdzv_id=conj-{name}"]
    return [*shlex.split(nodes["launcher"]), *line, *meet, *ranks]


def command_line(stage: str, options, num_processes: int, nodes: Mapping = MappingProxyType({})) -> list[str]:
    """The stage as a command: every option that is not its default."""
    launch = torchrun(num_processes, nodes, options.run_dir) if stage in ON_ALL_RANKS else [sys.executable]
    line = [*launch, "-m", COMMANDS[stage].module]
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
    return shlex.join("python" if part == sys.executable else part for part in line)


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
        execute(stage, command_line(stage, options, run.num_processes, run.nodes))


def as_begun(run: Run) -> Run:
    """The run with its automatic options as its stages have chosen them."""
    options = dict(run.options)
    for stage in (stage for stage in options if unresolved(options[stage])):
        options[stage] = with_recorded(options[stage], find_recorded(options[stage]))
    return dataclasses.replace(run, options=options)


def dry_run(runs: list[Run], found: dict[Path, str]) -> None:
    """Prints the case of each file, and the commands that would run."""
    for run in runs:
        print(run.folder)
        for stage, options in run.options.items():
            states = {artefact: found[artefact] for artefact in options.makes()}
            for artefact, state in states.items():
                print(f"  {stage:10}  {artefact.name:24}  {state}")
            if {"to do", "unfinished"} & set(states.values()):
                print(f"    {shown(command_line(stage, options, run.num_processes, run.nodes))}")


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
    runs = [at_hand(run) for run in resolve(given)]
    models = check(runs)
    found = survey(runs)
    if given.dry_run:
        dry_run(runs, found)
        return
    check_costly(runs, models, found)
    for run in runs:
        kept = run.folder / "settings.toml"
        before = tomllib.loads(kept.read_text("utf-8")) if kept.exists() else {}
        write_atomic(kept, tomli_w.dumps(as_toml(run, before)).encode())
        run_stages(run, found)
        write_atomic(kept, tomli_w.dumps(as_toml(as_begun(run), before)).encode())
        write_card(run.folder)  # also where every stage was complete
    if "evaluate" in runs[0].options:
        if len(runs) > 1:
            compare(runs)
        print(f"open {(runs[0].folder.parent if len(runs) > 1 else runs[0].folder) / 'report.html'}")


if __name__ == "__main__":
    run_command(main, run_file_options(), __doc__)
