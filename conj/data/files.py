"""Files of runs.

They survive a kill: whole files are written beside and renamed, growing files drop a torn last line.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from conj import InputError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def listed(items: Sequence, show: Callable = str) -> str:
    """For a message: the first ten, and how many more there are."""
    return ", ".join(map(show, items[:10])) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def read_jsonl(path: str | Path, columns: Mapping[str, type] | None = None) -> list[dict]:
    """Rows of a JSONL file. Raises InputError (file and line) for a missing or empty file, a line that is not a
    JSON object, or one of `columns` that is missing or of another type (object: any)."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as e:
                    found = f"{line.strip()[:60]!r} ({e})"
                    raise InputError(f"{path}:{number}: expected a JSON object, found {found}") from None
                check_columns(rows[-1], columns or {}, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


def check_columns(row: object, columns: Mapping[str, type], where: str) -> None:
    """Raises InputError unless `row` is an object with `columns` of these types (object: any)."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if missing := sorted(columns.keys() - row.keys()):
        raise InputError(f"{where}: missing column {', '.join(missing)}; found {', '.join(sorted(row)) or 'none'}")
    for name, kind in columns.items():
        if kind is not object and type(row[name]) is not kind:  # not isinstance: true is no label
            raise InputError(f"{where}: expected {name} to be {kind.__name__}, found {str(row[name])[:40]!r}")


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
    """An exception's message, or its kind if it has none, as one printable line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def brief(value: object) -> str:
    """A value from a file, for a message: one line, cut where it is long or deep."""
    return _BRIEF.repr(value)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
