"""Preference data sets: files, folders and the hub, row by row, as records of one kind.

A data set is a local file, a local folder or a name on the hub (`ORG/NAME`, `ORG/NAME@REVISION`), the latter two with an
optional split and configuration: `name:test_prefs`, `name:config/test_prefs`, `name:config/`.
Parquet, arrow and the hub are read by `datasets`, which also says which files of a folder make up a split. JSON files
are read by `json`: `datasets` 5.2 turns a column of answers that look like dates into timestamps, refuses lone
surrogates, fills a missing column with null, and does not say which line is malformed. Texts must come out as they
went in.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from conj import InputError
from conj.data.files import first_line, listed
from conj.data.hub import COMMIT, Recorded, find_commit, split_repo
from conj.data.layouts import Preference, recognise

DATA_PARTS = "with :SPLIT or :CONFIG/SPLIT (of the hub ORG/NAME@REVISION too) or without"  # for the help
SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")


def read_preferences(data: str, limit: int | None = None) -> Iterator[Preference]:
    """Records of the first `limit` rows of a data set (all if None), in its order.

    Raises InputError for a data set that is missing, empty or of no known layout, and, with its place, for a bad row."""
    layout = None
    for number, (where, row) in enumerate(read_rows(data)):
        if number == limit:
            break
        try:
            if not isinstance(row, dict):
                raise InputError(f"expected a JSON object, found {type(row).__name__}")
            layout = layout or recognise(row)
            if missing := [column for column in layout.columns if row.get(column) is None]:
                raise InputError(f"missing column {', '.join(missing)}; found {', '.join(sorted(row)) or 'none'}")
            records = [replace(record, where=where) for record in layout.records(row)]
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        yield from records
    if layout is None:
        raise InputError(f"{data}: expected at least one row, found none")


def split_name(data: str) -> tuple[str, str | None]:
    """The path or hub name of a data set, and what is named after a colon: its split, its `configuration/split`, or none."""
    if Path(data).exists() or ":" not in data:
        return data, None
    name, _, split = data.rpartition(":")
    return name, split


def describe_data(data: Sequence[str]) -> list[str]:
    """What a manifest records of data sets: each path or hub name, and the split where one is named."""
    return [part for name in data for part in split_name(name) if part]


def is_on_hub(name: str) -> bool:
    """Whether it may be a name on the hub: a file that was mistyped is none."""
    return not Path(name).exists() and bool(split_repo(name)) and Path(name).suffix not in (*SUFFIXES, ".gz")


def pin_data(data: str, recorded: Recorded = lambda repo: None) -> str:
    """A data set of the hub with the commit that its name leads to: of its revision, else the one that `recorded` knows, else
    the main branch's. Others as they are. No row is read."""
    name, split = split_name(data)
    if not is_on_hub(name):
        return data
    repo, revision = split_repo(name)
    return f"{repo}@{find_commit(repo, revision or recorded(repo))}" + (f":{split}" if split else "")


def without_revision(data: str) -> str:
    """A data set's name, whichever commit of it is read."""
    name, split = split_name(data)
    name = split_repo(name)[0] if is_on_hub(name) else name
    return f"{name}:{split}" if split else name


def read_rows(data: str) -> Iterator[tuple[str, dict]]:
    """Rows of a data set, each with where it stands. Raises InputError when it cannot be read."""
    name, split = split_name(data)
    path = Path(name)
    if path.is_file():
        if split is not None:
            raise InputError(f"{data}: a file has no splits; expected {name}")
        return _read_file(path)
    if not path.is_dir() and not is_on_hub(name):
        raise InputError(f"{name}: no such file or folder")
    return _read_builder(name, split)


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    suffix = Path(path.stem if path.suffix == ".gz" else path).suffix
    if suffix in (".json", ".jsonl"):
        return _read_json(path)
    if suffix in (".parquet", ".arrow") and path.suffix != ".gz":
        return _read_table(path)
    raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)} (JSON also with .gz)")


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON array or of JSON lines, which are read one by one: which of the two, the first character says."""
    head = ""  # up to that character
    try:
        # No other character ends a line: JSON's texts may hold those that Python would take for one.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                head += "" if head.strip() else line
                if head.lstrip().startswith("["):
                    rows = _parse_json(head + file.read(), path, 1)
                    yield from ((f"{path}: row {place}", row) for place, row in enumerate(rows, 1))
                    return
                if line.strip():
                    yield f"{path}:{number}", _parse_json(line.removesuffix("\n"), path, number)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None


def _parse_json(text: str, path: Path, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        line, found = first_line + e.lineno - 1, text[e.pos : e.pos + 40]
        raise InputError(f"{path}:{line}: expected JSON, found {found!r} at column {e.colno} ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # a number or a nesting too long for Python
        raise InputError(f"{path}:{first_line}: expected JSON: {e}") from None


def _read_table(path: Path) -> Iterator[tuple[str, dict]]:
    import datasets  # a second to import, which those who read JSON need not wait for

    try:
        table = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except Exception as e:  # datasets and pyarrow share no base class
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
    for number, row in enumerate(table, 1):
        yield f"{path}: row {number}", row


def _read_builder(name: str, part: str | None) -> Iterator[tuple[str, dict]]:
    """Rows of a folder or of a data set on the hub, whose configurations and splits `datasets` knows."""
    import datasets

    config, _, split = (part or "").rpartition("/")
    repo, revision = (name, None) if Path(name).is_dir() else split_repo(name)
    try:
        builder = datasets.load_dataset_builder(repo, name=config or None, revision=revision)
        splits = list(map(str, builder.info.splits or builder.config.data_files))
    except Exception as e:  # whatever the hub, the network or a data card's parser raises
        if isinstance(e, ValueError):
            _check_config(repo, revision, config)
        raise InputError(f"{name}: expected a folder with data files or a name on the hub: {first_line(e)}") from None
    # Without a network `datasets` takes what it read last, of whichever commit.
    if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
        raise InputError(
            f"{name}: not in the cache at this commit, and the hub cannot be reached; found {builder.hash}"
        )
    if not split:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        place = f"{repo}:{config}/SPLIT" if config else f"{repo}:SPLIT"
        raise InputError(f"{repo}: no split {split!r}; expected {place} with one of {', '.join(splits)}")
    if Path(name).is_dir():
        for file in builder.config.data_files[split]:
            yield from _read_file(Path(file))
        return
    try:
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as e:
        raise InputError(f"{name}:{part or split}: cannot be read: {first_line(e)}") from None
    for number, row in enumerate(table, 1):
        yield f"{name}:{part or split}: row {number}", row


def _check_config(repo: str, revision: str | None, config: str) -> None:
    """Raises InputError, naming those that there are, where a configuration is not, or one has to be named."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(repo, revision=revision)
    except Exception:  # then it was not this
        return
    if config not in names and (config or len(names) > 1):
        found = f"no configuration {config!r}" if config else "has several configurations"
        raise InputError(f"{repo}: {found}; expected {repo}:CONFIG/SPLIT with one of {listed(names)}")
