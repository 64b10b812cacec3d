"""Files of runs.

They survive a kill: whole files are written beside and renamed, growing files drop a torn last line.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from conj import InputError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120
BLOCK_BYTES = 2**20


def listed(items: Sequence, show: Callable = str) -> str:
    """For a message: the first ten, and how many more there are."""
    return ", ".join(map(show, items[:10])) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def read_jsonl(path: str | Path, columns: Mapping[str, type] | None = None) -> list[dict]:
    """Rows of a JSONL file, all at once; see `stream_jsonl`."""
    return [row for _, row in stream_jsonl(path, columns)]


def stream_jsonl(path: str | Path, columns: Mapping[str, type] | None = None) -> Iterator[tuple[int, dict]]:
    """Line number and row of each line of a JSONL file, one in memory at a time. Raises InputError (file and line) for a
    missing or empty file, a line that is not a JSON object, or one of `columns` that is missing or of another type
    (object: any)."""
    return ((number, row) for number, _, row in locate_jsonl(path, columns))


def locate_jsonl(path: str | Path, columns: Mapping[str, type] | None = None) -> Iterator[tuple[int, int, dict]]:
    """As `stream_jsonl`, with the byte at which each line starts: `read_at` reads it again from there."""
    number = offset = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, offset, _parse_line(line.decode(), columns or {}, f"{path}:{number}")
                offset += len(line)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if not number:
        raise InputError(f"{path}: expected at least one row, found none")


def read_at(file: BinaryIO, offset: int) -> dict:
    """The row whose line starts at that byte of a JSONL file."""
    file.seek(offset)
    return json.loads(file.readline())


def _parse_line(line: str, columns: Mapping[str, type], where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: expected a JSON object, found {line.strip()[:60]!r} ({e})") from None
    check_columns(row, columns, where)
    return row


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
    """Writes a whole file; see `open_atomic`."""
    with open_atomic(path) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that lies beside `path`, and at the end is synced and renamed to it: a reader sees the old file or
    the new one, whole. On an error nothing of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes a whole JSONL file, row by row; see `open_atomic`. Returns the number of rows."""
    num_rows = 0
    with open_atomic(path) as file:
        for row in rows:
            file.write(dump_line(row).encode())
            num_rows += 1
    return num_rows


def recover_jsonl(path: Path, columns: Mapping[str, type] | None = None) -> list[dict]:
    """Rows of a file that an earlier, perhaps killed, run appended to; none if there is no file.
    A torn last line (one without a newline) is cut off the file."""
    return read_jsonl(path, columns) if cut_torn_line(path) else []


def cut_torn_line(path: Path) -> int:
    """Cuts a last line without a newline, as a kill leaves it, off a file. Returns the bytes that stay: 0 if there is no
    file, or no whole line."""
    if not path.exists():
        return 0
    whole = size = path.stat().st_size
    with open(path, "rb") as file:
        while whole:  # a block at a time, from the end
            start = max(0, whole - BLOCK_BYTES)
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n") + 1
            whole = start + found
            if found:
                break
    if whole < size:
        os.truncate(path, whole)
    return whole


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
