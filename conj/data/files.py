"""Files of runs and of models.

Runs survive a kill: whole files are written beside and renamed, growing files drop a torn last line.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from conj import InputError


def read_jsonl(path: str | Path, columns: Mapping[str, type] | None = None) -> list[dict]:
    """Rows of a JSONL file. Raises InputError (file and line) for a missing or empty file, a line that is not a
    JSON object, or one of `columns` that is missing or of another type (object: any)."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                rows.append(_parse_line(line, f"{path}:{number}", columns or {}))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


def _parse_line(line: str, where: str, columns: Mapping[str, type]) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: expected a JSON object, found {line.strip()[:60]!r} ({e})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if missing := sorted(columns.keys() - row.keys()):
        raise InputError(f"{where}: missing column {', '.join(missing)}; found {', '.join(sorted(row)) or 'none'}")
    for name, kind in columns.items():
        if kind is not object and type(row[name]) is not kind:  # not isinstance: true is no label
            raise InputError(f"{where}: expected {name} to be {kind.__name__}, found {str(row[name])[:40]!r}")
    return row


def dump_line(row: dict) -> str:
    """One JSONL line, raw UTF-8; lone surrogates (which UTF-8 cannot hold) are escaped."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def replace_surrogates(text: str) -> str:
    """Text with lone surrogates, which JSON can hold and no encoding can, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file beside its place, syncs it and renames it: a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_atomic(path, "".join(map(dump_line, rows)).encode())


def recover_jsonl(path: Path, columns: Mapping[str, type] | None = None) -> list[dict]:
    """Rows of a file that an earlier, perhaps killed, run appended to; none if there is no file.
    A torn last line (one without a newline) is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return read_jsonl(path, columns) if whole else []


def first_line(error: Exception) -> str:
    """An exception's message, or its kind if it has none, as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_model_json(path: Path) -> dict:
    """A JSON object of a model folder. Raises InputError when it is missing or malformed."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a model folder: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def indexed_files(index: Path) -> list[str]:
    """Names of the files that a `model.safetensors.index.json` spreads the weights over.

    Raises InputError when it is malformed or names none."""
    weight_map = read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map, found {weight_map!r}")
    return sorted({str(name) for name in weight_map.values()})


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
