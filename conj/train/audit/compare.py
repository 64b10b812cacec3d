"""Where two runs part: the first stage, and in it the first option, input, record, step or tensor that differs.

For `conj.train.audit --against`. Reads files only, so any two run folders can be compared, from any machines.
"""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import safe_open

from conj import InputError
from conj.data.files import stream_jsonl
from conj.data.manifest import list_artefacts, locate, read_manifest
from conj.data.model_files import read_model_json, weight_files
from conj.train.reference import read_reference

# What a step's row of metrics.jsonl says of the training; the rest follows from it or says when, where and how fast.
STEP_FIELDS = (
    "step", "order", "num_pairs", "num_tokens", "learning_rate", "loss", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm",
)  # fmt: skip


def first_difference(a: dict, b: dict, names: tuple[str, ...], tolerance: float = 0.0) -> str | None:
    """The first of `names` whose values differ; numbers by more than `tolerance`, relative and absolute. With a
    tolerance accuracy is left out: a margin that rounds to the other side of 0 moves it by a whole pair."""
    for name in names:
        x, y = a.get(name), b.get(name)
        if (x != x and y != y) or (tolerance and name == "rewards/accuracies"):  # NaN equals NaN
            continue
        if tolerance and isinstance(x, float) and isinstance(y, float):
            if not abs(x - y) <= tolerance * max(1.0, abs(x)):
                return name
        elif x != y:
            return name
    return None


def compare_runs(run: Path, other: Path) -> Iterator[tuple[str, bool, str]]:
    """(artefact, whether it is the same in both, what differs first), in the order of the stages."""
    artefacts = [{path.name: path for path in list_artefacts(folder)} for folder in (run, other)]
    if not any(artefacts):
        raise InputError(f"{run}, {other}: expected run folders with manifests, found none")
    for name in artefacts[0] | artefacts[1]:
        pair = [paths.get(name) for paths in artefacts]
        if None in pair:
            yield name, False, f"is in {(run, other)[pair[0] is None]} only"
            continue
        differing = list(_differences(*pair))
        yield name, not differing, "; ".join(differing) or "the same"


def _differences(a: Path, b: Path) -> Iterator[str]:
    """Of two artefacts of one stage: options, inputs, then the first place in what was made."""
    made, (a, b) = [read_manifest(path) for path in (a, b)], (locate(a), locate(b))
    options = [manifest["options"] for manifest in made]
    for name in sorted(options[0].keys() | options[1].keys()):
        values = [o.get(name) for o in options]
        if values[0] != values[1]:
            yield f"option {name}: {values[0]!r} and {values[1]!r}"
    for x, y in zip_longest(made[0]["inputs"], made[1]["inputs"], fillvalue={"path": "none", "sha256": None}):
        if (x["sha256"] or x["path"]) != (y["sha256"] or y["path"]):
            yield f"input {x['path']}{_model_difference(Path(x['path']), Path(y['path']))}"
    if made[0].get("sha256") == made[1].get("sha256"):
        return
    if a.suffix == ".jsonl":
        yield _record_difference(a, b)
    elif a.suffix == ".safetensors":
        yield _reference_difference(a, b)
    elif a.is_dir():
        logs = [path.with_name("metrics.jsonl") for path in (a, b)]
        if all(log.exists() for log in logs):
            yield _record_difference(*logs, STEP_FIELDS)
        yield f"weights{_model_difference(a, b)}"
    else:
        yield "content"


def _record_difference(a: Path, b: Path, names: tuple[str, ...] | None = None) -> str:
    """The first row that differs, and in what; `names` are the columns that count, by default all."""
    for lines in zip_longest(stream_jsonl(a), stream_jsonl(b)):
        if None in lines:
            number, _ = lines[0] or lines[1]
            return f"{a.name}:{number}: row in one of them only"
        (number, one), (_, other) = lines
        rows = one, other
        columns = names or tuple(dict.fromkeys((*rows[0], *rows[1])))
        if name := first_difference(*rows, columns):
            what = f"step {rows[0]['step']}" if "step" in rows[0] else f"id {rows[0].get('id')}"
            values = [json.dumps(row.get(name), ensure_ascii=False) for row in rows]
            return f"{a.name}:{number}: {what}: {name}: {_around_difference(*values)}"
    return f"{a.name}: the same rows, written otherwise"


def _around_difference(a: str, b: str) -> str:
    """Two texts from shortly before where they part."""
    place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, place - 10)
    return " and ".join(("…" if start else "") + text[start : start + 40] for text in (a, b))


def _reference_difference(a: Path, b: Path) -> str:
    (key_a, logps_a), (key_b, logps_b) = read_reference(a), read_reference(b)
    if fields := sorted(name for name in key_a.keys() | key_b.keys() if key_a.get(name) != key_b.get(name)):
        return f"key: another {', '.join(fields)}"
    if logps_a.shape != logps_b.shape:
        return f"{len(logps_a)} and {len(logps_b)} pairs"
    same = (logps_a == logps_b) | (logps_a.isnan() & logps_b.isnan())
    pair = int((~same.all(dim=1)).nonzero()[0])
    return f"pair {pair + 1}: logprobs {logps_a[pair].tolist()} and {logps_b[pair].tolist()}"


def _model_difference(a: Path, b: Path) -> str:
    """Of two model folders that are both there: the first file that differs, and in weights the first tensor."""
    if not (a.is_dir() and b.is_dir()) or a.resolve() == b.resolve():
        return ""
    for name in sorted({p.name for folder in (a, b) for p in folder.glob("*.json*") if "index" not in p.name}):
        files = [folder / name for folder in (a, b)]
        if not all(file.exists() for file in files):
            return f": {name} is in one of them only"
        if files[0].read_bytes() != files[1].read_bytes():
            one, two = (read_model_json(file) if name.endswith(".json") else {} for file in files)
            keys = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
            return f": {name} differs" + (f" in {', '.join(keys[:10])}" if keys else "")
    tensors = [{key: path for path in weight_files(f) for key in _keys(path)} for f in (a, b)]
    if different := sorted(tensors[0].keys() ^ tensors[1].keys()):
        return f": tensor {different[0]} is in one of them only"
    for key in sorted(tensors[0]):
        x, y = (_tensor(paths[key], key) for paths in tensors)
        if x.shape != y.shape or x.dtype != y.dtype:
            return f": tensor {key}: {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        if not torch.equal(x, y):
            return f": tensor {key} differs by up to {(x.double() - y.double()).abs().max():.3g}"
    return ""


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensor(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)
