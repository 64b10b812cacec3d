"""A manifest beside every artefact: what made it, from what, with which options, versions and code.

`begin` opens a stage (and says whether its artefact is already there, whole, from the same inputs and options);
`finish` closes it. The chain of hashes runs from the raw data to the final weights, and each stage checks its links.
A stage that was cut short finds its open manifest and goes on only if nothing it depends on has changed.
A manifest holds its own hash as well: `conj.train.audit` finds a change in any byte of either. That shows accidents and
careless edits; whoever can rewrite a whole run can also write manifests that fit.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from conj import InputError
from conj.data.benchmarks import pin_benchmark
from conj.data.files import sha256_file, write_atomic
from conj.data.hub import find_model
from conj.data.identity import (
    changed_since,
    check_judge,
    contents,
    describe_inputs,
    describe_made,
    hash_input,
    inputs_differ,
)
from conj.data.options import option, require, unresolved
from conj.data.readers import pin_data
from conj.data.versions import describe_code

# What the stages make, in their order.
ARTEFACTS = (
    "prompts.jsonl",
    "repeated.jsonl",
    "hinted.jsonl",
    "pairs.jsonl",
    "reference.safetensors",
    "model",
    "judgments_base.jsonl",
    "judgments_trained.jsonl",
    "report.json",
    "attacks.jsonl",
    "attacks.json",
)


AUTO = "auto"  # an automatic option that is not resolved: whatever was recorded
BASE_MODEL = "base model: a Hugging Face folder, or ORG/NAME on the hub, with @REVISION or without"
FROM_RUNS = "run folders to build on: what is complete there is not made again"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every stage of a run has."""

    BENCHMARKS: ClassVar[tuple[str, ...]] = ()  # the options that name benchmarks, or other data
    run_dir: Path = option(help="run folder: the stage writes there, and reads what it needs", affects_result=False)
    from_runs: tuple[Path, ...] = option((), name="from", help=FROM_RUNS, affects_result=False)

    def find(self, name: str) -> Path:
        """Where the run's `name` lies: in its own folder, else where its manifest says, else in the first run folder of
        `--from` that has it complete."""
        own = locate(self.run_dir / name)
        if own.exists():
            return own
        made = [(run / name, read_manifest(run / name)) for run in self.from_runs]
        complete = (locate(path) for path, manifest in made if manifest is None or manifest["complete"])
        return next((path for path in complete if path.exists()), self.run_dir / name)

    def at_hand(self):
        """These options with a model's folder for its name on the hub, and with the commits of data sets of the hub."""
        recorded, changes = functools.partial(recorded_commit, (self.run_dir, *self.from_runs)), {}
        if (model := getattr(self, "model", None)) is not None:
            changes["model"] = find_model(model, functools.partial(recorded, is_model=True))
        for option_name in ("data", *self.BENCHMARKS):
            pin = pin_benchmark if option_name in self.BENCHMARKS else pin_data
            if names := getattr(self, option_name, ()):
                changes[option_name] = tuple(pin(name, recorded) for name in names)
        return dataclasses.replace(self, **changes)

    def check_from(self) -> None:
        """Raises InputError for a run folder to build on that is none."""
        for run in self.from_runs:
            if not run.is_dir() or run.resolve() == self.run_dir.resolve():
                found = "the run folder itself" if run.is_dir() else "none"
                raise InputError(f"--from {run}: expected another run's folder, found {found}")


def recorded_commit(runs: Sequence[Path], repo: str, is_model: bool = False) -> str | None:
    """The commit of a model or a data set of the hub that a run folder was made from; of the first of `runs` that knows.
    Raises InputError where its stages were made from several."""
    for run in runs:
        # As everywhere, a stage that failed before it made anything binds no later try.
        made = [made for path in list_artefacts(run) if (made := read_manifest(path))["complete"] or path.exists()]
        entries = [entry for manifest in made for entry in manifest["inputs"] if entry.get("repo") == repo]
        commits = sorted({entry["revision"] for entry in entries if ("files" in entry) == is_model})
        require(
            len(commits) < 2, f"{repo}: {run} was made from {' and '.join(commits)}; expected one, as {repo}@COMMIT"
        )
        if commits:
            return commits[0]
    return None


def locate(artefact: Path) -> Path:
    """Where an artefact lies: here, or in another run folder, from which its run has taken it."""
    made = None if artefact.exists() else read_manifest(artefact)
    if made is None or not isinstance(made.get("taken_from"), str):
        return artefact
    return Path(os.path.normpath(artefact.parent / made["taken_from"] / artefact.name))


def list_artefacts(run: Path) -> list[Path]:
    """The artefacts of a run folder that have a manifest, in the order of the stages."""
    names = sorted(path.name.removesuffix(".manifest.json") for path in run.glob("*.manifest.json"))
    return sorted((run / name for name in names), key=stage_order)


