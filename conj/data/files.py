"""Files of runs and of models.

Runs survive a kill: whole files are written beside and renamed, growing files drop a torn last line.
"""

import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from conj import InputError

INDEX = "model.safetensors.index.json"  # of a model whose weights are spread over several files
# Bounds on what a model folder may hold, above the largest in use (Gemma 3: a tokenizer of 33 MB, half a million merges;
# DeepSeek V3: an index of 9 MB; Qwen2's headers have 40 kB). They bound time and memory before anything is parsed.
MAX_CONFIG_BYTES = 4_000_000
MAX_HEADER_BYTES = 2_000_000
MAX_INDEX_BYTES = 16_000_000
MAX_TOKENIZER_BYTES = 40_000_000
MAX_BRACKETS = 1_500_000
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


def read_model_file(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """A file of a model folder. Raises InputError when it is missing, no regular file (a pipe would block) or larger."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: expected a file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a model folder: {path.name} is missing") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: expected at most {max_bytes:,} bytes, found more")
    return data


def read_model_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict:
    """A JSON object of a model folder. Raises InputError when it is missing, malformed, too large, or says a thing twice."""
    return _parse_object(read_model_file(path, max_bytes), path)


def _parse_object(data: bytes, path: Path) -> dict:
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:  # each may become an object of 70 bytes
        raise InputError(f"{path}: expected at most {MAX_BRACKETS:,} brackets, found more")
    try:
        content = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """An object; of a key that stands in it twice every reader takes what it likes."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{brief(name)} stands {times} times in one object")
    return content


def open_weights(path: Path, framework: str, max_header_bytes: int = MAX_HEADER_BYTES):
    """An open safetensors file. Raises InputError unless it is whole: a header of a bounded size that names no tensor
    twice (readers take the last one without a word), and, by safetensors itself, offsets that leave no hole and do not
    overlap, sizes that follow from shapes, and a file as long as all that."""
    try:
        if not os.path.isfile(path):
            raise InputError(f"{path}: expected a file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > max_header_bytes:
                raise InputError(f"{path}: expected a header of at most {max_header_bytes:,} bytes, found {length:,}")
            header = file.read(length)
        if len(header) == length:
            _parse_object(header, path)
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not whole (not a whole safetensors file): {first_line(e)}") from None


def indexed_files(index: Path) -> list[Path]:
    """The files that a `model.safetensors.index.json` spreads the weights over.

    Raises InputError when it is malformed, or names a file that is missing, not safetensors or outside its folder."""
    weight_map = read_model_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map, found {brief(weight_map)}")
    if wrong := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise InputError(f"{index}: expected file names, found {brief(wrong[0])}")
    folder, files = index.parent.resolve(), []
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if name != path.name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: expected a .safetensors file of this folder, found {brief(name)}")
        if not os.path.exists(path):  # not path.exists(), which raises for a name that is too long
            raise InputError(f"{index}: names {brief(name)}, which is missing")
        # The hub's cache keeps a model's files in blobs/ and links to them from snapshots/REVISION/.
        if path.resolve().parent not in (folder, folder.parent.parent / "blobs"):
            raise InputError(f"{index}: expected a file of this folder, found {brief(name)}, a link out of it")
        files.append(path)
    return files


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
