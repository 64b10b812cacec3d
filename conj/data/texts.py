"""Rows of JSON and of CSV files, packed or not, with the line of each; their texts come out as they went in.

`datasets` 5.2 turns a column of answers that look like dates into timestamps, refuses lone surrogates, fills a missing
column with null, and does not say which line is malformed. A CSV has texts alone: a cell that is a list of chat messages
as JSON is read as that, any other stays the text that it is.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from conj import InputError

PACKED = (".gz", ".bz2", ".xz", ".zst")
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
MESSAGES = re.compile(r'\[\s*\{\s*"')  # how a list of messages begins, as JSON


def open_text(path: Path) -> TextIO:
    """A UTF-8 file to read, unpacked by its name. Line ends stay as they are: texts may hold them."""
    if path.suffix == ".zst":
        import pyarrow  # with `datasets`; Python reads zstd itself from 3.14 on

        stream = pyarrow.input_stream(str(path), compression="zstd")
    else:
        stream = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


def read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of JSON lines, which are read one by one, of a JSON array, or of an object whose `data` is one."""
    head = ""  # up to the first character, which says what it is
    try:
        # No other character ends a line: JSON's texts may hold those that Python would take for one.
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                first = not head.strip()
                head += line if first else ""
                if first and head.lstrip().startswith("["):
                    yield from number_rows(_parse(head + file.read(), path, 1), path)
                    return
                if first and head.lstrip().startswith("{") and not _is_json(line):  # an object over several lines
                    yield from number_rows(_rows_of(head + file.read(), path, number), path)
                    return
                if line.strip():
                    row = _parse(line.removesuffix("\n"), path, number)
                    if first and _has_rows(row):
                        yield from number_rows(_rows_of(line + file.read(), path, number), path)
                        return
                    yield f"{path}:{number}", row
    except ERRORS as e:
        raise InputError(f"{path}: cannot be read: {e}") from None


def number_rows(rows: Iterable, name: str | Path) -> Iterator[tuple[str, dict]]:
    """Each row with where it stands in the data set of that name."""
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, 1))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_rows(row) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("data"), list)
        and all(isinstance(item, dict) for item in row["data"])
    )


def _rows_of(text: str, path: Path, number: int) -> list[dict]:
    """The rows of `{"data": […]}`, or the one that an object is. Raises InputError as for the line where it starts."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # JSON lines, of which the first is malformed
        _parse(text.lstrip().partition("\n")[0], path, number)
        whole = _parse(text, path, 1)
    if not _has_rows(whole):
        return [whole]
    if others := [key for key in whole if key != "data"]:
        raise InputError(
            f"{path}: expected an object with data alone, or JSON lines; found {', '.join(others)} as well"
        )
    return whole["data"]


def _parse(text: str, path: Path, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        line, found = first_line + e.lineno - 1, text[e.pos : e.pos + 40]
        raise InputError(f"{path}:{line}: expected JSON, found {found!r} at column {e.colno} ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # a number or a nesting too long for Python
        raise InputError(f"{path}:{first_line}: expected JSON: {e}") from None


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a CSV, or of a TSV, whose first line names the columns. Quoted cells may hold commas and line ends."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else ","
    try:
        with open_text(path) as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            columns = next(lines, [])
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise InputError(f"{path}: column {twice[0]} stands twice in the first line")
            for number, cells in enumerate(lines, 1):
                if cells and len(cells) != len(columns):
                    raise InputError(f"{path}: row {number}: expected {len(columns)} cells, found {len(cells)}")
                if cells:
                    where = f"{path}: row {number}"
                    yield where, {column: _read_cell(cell, where) for column, cell in zip(columns, cells)}
    except csv.Error as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    except ERRORS as e:
        raise InputError(f"{path}: cannot be read: {e}") from None


def _read_cell(cell: str, where: str):
    if cell.startswith("[{'"):  # as pandas writes lists: its quotes cannot be told from those of the texts
        raise InputError(f"{where}: expected messages as JSON, found a list as Python prints it: {cell[:40]!r}")
    if not MESSAGES.match(cell):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    roles = all(isinstance(item, dict) and {"role", "from", "type"} & item.keys() for item in value)
    return value if roles else cell