def stage_order(artefact: Path) -> int:
    return ARTEFACTS.index(artefact.name) if artefact.name in ARTEFACTS else len(ARTEFACTS)


def manifest_path(artefact: Path) -> Path:
    return artefact.with_name(artefact.name + ".manifest.json")


def write_sealed(path: Path, content: dict) -> None:
    """Writes a JSON object with the sha256 of its own content, so that a changed byte in it is seen."""
    sealed = {**content, "seal": _seal(content)}
    write_atomic(path, (json.dumps(sealed, ensure_ascii=False, indent=2) + "\n").encode())


def read_sealed(path: Path, needed: Mapping[str, type]) -> dict:
    """What `write_sealed` wrote, without the seal. Raises InputError when it was changed since, or when one of
    `needed` is missing or of another type."""
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected a JSON manifest: {e}") from None
    if not isinstance(content, dict) or any(type(content.get(name)) is not kind for name, kind in needed.items()):
        raise InputError(f"{path}: expected a manifest with {', '.join(needed)}")
    seal = content.pop("seal", None)
    # The text too: another layout, or a key stated twice, means the same JSON and is a change all the same.
    if seal != _seal(content) or text != json.dumps({**content, "seal": seal}, ensure_ascii=False, indent=2) + "\n":
        raise InputError(f"{path}: was changed after it was written: its content does not have the sha256 it states")
    return content


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(artefact: Path) -> dict | None:
    """The manifest beside an artefact, or None. Raises InputError when it is not a manifest or was changed."""
    path = manifest_path(artefact)
    if not path.exists():
        return None
    try:
        return read_sealed(path, {"inputs": list, "options": dict, "complete": bool})
    except InputError as e:
        raise InputError(f"{e}; delete it and {artefact.name}") from None


def describe_options(options) -> dict:
    """The options that affect a stage's result, as JSON. Paths are not among them: what they lead to is an input. Automatic
    ones that are not resolved yet are AUTO."""
    names = [f.name for f in dataclasses.fields(options) if f.metadata["affects_result"]]
    values = {name: AUTO if name in unresolved(options) else getattr(options, name) for name in names}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def describe(inputs: Sequence[str | Path], options, hash_file: Callable = sha256_file) -> dict:
    """What a manifest is about, and two are compared by."""
    return {"inputs": describe_inputs(inputs, hash_file), "options": describe_options(options)}


def state(artefact: Path, now: dict) -> str:
    """How far the stage is that makes `artefact` of the inputs and options `now`: complete, unfinished, or to do. Raises
    InputError where what stands there was made of others."""
    made = read_manifest(artefact)
    if made is not None and "taken_from" in made:  # a reference to another run's is replaced, never refused
        there = locate(artefact)
        return "complete" if not _difference(made, now) and _is_whole(there, made) else "to do"
    if made is not None and (made["complete"] or artefact.exists()):
        kept = f"--from {artefact.parent} for what stays the same"
        advice = f"delete it and {manifest_path(artefact).name}, or give another --run-dir and {kept}"
        if why := _difference(made, now):
            raise InputError(f"{artefact}: {why}; {advice}")
        if made["complete"] and not _is_whole(artefact, made):
            raise InputError(
                f"{artefact}: is not what {manifest_path(artefact).name} describes; delete both to make it again"
            )
        return "complete" if made["complete"] else "unfinished"
    if artefact.exists():
        raise InputError(f"{artefact}: exists but has no manifest; delete it or use another --run-dir")
    return "to do"


def begin(artefact: Path, *, inputs: Sequence[str | Path], options) -> bool:
    """Opens the stage that makes `artefact`. Returns False if it is already complete, from these inputs and options: here
    or in a run folder that the options name (`--from`), to which the manifest then refers.

    Raises InputError when an artefact of other inputs or options stands there (nothing is overwritten), when an input is
    not what its own manifest describes, or when another process is making it. A stage that failed before it made anything
    does not bind the next try."""
    for path in inputs:
        if isinstance(path, Path) and not path.exists():
            raise InputError(f"{path}: no such file; make it by its stage first")
    now = describe(inputs, options)
    _check_chain(now["inputs"])
    if is_complete(artefact, now, options):
        return False
    _hold(artefact)
    if is_complete(artefact, now, options):  # another process has just finished it
        _held.pop(artefact).close()
        return False
    if not artefact.exists():
        write_sealed(manifest_path(artefact), {"artefact": artefact.name, "complete": False, **now, **describe_code()})
    return True


