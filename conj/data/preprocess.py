"""Stage 1: any preference data sets to `prompts.jsonl`, one question with two answers and a label a row.

Which answer comes first is decided by a coin from the seed and the record's id, and the id is a hash of the record's
content: neither depends on the order of rows or on the machine. Left out, and counted: identical answers (nothing to
prefer), ties, a chosen and a rejected conversation that ask different things, questions that stand in a benchmark
(`--exclude`), duplicates, and pairs that are labelled both ways (conj/data/overlap.py says what is the same). Kept, and
counted: empty answers, and answers that are not strings, as their JSON text.

    python -m conj.data.preprocess --run-dir runs/demo --data HuggingFaceH4/ultrafeedback_binarized:train_prefs

The same from Python, of a DataFrame, a `datasets.Dataset` or an iterable of dicts:

    write_prompts("runs/mine", frame, columns={"question": "ask", "better": "win", "worse": "lose"})
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from conj import InputError
from conj.data import manifest
from conj.data.benchmarks import BENCHMARKS, locate_data, official_subset, resolve_data
from conj.data.columns import given_layout
from conj.data.fates import Fates
from conj.data.files import listed, stream_jsonl, write_jsonl
from conj.data.identity import EXCLUDED
from conj.data.manifest import RunOptions
from conj.data.options import option, require, require_each, run_command
from conj.data.overlap import Asked, AskedQuestions, Entry, drop_repeats
from conj.data.progress import progress
from conj.data.prompts import question_of
from conj.data.readers import (
    DATA_PARTS,
    describe_data,
    describe_rows,
    is_on_hub,
    read_preferences,
    read_twice,
    split_name,
    without_revision,
)
from conj.data.rows import SWAPPED, Preference, swapped


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(RunOptions):
    BENCHMARKS: ClassVar[tuple[str, ...]] = ("exclude",)

    data: tuple[str, ...] = option(
        help=f"preference data: files, folders or hub names, each {DATA_PARTS}", affects_result=False
    )
    columns: tuple[str, ...] | None = option(
        None, help="where a row holds what, as question=PATH better=PATH worse=PATH …; by default by the known layouts"
    )
    exclude: tuple[str, ...] = option(
        (), help="benchmarks by name, NAME=PATH, or files, folders and hub names, whose questions are left out; in `conj run` "
        "by default the data of stage 7", affects_result=False,
    )  # fmt: skip
    seed: int = option(2021, help="seed of the order of the two answers")
    subsets: tuple[str, ...] = option((), help="names of the subsets to keep; all if not given")
    limit: int | None = option(None, help="number of rows read from the head of each data set; all if not given")
    both_orders: bool = option(False, help="two prompts a row, one in each order: against a base's position bias")

    def makes(self) -> dict[Path, list]:
        excluded = [EXCLUDED, *describe_data([locate_data(name)[0] for name in self.exclude])] if self.exclude else []
        return {self.run_dir / "prompts.jsonl": [*describe_data(self.data), *excluded]}

    def __post_init__(self):
        require_each(self, ("limit",), lambda value: value > 0, "a positive number of rows")
        for part in self.columns or ():
            name, equals, path = part.partition("=")
            require(bool(name and equals and path), f"--columns: expected TARGET=PATH, found {part}")
        if columns := as_mapping(self.columns):
            require(
                len(columns) == len(self.columns),
                f"--columns: expected each target once, found {', '.join(self.columns)}",
            )
            given_layout(columns)  # refuses what no row could be read by


def preprocess(options: PreprocessOptions) -> None:
    """Writes `prompts.jsonl`. Raises InputError for unusable data or when every record is left out."""
    _write(options, options.data, options.exclude)


def _write(options: PreprocessOptions, data: Sequence, exclude: Sequence) -> None:
    began, [(artefact, inputs)] = time.monotonic(), options.makes().items()
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    fates, columns = Fates(), as_mapping(options.columns)
    asked = read_asked(exclude, columns) if exclude else None
    rows = make_rows(data, options.seed, options.subsets, options.limit, columns=columns, asked=asked, fates=fates)
    num_rows = write_jsonl(artefact, in_both_orders(rows) if options.both_orders else rows)
    found = asked.found if asked else []
    report = fates.report() | ({"excluded": found} if asked else {})
    manifest.finish(
        artefact, num_rows=num_rows, counts=dict(fates.counts), seconds=time.monotonic() - began, fates=report
    )
    for line in _lines(fates, found):
        print(line)


def in_both_orders(rows: Iterable[dict]) -> Iterator[dict]:
    """Each row, and then the same with its answers the other way round, whose id ends with SWAPPED."""
    for row in rows:
        yield row
        other = {"id": row["id"] + SWAPPED, "answer_1": row["answer_2"], "answer_2": row["answer_1"]}
        yield row | other | {"label": swapped(row["label"])}


def as_mapping(columns: Sequence[str] | None) -> dict[str, str] | None:
    """What `--columns` gives, as `read_preferences` takes it."""
    return None if columns is None else dict(part.split("=", 1) for part in columns)


def _lines(fates: Fates, excluded: list[dict]) -> Iterator[str]:
    """What became of rows and columns, with an example each, for the terminal."""
    for fate, where in fates.examples.items():
        if fate not in ("records", "left_out_excluded"):
            yield f"  {fate}: {fates.counts[fate]}, first {where}"
    for column, found in fates.leftover.items():
        yield f"  column {column!r} is not used: {found['rows']} rows, {found['example']}"
    for found in excluded[:10]:
        share = "the same text" if found["share"] == 1 else f"{found['share']:.0%} of the words"
        yield f"  {found['id']} ({found['where']}) stands in {found['in']} as {found['its_id']} ({found['its_where']}): {share}"
    if len(excluded) > 10:
        yield f"  and {len(excluded) - 10} more, see the manifest"


def load_prompts(
    data,
    seed: int = 2021,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    benchmark: bool = False,
    columns: Mapping[str, str] | None = None,
    exclude: Sequence = (),
) -> tuple[list[dict], dict[str, int]]:
    """Rows as in `prompts.jsonl`, and how many records met each fate (`empty_answers` and the like count answers).

    `data`: a name as of `--data`, a DataFrame, a `datasets.Dataset` or an iterable of dicts, or a list of these. `columns`:
    where a row holds what, see docs/data.md. `exclude`: data sets and benchmarks whose questions are left out.
    With `benchmark`, for evaluation: `data` may name benchmarks (see `resolve_data`), rows say which they are of, and
    official numbers of rows are kept to: a repeated row stays (the second with id `ID-2`), and so does a tie, with
    label 0, where the benchmark has ties. Such rows also hold its annotators' `votes`.

    Raises InputError for unusable data, a subset that is not there, or when every record is left out."""
    fates, sets, excluded = Fates(), data_sets(data), data_sets(exclude)
    asked = read_asked(excluded, columns) if excluded else None
    rows = make_rows(sets, seed, subsets, limit, benchmark, columns=columns, asked=asked, fates=fates)
    return list(rows), dict(fates.counts)


def write_prompts(
    run_dir: str | Path,
    data,
    *,
    seed: int = 2021,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    exclude: Sequence = (),
    both_orders: bool = False,
) -> Path:
    """Writes a run folder's `prompts.jsonl` and its manifest, from which stages 2 to 7 go on, and returns its path. The
    arguments are those of `load_prompts`, and with `both_orders` there are two prompts a row. What is no name is described in
    the manifest by a hash of its rows.

    Raises InputError as `load_prompts` does, and where a file of other data or options stands there."""
    sets, excluded = ([read_twice(given) for given in data_sets(some)] for some in (data, exclude))
    options = PreprocessOptions(
        run_dir=Path(run_dir), data=tuple(map(describe_rows, sets)), exclude=tuple(map(describe_rows, excluded)), seed=seed,
        subsets=tuple(subsets), limit=limit, columns=tuple(f"{k}={v}" for k, v in (columns or {}).items()) or None,
        both_orders=both_orders,
    ).at_hand()  # fmt: skip
    named = [
        [name if isinstance(given, str) else given for given, name in zip(given_sets, names)]
        for given_sets, names in ((sets, options.data), (excluded, options.exclude))
    ]
    _write(options, *named)
    return options.run_dir / "prompts.jsonl"


def data_sets(data) -> list:
    """The data sets of an argument: the parts of a list, unless it is rows; all else stands for itself."""
    is_several = isinstance(data, list | tuple) and not (data and all(isinstance(part, dict) for part in data))
    return [str(part) if isinstance(part, Path) else part for part in (data if is_several else [data])]


def read_asked(exclude: Sequence, columns: Mapping[str, str] | None = None) -> AskedQuestions:
    """The questions of benchmarks and other data sets, whatever they prefer. `columns` hold for those that have them and
    are no benchmark."""
    asked = AskedQuestions()
    for given in exclude:
        data, known, source = _open(given, True)
        records = read_preferences(data, columns=None if known else columns, where_they_fit=True)
        for record in progress(records, desc=f"reading {source}", unit=" records"):
            id = make_row(record, source, None, known)["id"]
            asked.add(record.question, Asked(id=id, source=known or source, where=record.where))
    return asked


def _open(given, is_benchmark: bool) -> tuple:
    """What `read_preferences` is to read of a data set, which benchmark it is ("" for none), and how rows name it."""
    if not isinstance(given, str):
        return given, "", type(given).__name__
    name, known = resolve_data(given) if is_benchmark else (given, "")
    return name, known, without_revision(name) if is_on_hub(split_name(name)[0]) else Path(name).name


def make_rows(
    data: Sequence,
    seed: int,
    subsets: Sequence[str],
    limit: int | None,
    benchmark: bool = False,
    *,
    fates: Fates,
    columns: Mapping[str, str] | None = None,
    asked: AskedQuestions | None = None,
) -> Iterator[dict]:
    """The rows of `load_prompts`; `fates`, and what `asked` has found, are whole when they are all there. Without
    `benchmark` the first comes when the last is read, and between the two they lie in a temporary file."""
    if not data:
        raise InputError("data: expected a data set or rows, found none")
    fates.add("records", number=0)
    if asked:
        fates.add("left_out_excluded", number=0)
    entries, ids = _make_entries(data, seed, subsets, limit, benchmark, columns, asked, fates), set()
    for row, where, num_non_strings in entries if benchmark else drop_repeats(entries, fates):
        row["id"] = unused_id(row["id"], ids)
        ids.add(row["id"])
        if not _last_text(row).strip():
            fates.add("empty_questions", where)
        fates.add("empty_answers", where, [row["answer_1"], row["answer_2"]].count(""))
        fates.add("non_string_answers", where, num_non_strings)
        yield row
    if not ids:
        names = ", ".join(_open(given, False)[2] for given in data)
        hint = "; without --exclude their questions stay" if fates.counts["left_out_excluded"] else ""
        raise InputError(f"{names}: every record was left out: {dict(fates.counts)}{hint}")


def _make_entries(
    data: Sequence, seed: int, subsets: Sequence[str], limit: int | None, benchmark: bool,
    columns: Mapping[str, str] | None, asked: AskedQuestions | None, fates: Fates,
) -> Iterator[Entry]:  # fmt: skip
    found = set()
    for given in data:
        name, known, source = _open(given, benchmark)
        records = read_preferences(name, limit, columns=columns, fates=fates)
        for record in progress(records, desc=f"reading {source}", unit=" records"):
            fates.add("records", record.where)
            row = make_row(record, source, seed, known if benchmark else None)
            found.add(row["subset"])
            reason = _why_left_out(record, row, subsets)
            if not reason and asked and asked.take_out(record.question, row["id"], record.where):
                reason = "excluded"
            if reason:
                fates.add(f"left_out_{reason}", record.where)
                continue
            yield Entry(row, record.where, sum(not isinstance(a, str) for a in (record.better, record.worse)))
    if missing := sorted(set(subsets) - found):
        raise InputError(f"--subsets: no records of {listed(missing, repr)}; found {listed(sorted(found), repr)}")


def _why_left_out(record: Preference, row: dict, subsets: Sequence[str]) -> str | None:
    if subsets and row["subset"] not in subsets:
        return "subset"
    votes = row.get("votes")
    if record.unusable and not (votes and record.unusable == "tie"):
        return record.unusable
    if votes:  # a tie is an answer; three annotators of three minds have no majority
        return "no_majority" if len(set(votes)) == len(votes) else None
    return "identical" if row["answer_1"] == row["answer_2"] else None


def _last_text(row: dict) -> str:
    """What the answers answer: the question, or the last of its turns."""
    question = question_of(row)
    return question if isinstance(question, str) else question[-1]["content"]


def unused_id(id: str, ids: Collection[str]) -> str:
    """The id, or for one that is in `ids` already `ID-2`, then `ID-3`."""
    k, free = 1, id
    while free in ids:
        free = f"{id}-{(k := k + 1)}"
    return free


def make_row(record: Preference, source: str, seed: int | None, benchmark: str | None = None) -> dict:
    """A record as a row of `prompts.jsonl`; its label is where the coin puts the better answer. Without a seed there is
    no coin: the answers stand as in the source.

    With `benchmark`, its name or "", a row for evaluation: see `load_prompts`."""
    better, worse = (a if isinstance(a, str) else json.dumps(a) for a in (record.better, record.worse))
    identity = json.dumps([record.question, better, worse, record.subset], sort_keys=True)
    id = hashlib.sha256(identity.encode()).hexdigest()[:16]
    coin = hashlib.sha256(f"{seed}:{id}".encode()).digest()[0] % 2 == 1
    swap = record.place == 2 if seed is None else coin
    row = {
        "id": id, "question" if isinstance(record.question, str) else "messages": record.question,
        "answer_1": worse if swap else better, "answer_2": better if swap else worse, "label": 2 if swap else 1,
        "source": source, "subset": record.subset,
    }  # fmt: skip
    if benchmark is not None:
        row |= {"subset": official_subset(benchmark, record.subset, record.where), "benchmark": benchmark}
    if benchmark and BENCHMARKS[benchmark].has_ties:
        row["label"] = 0 if record.unusable == "tie" else row["label"]
        row["votes"] = [swapped(vote) if swap else vote for vote in record.votes]
    return row


def read_prompts(path: Path) -> list[dict]:
    """Rows of a `prompts.jsonl`, all at once; see `stream_prompts`."""
    return list(stream_prompts(path))


def stream_prompts(path: Path) -> Iterator[dict]:
    """Rows of a `prompts.jsonl`. Raises InputError for a file that stage 1 did not write so."""
    texts, ids = ("id", "answer_1", "answer_2", "source", "subset"), set()
    for number, row in stream_jsonl(path, dict.fromkeys(texts, str) | {"label": int}):
        if ("question" in row) == ("messages" in row):
            raise InputError(f"{path}:{number}: expected either question or messages")
        turns = [{"role": "user", "content": row["question"]}] if "question" in row else row["messages"]
        if not is_conversation(turns):
            raise InputError(f"{path}:{number}: expected a question of text or of messages, found {str(turns)[:60]!r}")
        if row["label"] not in (1, 2):
            raise InputError(f"{path}:{number}: expected label 1 or 2, found {row['label']!r}")
        if row["id"] in ids:
            raise InputError(f"{path}:{number}: id {row['id']} appears twice")
        ids.add(row["id"])
        yield row


def is_conversation(turns) -> bool:
    """Whether this is a list, not empty, of messages with a role and a content of text."""
    return bool(turns) and isinstance(turns, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    )  # fmt: skip


if __name__ == "__main__":
    run_command(preprocess, PreprocessOptions, __doc__)
