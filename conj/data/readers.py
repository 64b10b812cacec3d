"""Preference data sets: files, folders, the hub and Python objects, row by row, as records of one kind.

A data set is a local file, a pattern of files (`data/*.jsonl.zst`), a local folder or a name on the hub (`ORG/NAME`,
`ORG/NAME@REVISION`), the latter two with an optional split and configuration: `name:test_prefs`,
`name:config/test_prefs`, `name:config/`. In Python it may also be a pandas frame, an arrow table, a `Dataset`,
or any iterable of dicts.
Parquet, arrow and the hub are read by `datasets`, which also says which files of a folder make up a split. JSON and CSV
are read by `conj.data.texts`. Texts must come out as they went in.
"""

import glob
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path

from conj import InputError
from conj.data.columns import Layout, check_labels, fit, given_layout, recognise
from conj.data.fates import Fates
from conj.data.files import first_line, listed
from conj.data.hub import COMMIT, Recorded, find_commit, split_repo
from conj.data.layouts import read_records
from conj.data.rows import Preference
from conj.data.texts import PACKED, number_rows, read_csv, read_json

DATA_PARTS = "with :SPLIT or :CONFIG/SPLIT (of the hub ORG/NAME@REVISION too) or without"  # for the help
READERS = {".json": read_json, ".jsonl": read_json, ".ndjson": read_json, ".csv": read_csv, ".tsv": read_csv}
TABLES = (".parquet", ".arrow")
SUFFIXES = (*READERS, *TABLES)
TOO_DEEP = "expected texts and messages, found values nested too deeply"
METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # what `save_to_disk` adds


def read_preferences(
    data: str | Path | Iterable[dict],
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    fates: Fates | None = None,
    where_they_fit: bool = False,
) -> Iterator[Preference]:
    """Records of the first `limit` rows of a data set (all if None), in its order.

    `columns` says which column is what (target -> path, see `conj.data.columns`) where the layout is none of the known; with
    `where_they_fit` only if the first row has these columns.
    `fates` gets the columns that nothing was made of, and what became of rows of several answers. Raises InputError for a
    data set that is missing, empty or of no known layout, and, with its place, for a bad row."""
    layout, fates, labels = given_layout(columns) if columns else None, fates or Fates(), set()
    number = -1
    for number, (where, row) in enumerate(read_rows(data, fates)):
        if number == limit:
            break
        try:
            if not isinstance(row, dict):
                raise InputError(f"expected a JSON object, found {type(row).__name__}")
            if number == 0:
                layout = _choose(layout, row, where_they_fit)
            records = read_records(layout, row, where, fates, labels)
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        except RecursionError:
            raise InputError(f"{where}: {TOO_DEEP}") from None
        yield from records
    if number < 0 or limit == 0:
        raise InputError(f"{_name(data)}: expected at least one row, found none")
    check_labels(layout, labels)


def check_first_row(data: str, columns: Mapping[str, str] | None, where_they_fit: bool) -> None:
    """Raises InputError as `read_preferences` does for a data set that is missing, empty, or of no known layout. What is
    on the hub is not asked for."""
    read_rows(data)  # nothing is read before the first row is asked for
    if not is_on_hub(split_name(data)[0]):
        next(read_preferences(data, 1, columns, where_they_fit=where_they_fit))


def _choose(given: Layout | None, row: dict, where_they_fit: bool) -> Layout:
    try:
        return fit(given, row) if given else recognise(row)
    except InputError:
        if given and where_they_fit:
            return recognise(row)
        raise


def split_name(data: str) -> tuple[str, str | None]:
    """The path or hub name of a data set, and what is named after a colon: its split, its `configuration/split`, or none."""
    if Path(data).exists() or ":" not in data:
        return data, None
    name, _, split = data.rpartition(":")
    return name, split


def describe_data(data: Sequence[str]) -> list[str]:
    """What a manifest records of data sets: each path (of a pattern, all that fit) or hub name, and a split that is named."""
    return [part for name in data for whole in expand(name) for part in split_name(whole) if part]


def is_on_hub(name: str) -> bool:
    """Whether it may be a name on the hub: a file that was mistyped is none."""
    return not Path(name).exists() and bool(split_repo(name)) and Path(name).suffix not in (*SUFFIXES, *PACKED)


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


def expand(data: str) -> list[str]:
    """The files that fit a pattern such as `data/*.jsonl`, sorted; any other data set as it is. Raises InputError for none."""
    if Path(data).exists() or not glob.has_magic(data):
        return [data]
    if not (files := sorted(path for path in glob.glob(data, recursive=True) if Path(path).is_file())):
        raise InputError(f"{data}: no file fits this pattern")
    return files


