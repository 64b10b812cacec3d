"""The chain of a run: every artefact against its manifest, every manifest against those of its inputs."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from conj import InputError
from conj.data.files import read_jsonl
from conj.data.manifest import ARTEFACTS, hash_input, list_artefacts, read_manifest
from conj.data.options import require
from conj.train.checkpoint import check_checkpoint, list_checkpoints


class Check(NamedTuple):
    name: str
    outcome: Literal["holds", "BROKEN", "unchecked"]
    found: str


def check_chain(run: Path, base: Path | None) -> list[Check]:
    """Every artefact against its manifest, and every manifest against those of its inputs, in the order of the stages."""
    artefacts = list_artefacts(run)
    require(bool(artefacts), f"{run}: expected a run folder with manifests, found none")
    # Prompts and pairs may be one's own; nothing else comes without a manifest.
    made_here = [run / name for name in ARTEFACTS if name not in ("prompts.jsonl", "pairs.jsonl")]
    artefacts += [artefact for artefact in made_here if artefact.exists() and artefact not in artefacts]
    # The run and its base may have been moved since.
    here = {artefact.name: artefact for artefact in artefacts}
    base_then = recorded_base(run)
    sha256 = functools.cache(hash_input)

    def find(path: Path) -> Path:
        if path.name in here and path.parent.name == run.resolve().name:
            return here[path.name]
        return base if base is not None and str(path) == base_then else path

    def check_artefact(artefact: Path) -> str:
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

    checks = [check(artefact.name, lambda artefact=artefact: check_artefact(artefact)) for artefact in artefacts]
    for path in reversed(list_checkpoints(run / "checkpoints")):
        checks.append(check(f"checkpoints/{path.name}", lambda path=path: f"step {check_checkpoint(path)['step']}"))
    return checks


def check(name: str, find: Callable[[], str]) -> Check:
    """What `find` returns is what it found; an InputError is a break."""
    try:
        return Check(name, "holds", find())
    except (InputError, OSError) as e:
        return Check(name, "BROKEN", str(e))


def recorded_base(run: Path) -> str | None:
    """The base model's folder as the run's manifests name it: the last input of the training stages."""
    for name in ("model", "reference.safetensors"):
        with suppress(InputError):  # found by the check of that artefact
            if made := read_manifest(run / name):
                return made["inputs"][-1]["path"]
    return None
