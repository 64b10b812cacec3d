"""What a file or a folder is, by its content: manifests name inputs and artefacts by it.

A folder that is made is all of its files. A model folder that is read is the files that decide results, each by its own
hash: a card that is rewritten or a hub client's bookkeeping changes no judgment, and what does change is named.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from conj import InputError
from conj.data.files import sha256_file
from conj.data.hub import provenance
from conj.data.judges import Judge, load_judge
from conj.data.model_files import CONFIG, decides, deciding_files

JUDGED = ("repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "reference.safetensors")  # made with the judge of a run
JUDGE = "judge "  # before the name of a judge, among a manifest's inputs
ENDPOINT = "endpoint model "  # before the name of a model behind one, among a manifest's inputs
ROWS = re.compile("(.+ of [0-9]+ rows) with sha256 ([0-9a-f]{64})")  # how preprocess names data that Python handed it
EXCLUDED = "without the questions of"  # among the inputs of prompts.jsonl: benchmarks come after it
MODEL_CARD = "README.md"  # of a model: a text that is written anew when there is more to say, and decides nothing


def hash_files(folder: Path, hash_file: Callable[[Path], str] = sha256_file) -> dict[str, str]:
    """sha256 of each file below a folder, by its path in it; hidden ones and a model's card aside."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    if is_model(folder):
        shown.pop(Path(MODEL_CARD), None)
    return {name.as_posix(): hash_file(path) for name, path in shown.items()}


def is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def hash_listing(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in files.items()).encode()).hexdigest()


def hash_input(path: str | Path, hash_file: Callable[[Path], str] = sha256_file) -> str:
    """sha256 of a file, or of a folder's file names and hashes."""
    path = Path(path)
    return hash_file(path) if path.is_file() else hash_listing(hash_files(path, hash_file))


def describe_made(artefact: Path) -> dict:
    """What a manifest says of an artefact's content; of a folder each file's, so that those who read some of them compare
    these alone."""
    if artefact.is_file():
        return {"sha256": sha256_file(artefact)}
    files = hash_files(artefact)
    return {"sha256": hash_listing(files), "files": files}


def describe_input(path: str | Path, hash_file: Callable[[Path], str] = sha256_file) -> dict:
    """What a manifest says of an input: its path and hash, of a model the hashes of the files that decide results, and the
    repository and commit of what is from the hub; of ROWS the hash in their name. A text that is not on disk (a data set of
    the hub, a split) is described by itself alone."""
    if rows := ROWS.fullmatch(str(path)):
        return {"path": rows[1], "sha256": rows[2]}
    if isinstance(path, Path) and is_model(path):
        files = {file.name: hash_file(file) for file in deciding_files(path)}
        return {"path": str(path), "sha256": hash_listing(files), "files": files} | provenance(path)
    sha256 = hash_input(path, hash_file) if Path(path).exists() else None
    return {"path": str(path), "sha256": sha256} | (provenance(path) if sha256 is None else {})


def describe_inputs(inputs: Sequence[str | Path], hash_file: Callable[[Path], str] = sha256_file) -> list[dict]:
    return [describe_input(path, hash_file) for path in inputs]


def not_excluded(entries: Sequence[dict]) -> list[dict]:
    """Of the inputs of prompts.jsonl the preference data alone."""
    return list(itertools.takewhile(lambda entry: entry["path"] != EXCLUDED, entries))


def describe_judge(judge: Judge) -> str:
    """What a manifest says of a judge: its name and hash."""
    return f"{JUDGE}{judge.name} {hash_judge(judge)}"


def hash_judge(judge: Judge) -> str:
    """sha256 of all that decides a judge's judgments, wherever its text is from. A model's folder is an input of its own. What is
    by default is left out, so that a key which a later version adds changes no hash."""
    model = judge.model if judge.backend == "openai" else None
    judge = dataclasses.replace(judge, name="", model=model, prompt_dollars=None, completion_dollars=None)
    defaults = dataclasses.asdict(Judge(name=""))
    content = {name: value for name, value in dataclasses.asdict(judge).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@functools.cache
def _card_judge() -> str:
    return describe_judge(load_judge("con-j"))


def judge_in(inputs: Sequence[Mapping]) -> str | None:
    """The judge among a manifest's inputs, as `describe_judge` names it."""
    return next((entry["path"] for entry in inputs if entry["path"].startswith(JUDGE)), None)


def judges_differ(before: Sequence[Mapping], now: Sequence[Mapping]) -> str:
    """How the judge differs between a manifest's inputs and others; empty if it does not: its name decides nothing. Where none
    is named it is the card's, as in manifests of versions that knew no other."""
    (name, was), (new_name, is_) = ((judge_in(inputs) or _card_judge()).rsplit(" ", 1) for inputs in (before, now))
    return "" if was == is_ else f"was made with {name} ({was[:8]}), now {new_name} ({is_[:8]})"


def check_judge(path: Path, made: Mapping, inputs: Sequence[Mapping]) -> None:
    """Raises InputError where a stage, which has a judge among its `inputs`, is given what was made with another."""
    if path.name in JUDGED and judge_in(inputs) and (differ := judges_differ(made["inputs"], inputs)):
        raise InputError(f"{path}: {differ}; give the --judge that it was made with, or make it again")


def contents(made: Mapping) -> list[str]:
    """What the inputs of a manifest are, wherever they lie, the judge aside: their hashes, or the names of what is not on disk."""
    return [entry["sha256"] or entry["path"] for entry in _but_judge(made)]


def _but_judge(made: Mapping) -> list[dict]:
    return [entry for entry in made["inputs"] if not entry["path"].startswith(JUDGE)]


def inputs_differ(before: Mapping, now: Mapping) -> str:
    """How the inputs differ from those of a manifest; empty if they do not."""
    if differ := judges_differ(before["inputs"], now["inputs"]):
        return differ
    made_from, given = contents(before), contents(now)
    if made_from == given:
        return ""
    entries = zip(_but_judge(before), _but_judge(now), made_from, given)
    names = ", ".join(show_change(a, b) for a, b, old, new in entries if old != new)
    return f"was made from other inputs (changed: {names or 'their number'})"


def show_change(before: dict, now: dict) -> str:
    """The name of an input that is not the same any more; of a model the names of the files that are not."""
    old, new = (entry.get("files") for entry in (before, now))
    if old is None or new is None:
        return now["path"]
    place = f"{now['repo']}@{now['revision']}" if "repo" in now else now["path"]
    return ", ".join(f"{place}/{name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))


def changed_since(entry: dict, made: dict) -> str:
    """What of an input is not what the manifest of its own stage says; empty if all is."""
    if "files" not in entry:
        return "" if entry["sha256"] == made["sha256"] else entry["path"]
    if "files" not in made:
        raise InputError(f"{entry['path']}: its manifest is of an earlier version, which named no files; make it again")
    decide = {name: sha256 for name, sha256 in made["files"].items() if decides(name, made["files"])}
    return show_change(entry | {"files": decide}, entry)