def is_complete(artefact: Path, now: dict, options) -> bool:
    """Whether the artefact is there, of the inputs and options `now`; or in a run folder that the options build on, to
    which the manifest here then refers."""
    found = state(artefact, now)
    if found == "complete":
        print(f"{locate(artefact)}: already complete")
    elif found == "to do" and (there := find_complete(artefact.name, now, options)):
        place = os.path.relpath(there.parent, artefact.parent)
        write_sealed(manifest_path(artefact), {**read_manifest(there), "taken_from": place})
        print(f"{there}: already complete; {artefact.parent} takes it from there")
        return True
    return found == "complete"


def find_complete(name: str, now: dict, options) -> Path | None:
    """The artefact of the inputs and options `now`, in a run folder that the options build on."""
    for run in getattr(options, "from_runs", ()):
        made, there = read_manifest(run / name), locate(run / name)
        if made is not None and made["complete"] and not _difference(made, now) and _is_whole(there, made):
            return there
    return None


def _is_whole(artefact: Path, made: dict) -> bool:
    return artefact.exists() and hash_input(artefact) == made["sha256"]


_held: dict[Path, IO] = {}  # locks of the stages that this process is making


def _hold(artefact: Path) -> None:
    """Keeps other processes off an artefact as long as this one lives, or until it is finished: two that append to one
    file, or write one checkpoint, spoil it. Raises InputError when another one holds it. The lock is a file of its own,
    which is never renamed or deleted. File systems without locks (ENOLCK) go unprotected."""
    if old := _held.pop(artefact, None):
        old.close()
    artefact.parent.mkdir(parents=True, exist_ok=True)
    file = open(artefact.with_name(f".{artefact.name}.lock"), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{artefact}: another process is making it at this moment") from None
    except OSError:
        pass
    _held[artefact] = file


def _difference(before: dict, now: dict) -> str:
    """How inputs or options differ from those of a manifest; empty if they do not."""
    if differ := inputs_differ(before, now):
        return differ
    for name in sorted(before["options"].keys() | now["options"].keys()):
        old, new = (m["options"].get(name) for m in (before, now))
        is_off = name not in before["options"] and not new  # an option that came later, and changes nothing
        if old != new and new != AUTO and not is_off:
            return f"was made with {name}={old!r}, now {new!r}"
    return ""


def _check_chain(inputs: list[dict]) -> None:
    """Raises InputError unless every input that has a manifest is complete, unchanged since, and was itself made from
    the files that are given beside it: judgments of other prompts would turn labels around without a word."""
    given = {Path(i["path"]).name: i["sha256"] for i in inputs}
    for entry in inputs:
        path = Path(entry["path"])
        manifest = read_manifest(path) if path.exists() else None
        if manifest is None:
            continue
        if not manifest["complete"]:
            raise InputError(f"{path}: was cut short; run its stage again to finish it")
        check_judge(path, manifest, inputs)
        if changed := changed_since(entry, manifest):
            raise InputError(f"{changed}: was changed after {manifest_path(path).name} was written; make it again")
        if path.is_dir():  # a judge that is trained on was made from other files of the same names, in its own run
            continue
        for source in manifest["inputs"]:
            name = Path(source["path"]).name
            if name in given and source["sha256"] != given[name]:
                raise InputError(
                    f"{path}: was made from another {name} than the one that stands here now; make it again"
                )


def identity(artefact: Path) -> str:
    """sha256 of the inputs and options of the stage that is making `artefact`: what its checkpoints belong to."""
    manifest = read_manifest(artefact)
    content = [contents(manifest), manifest["options"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finish(
    artefact: Path,
    *,
    num_rows: int,
    counts: dict,
    seconds: float,
    also: Sequence[Path] = (),
    machine: dict | None = None,
    base_card: dict | None = None,
    fates: dict | None = None,
) -> None:
    """Closes the stage: hash, number of rows, what was counted on the way, wall time in seconds. Prints the counts,
    lists of ids aside.

    `also`: files and folders that the stage made beside the artefact, hashed too. `machine`: what its bits depend on
    beside versions, if they depend on more. `base_card`: what the card of the base model states. `fates`: examples of what
    `counts` counts, and more on what was left out."""
    manifest = read_manifest(artefact)
    made = {**describe_made(artefact), "num_rows": num_rows, "counts": counts, "seconds": round(seconds, 3)}
    made |= {"also": {str(p.relative_to(artefact.parent)): hash_input(p) for p in sorted(also)}} if also else {}
    made |= {"machine": machine} if machine else {}
    made |= {"base_card": base_card} if base_card else {}
    made |= {"fates": fates} if fates else {}
    write_sealed(manifest_path(artefact), {**manifest, "complete": True, **made})
    if lock := _held.pop(artefact, None):
        lock.close()
    print(
        f"{artefact}: {num_rows} rows; " + ", ".join(f"{k} {v}" for k, v in counts.items() if not isinstance(v, list))
    )
