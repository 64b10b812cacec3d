"""The chain of a run: every artefact against its manifest, every manifest against those of its inputs."""

import functools
from collections.abc import Callable
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

from conj import InputError
from conj.data.card import CARD, owns_model, render_card, trained_by
from conj.data.files import sha256_file, stream_jsonl
from conj.data.identity import EXCLUDED, JUDGE, describe_inputs, describe_judge, hash_input, judges_differ, show_change
from conj.data.judges import load_judge
from conj.data.manifest import ARTEFACTS, list_artefacts, locate, manifest_path, read_manifest, stage_order
from conj.data.model_files import JUDGE_FILE
from conj.data.options import require
from conj.data.tokens import TOKENS, check_tokens
from conj.train.checkpoint import check_checkpoint, list_checkpoints


class Check(NamedTuple):
    name: str
    outcome: Literal["holds", "BROKEN", "unchecked"]
    found: str


def check_chain(run: Path, base: Path | None) -> list[Check]:
    """Every artefact against its manifest, and every manifest against those of its inputs, in the order of the stages:
    those of the run, and those of other runs that it was made from."""
    artefacts = list_artefacts(run)
    require(bool(artefacts), f"{run}: expected a run folder with manifests, found none")
    # Prompts and pairs may be one's own; nothing else comes without a manifest.
    made_here = [run / name for name in ARTEFACTS if name not in ("prompts.jsonl", "pairs.jsonl")]
    artefacts += [artefact for artefact in made_here if artefact.exists() and artefact not in artefacts]
    here, base_then = {a.name: a for a in artefacts}, (recorded_base(run) or {}).get("path")
    hash_file = functools.cache(sha256_file)  # of an input that several were made from

    def find(path: Path, artefact: Path) -> Path:
        """Where an input of an artefact lies now: the run, those beside it, and its base may have been moved since."""
        # First, since the base may be the model of another run of this one's name.
        if str(path) == base_then and (base is not None or path.exists()):
            return base or path
        if artefact.parent == run and path.name in here and path.parent.name == run.resolve().name:
            return locate(here[path.name])
        beside = run.resolve().parent / path.parent.name / path.name
        return path if path.exists() or not beside.exists() else beside

    def check_artefact(artefact: Path) -> str:
        made, folder = read_manifest(artefact), locate(artefact).parent
        require(made is not None, "has no manifest")
        require(made["complete"], "was cut short; run its stage again to finish it")
        away = []
        for name, expected in ({artefact.name: made["sha256"]} | made.get("also", {})).items():
            if Path(name).parts[0] == "checkpoints" and not (folder / name).parent.exists():
                away.append(name)  # deleted, as a whole: it takes three times the model's room
                continue
            require((folder / name).exists(), f"{name} is missing")
            require(
                hash_input(folder / name, hash_file) == expected,
                f"{name} was changed: its sha256 is not the manifest's",
            )
        for entry in (entry for entry in made["inputs"] if not entry["path"].startswith(JUDGE)):
            path = find(Path(entry["path"]), artefact)
            if entry["sha256"] is None or not path.exists():
                away += [entry["path"]] if entry["path"] != EXCLUDED else []
                continue
            [now] = describe_inputs([path if "files" in entry else str(path)], hash_file)
            if now["sha256"] != entry["sha256"]:
                raise InputError(f"was made from another {show_change(entry, now)} than the one that stands there now")
        if (own := folder / artefact.name / JUDGE_FILE).exists():
            differ = judges_differ(made["inputs"], [{"path": describe_judge(load_judge(str(own)))}])
            require(not differ, f"{differ}, by its {JUDGE_FILE}")
        num_rows = made["num_rows"]
        if artefact.suffix == ".jsonl":
            num_rows = sum(1 for _ in stream_jsonl(folder / artefact.name))
        require(num_rows == made["num_rows"], f"expected {made['num_rows']} rows, found {num_rows}")
        not_here = f"; not here, so not compared: {', '.join(away)}" if away else ""
        taken = f", in {folder}" if "taken_from" in made else ""
        return f"{num_rows} rows, sha256 {made['sha256'][:12]}{taken}{not_here}"

    checks = []
    artefacts = sorted(artefacts + _made_from(artefacts, find), key=stage_order)
    for artefact in artefacts:
        name = artefact.name if artefact.parent == run else str(artefact)
        checks.append(check(name, lambda artefact=artefact: check_artefact(artefact)))
    for path in dict.fromkeys(locate(artefact).with_name(TOKENS) for artefact in artefacts):
        if path.exists():
            name = TOKENS if path.parent == run else str(path)
            checks.append(check(name, lambda path=path: f"sha256 {check_tokens(path)[:12]}, as it states"))
    for path in reversed(list_checkpoints(locate(run / "model").with_name("checkpoints"))):
        checks.append(check(f"checkpoints/{path.name}", lambda path=path: f"step {check_checkpoint(path)['step']}"))
    return checks


def _made_from(artefacts: list[Path], find: Callable[[Path, Path], Path]) -> list[Path]:
    """Artefacts of other runs that these were made from, directly or by way of others."""
    found, known = [], {locate(artefact) for artefact in artefacts}
    for artefact in (todo := list(artefacts)):
        with suppress(InputError):  # found by the check of that artefact
            inputs = (read_manifest(artefact) or {"inputs": ()})["inputs"]
            for path in (find(Path(entry["path"]), artefact) for entry in inputs):
                if path not in known and manifest_path(path).exists():
                    known.add(path)
                    found.append(path)
                    todo.append(path)
    return found


def check(name: str, find: Callable[[], str]) -> Check:
    """What `find` returns is what it found; an InputError is a break."""
    try:
        return Check(name, "holds", find())
    except (InputError, OSError) as e:
        return Check(name, "BROKEN", str(e))


def check_card(run: Path) -> list[Check]:
    """Whether the model's card is what the run folder makes of it, with the last audit's result or without one. None where
    the run has no model of its own."""
    try:
        if not owns_model(run):
            return []
        path, missing = run / CARD, trained_by(run)[1]
        expected = [render_card(run, with_audit=shown).encode() for shown in (True, False)]
    except InputError as e:
        return [Check(CARD, "unchecked", f"what it is made of cannot be read: {e}")]
    if not path.exists():
        return [Check(CARD, "unchecked", "there was none; it is written now")]
    if (found := path.read_bytes()) in expected:
        return [Check(CARD, "holds", "says what the manifests, the report and the last audit say")]
    if missing:
        return [Check(CARD, "unchecked", f"what it was made of is not here: {', '.join(missing)}")]
    number, should, is_ = max(_first_difference(text, found) for text in expected)
    return [
        Check(
            CARD,
            "BROKEN",
            f"line {number}: expected {should}, found {is_}; `conj run` or `conj evaluate` writes it anew",
        )
    ]


def _first_difference(expected: bytes, found: bytes) -> tuple[int, str, str]:
    """The first line in which two texts differ: its number, and what stands there, around the place."""
    lines = zip_longest(
        *(text.decode("utf-8", "replace").split("\n") for text in (expected, found)), fillvalue="no line"
    )
    number, pair = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    same = next((i for i, (one, other) in enumerate(zip(*pair)) if one != other), min(map(len, pair)))
    start = max(0, same - 60)
    return number, *(repr(line[start : start + 120]) for line in pair)


def recorded_base(run: Path) -> dict | None:
    """The base model as the run's manifests name it: the last input of the training stages."""
    for name in ("model", "reference.safetensors"):
        with suppress(InputError):  # found by the check of that artefact
            if made := read_manifest(run / name):
                return made["inputs"][-1]
    return None