def read_rows(data: str | Path | Iterable[dict], fates: Fates | None = None) -> Iterator[tuple[str, dict]]:
    """Rows of a data set, each with where it stands. Raises InputError when it cannot be read."""
    if not isinstance(data, str | Path):
        return _read_objects(data)
    files = expand(str(data))
    if files != [str(data)]:
        return (row for file in files for row in _read_file(Path(file)))
    name, split = split_name(str(data))
    path = Path(name)
    if path.is_file():
        if split is not None:
            raise InputError(f"{data}: a file has no splits; expected {name}")
        return _read_file(path)
    if not path.is_dir() and not is_on_hub(name):
        raise InputError(f"{name}: no such file or folder")
    return _read_builder(name, split, fates or Fates())


def _name(data) -> str:
    return str(data) if isinstance(data, str | Path) else type(data).__name__


def _read_objects(data) -> Iterator[tuple[str, dict]]:
    """Rows of a frame, a table, a `Dataset` or an iterable of dicts."""
    pandas, name = sys.modules.get("pandas"), _name(data)  # who has a frame has imported it
    if isinstance(data, Mapping):
        raise InputError(
            f"{name}: expected rows, found a mapping of {listed(list(map(str, data)))}; give one of its members"
        )
    if pandas is not None and isinstance(data, pandas.DataFrame):
        named = [level for level in data.index.names if level is not None]
        _check_names(name, [*named, *data.columns])
        frame = data.reset_index() if named else data
        rows = (dict(zip(map(str, frame.columns), values)) for values in frame.itertuples(index=False, name=None))
    elif hasattr(data, "to_batches"):  # arrow
        _check_names(name, data.schema.names)
        rows = (row for batch in data.to_batches() for row in batch.to_pylist())
    elif isinstance(data, Iterable):
        rows = data
    else:
        raise InputError(f"{name}: expected a file, a folder, a frame or rows that are dicts")
    return _plain_rows(rows, name)


def read_twice(given):
    """A data set that can be read more than once: of an iterator, the rows as a list."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, Sized) else given


def describe_rows(given) -> str:
    """A data set's name; of one that has none, what it is and a hash of its rows, as `identity.ROWS` reads it."""
    if isinstance(given, str):
        return given
    content, num_rows = hashlib.sha256(), 0
    for _, row in read_rows(given):
        content.update(json.dumps(row, sort_keys=True, default=str).encode())
        num_rows += 1
    return f"{type(given).__name__} of {num_rows} rows with sha256 {content.hexdigest()}"


def _check_names(data: str, names: Iterable) -> None:
    """Raises InputError for a column that stands twice: a row that is a dict would keep the last of them alone."""
    counts = Counter(map(str, names))
    if twice := [name for name, number in counts.items() if number > 1]:
        raise InputError(
            f"{data}: expected columns (and levels of the index) of different names, found {twice[0]} twice"
        )


def _plain_rows(rows: Iterable, name: str) -> Iterator[tuple[str, dict]]:
    for where, row in number_rows(rows, name):
        try:
            plain = _plain(row)
        except RecursionError:
            raise InputError(f"{where}: {TOO_DEEP}") from None
        yield where, plain


def _plain(value):
    """Python's own types for those of numpy, inside of lists and dicts too."""
    if isinstance(value, str | bool | int | float | None):
        return value.item() if hasattr(value, "dtype") else value  # numpy's float64 is a float
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return _plain(value.tolist())
    return (
        None if type(value).__name__ == "NAType" else value
    )  # pandas' own null is neither equal nor unequal to itself


def _suffix(path: Path) -> str:
    """What its name says that a file is, packed or not."""
    return Path(path.stem if path.suffix in PACKED else path).suffix


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    suffix = _suffix(path)
    if suffix in READERS:
        return READERS[suffix](path)
    if suffix in TABLES and path.suffix not in PACKED:
        return _read_table(path)
    raise InputError(
        f"{path}: expected a file ending in {', '.join(SUFFIXES)} (JSON and CSV also with {', '.join(PACKED)})"
    )


def _read_table(path: Path) -> Iterator[tuple[str, dict]]:
    import datasets  # a second to import, which those who read JSON need not wait for

    try:
        table = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except Exception as e:  # datasets and pyarrow share no base class
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
    yield from number_rows(table, path)


def _read_builder(name: str, part: str | None, fates: Fates) -> Iterator[tuple[str, dict]]:
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
        known = {str(Path(file).resolve()) for files in builder.config.data_files.values() for file in files}
        for file in sorted(_data_files(Path(name))):  # `datasets` takes files of one kind alone
            if str(file.resolve()) not in known:
                fates.add("files_not_read", str(file))
        for file in builder.config.data_files[split]:
            yield from _read_file(Path(file))
        return
    try:
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as e:
        raise InputError(f"{name}:{part or split}: cannot be read: {first_line(e)}") from None
    yield from number_rows(table, f"{name}:{part or split}")


def _data_files(folder: Path) -> Iterator[Path]:
    """The files in a folder that their names say are data."""
    for path in folder.rglob("*"):
        if _suffix(path) in SUFFIXES and path.is_file() and path.name not in METADATA:
            yield path


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
