"""The file of judgments that a stage appends to: what of it is there, and how it ends in the order of its prompts.

Of a row no more is kept in memory than where it starts in the file, so that a stage of a million judgments takes a few
hundred megabytes, and one that was killed finds its rows again in a minute.
"""

from array import array
from collections import Counter
from pathlib import Path

from conj import InputError
from conj.data.files import brief, cut_torn_line, dump_line, locate_jsonl, open_atomic
from conj.sample.engines.completion import name_of

REFUSED = ("content_filter", "context_length")  # reasons of an endpoint's to write no judgment, or not all of it
NOWHERE = -1


class Rows:
    """The rows of `path`, one for each prompt and key: a request's key is a prompt's `id`, then one of `keys`.

    `labels`: the right answer of each prompt by its id, in the order of the prompts. `outcome`: the column that says which
    answer a judgment is for. `columns`: what else a row has, with types, as in `check_columns`.

    Opening it cuts off a torn last line. Raises InputError for a malformed row, and one of no request or that is there
    twice."""

    def __init__(self, path: Path, labels: dict[str, int], keys: list[dict], outcome: str, columns: dict[str, type]):
        self.path, self.labels, self.outcome = path, labels, outcome
        self.counts, self.num_rows, self.num_requests = Counter(), 0, len(labels) * len(keys)
        self._numbers = {id: number for number, id in enumerate(labels)}
        self._places = {name_of(key): place for place, key in enumerate(keys)}
        self._key_columns = ("id", *keys[0])
        self._starts = array("q", [NOWHERE]) * self.num_requests  # bytes, in the order of the requests
        self._size = cut_torn_line(path)
        if self._size:
            needed = dict.fromkeys(self._key_columns, object) | columns | {outcome: object}
            for line, start, row in locate_jsonl(path, needed):
                self._find(row, f"{path}:{line}", start)

    def _find(self, row: dict, where: str, start: int) -> None:
        key = {column: row[column] for column in self._key_columns}
        index = self._index(key)
        if index is None or self._starts[index] != NOWHERE:
            found = ", ".join(f"{column} {brief(value)}" for column, value in key.items())
            wrong = "is no judgment that was asked for" if index is None else "stands here for the second time"
            raise InputError(f"{where}: {found} {wrong}; delete the line")
        self._count(row, index, start)

    def _index(self, key: dict) -> int | None:
        """Which request it is, in the order of prompts and keys; None if it is none."""
        id, *rest = key.values()
        number = self._numbers.get(id) if isinstance(id, str) else None
        place = self._places.get(name_of(dict(enumerate(rest))))
        return None if number is None or place is None else number * len(self._places) + place

    def _count(self, row: dict, index: int, start: int) -> None:
        self._starts[index] = start
        self.num_rows += 1
        self.counts.update(outcomes(row, self.labels[row["id"]], self.outcome))

    def __contains__(self, key: dict) -> bool:
        return self._starts[self._index(key)] != NOWHERE

    def append(self, file, row: dict) -> None:
        """Writes a row to the end of `file`, which is `path` opened for appending bytes."""
        index = self._index({column: row[column] for column in self._key_columns})
        assert self._starts[index] == NOWHERE, row
        line = dump_line(row).encode()
        file.write(line)
        file.flush()
        self._count(row, index, self._size)
        self._size += len(line)

    def put_in_order(self) -> None:
        """Puts the file into the order of the requests, whatever finished first: a run that was killed and one that was
        not leave the same bytes."""
        with open(self.path, "rb") as rows, open_atomic(self.path) as ordered:
            for start in self._starts:
                if start != NOWHERE:
                    rows.seek(start)
                    ordered.write(rows.readline())


def outcomes(row: dict, label: int, outcome: str) -> list[str]:
    """What a judgment counts as: right (its outcome is the label), wrong or unparsed, whether it was cut off at the length
    limit or refused, and its rung."""
    right = "unparsed" if row[outcome] is None else "right" if row[outcome] == label else "wrong"
    cut_off = ["cut_off"] if row["finish_reason"] == "length" else []
    refused = [f"refused_{row['finish_reason']}"] if row["finish_reason"] in REFUSED else []
    return [right, *cut_off, *refused, f"rung_{row['rung']}"]
