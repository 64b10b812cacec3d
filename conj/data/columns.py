"""Column maps: which column of a row is the question, which are the answers, and what nothing was made of.

The layouts of public data sets are maps in `layouts.toml`; `--columns question=… better=… worse=…` is one of the user's.
A path is a column, or goes on below it: `info.post`, `chosen.-1.content`, `completions.*.response`.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import UnionType

from conj import InputError

ANSWERS = {  # the ways to state a preference: what a map must have of each
    "pair": ("better", "worse"),
    "two": ("answer_1", "answer_2"),
    "ranked": ("answers",),
    "sorted": ("betters", "worses"),
}
STATED = {  # by what, where the answers do not say it themselves: one of these
    "two": ("label", "index", "votes", "score_1"),
    "ranked": ("scores", "ranks"),
}
OF_KIND = {"pair": ("score_better", "score_worse"), "two": (*STATED["two"], "score_2"), "ranked": STATED["ranked"]}
TARGETS = {
    "question", "context", "system", "history", "tools", "subset", "id", "turn",
    "better", "worse", "score_better", "score_worse", "answer_1", "answer_2", "label", "index", "votes", "score_1",
    "score_2", "answers", "scores", "ranks", "betters", "worses",
}  # fmt: skip
# An empty cell there is counted; of any other target it is a mistake.
NULLABLE = ("question", "better", "worse", "answer_1", "answer_2")
OPTIONAL = ("context", "system", "history", "tools", "subset", "id", "turn", "score_better", "score_worse")
EVERY = ("system", "history", "tools", "subset", "id")  # read in every built-in layout where a row has them
GIVEN_LABELS = {  # what a label of the user's map may say
    "first": (1, "A", "a", "A>B", "model_a"),
    "second": (2, "B", "b", "B>A", "model_b"),
    "tie": (0, "tie", "Tie", "A=B"),
}
MAX_SUGGESTIONS = 3
GONE = object()


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A column map. `layouts.toml` says what each field means."""

    name: str
    columns: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]  # target -> paths
    lists: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)  # subset -> column of its label
    first: tuple = (1,)
    second: tuple = (2,)
    tie: tuple = (0,)
    ask: str = ""
    grid: bool = False
    turns_as_json: bool = False
    known: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return next(kind for kind, targets in ANSWERS.items() if targets[0] in self.paths)

    def fits(self, row: dict) -> bool:
        return row.keys() >= set(self.columns) and all(is_texts(row[column]) for column in self.lists)


def is_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def missing(value) -> bool:
    """Whether a cell is empty: null, or the NaN that pandas puts there."""
    return value is None or value != value


def holds(value) -> bool:
    """Whether there is anything in a value: not in "", [], {}, a list of nulls."""
    if isinstance(value, list | tuple):
        return any(map(holds, value))
    return not missing(value) and value not in ("", {})


@cache
def tables() -> dict:
    return tomllib.loads(Path(__file__).with_name("layouts.toml").read_text("utf-8"))


@cache
def layouts() -> tuple[Layout, ...]:
    """The layouts of `layouts.toml`, in its order."""
    return tuple(_layout(table) for table in tables()["layout"])


def _layout(table: dict) -> Layout:
    every = tables()["every"]
    fields = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key not in TARGETS
    }
    paths = {key: _several(value) for key, value in table.items() if key in TARGETS}
    paths |= {target: _several(every[target]) for target in EVERY if target not in paths}
    known = frozenset(every["known"]) | frozenset(fields.pop("known", ()))
    no_tie = {"tie": ()} if "first" in fields else {}
    return Layout(paths=paths, known=known, **no_tie | fields)


def _several(paths: str | list[str]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def recognise(row: dict) -> Layout:
    """The layout of a row. Raises InputError when it is none of `layouts`."""
    for layout in layouts():
        if layout.fits(row):
            return layout
    shares = {layout: len(row.keys() & set(layout.columns)) / len(layout.columns) for layout in layouts()}
    near = sorted((layout for layout in shares if shares[layout] >= 0.5), key=lambda layout: -shares[layout])
    nearest = "; ".join(f"{layout.name} ({', '.join(layout.columns)})" for layout in near[:MAX_SUGGESTIONS])
    raise InputError(
        f"columns {', '.join(map(str, row)) or 'none'} are of no known layout: name them by --columns question=… better=… "
        f"worse=… (docs/data.md)" + (f"; nearest layouts: {nearest}" if nearest else "")
    )


def given_layout(columns: Mapping[str, str]) -> Layout:
    """The user's column map. Raises InputError for a target that there is not, or a map that states no preference."""
    if unknown := [target for target in columns if target not in TARGETS]:
        raise InputError(f"--columns {unknown[0]}=: no such target; expected one of {', '.join(sorted(TARGETS))}")
    if empty := [target for target, path in columns.items() if not isinstance(path, str) or not path]:
        raise InputError(f"--columns {empty[0]}: expected the name of a column, found {columns[empty[0]]!r}")
    kinds = [kind for kind, targets in ANSWERS.items() if any(target in columns for target in targets)]
    if len(kinds) != 1 or any(target not in columns for target in ANSWERS[kinds[0]]):
        expected = " or ".join(" and ".join(targets) for targets in ANSWERS.values())
        raise InputError(f"--columns: expected {expected}; found {', '.join(columns) or 'none'}")
    others = {target for targets in OF_KIND.values() for target in targets} - set(OF_KIND.get(kinds[0], ()))
    if unread := [target for target in columns if target in others]:
        raise InputError(f"--columns {unread[0]}=: not read beside {' and '.join(ANSWERS[kinds[0]])}")
    stated = [target for target in STATED.get(kinds[0], ()) if target in columns]
    if kinds[0] in STATED and len(stated) != 1:
        raise InputError(
            f"--columns: expected one of {', '.join(STATED[kinds[0]])}; found {', '.join(stated) or 'none'}"
        )
    if ("score_1" in columns) != ("score_2" in columns) or ("score_better" in columns) != ("score_worse" in columns):
        raise InputError("--columns: expected the scores of both answers, found one")
    paths = {target: _several(path) for target, path in columns.items()}
    labels = GIVEN_LABELS
    if "index" in paths:  # a label that counts from 0
        paths["label"] = paths.pop("index")
        labels = {"first": (0,), "second": (1,), "tie": ()}
    known = frozenset(tables()["every"]["known"])
    return Layout(name="--columns", columns=(), paths=paths, known=known, **labels)


def fit(layout: Layout, row: dict) -> Layout:
    """The user's column map, which is to read rows like this first one. Raises InputError for a path that is not there."""
    needed = set()
    for target, paths in layout.paths.items():
        for path in paths:
            steps = (path,) if path in row else _steps(path)
            if _find(row, steps, GONE) is GONE:
                found = ", ".join(sorted(map(str, row))) or "none"
                what = "no such column" if steps[0] not in row else "leads to nothing in the first row"
                raise InputError(f"--columns {target}={path}: {what}; found {found}")
            if target not in OPTIONAL:
                needed.add(steps[0])
    return replace(layout, columns=tuple(sorted(needed)))


def check_labels(layout: Layout, labels: set) -> None:
    """Raises InputError where the labels of a column are 0 and 1 alone: read as a tie and the first answer, each would be
    wrong if they count from 0."""
    if 0 in layout.tie and 1 in layout.first and labels in ({0, 1}, {"0", "1"}):
        column = layout.paths["label"][0]
        raise InputError(
            f"labels in {column}: expected 1, 2, or 0 for a tie, found 0 and 1 alone; where 0 is the first answer, "
            f"give --columns … index={column}"
        )


@lru_cache(4096)
def is_known(layout: Layout, name: str) -> bool:
    """Whether a column, or a key below one, or what that is a part of, is among those that are not needed."""
    return name in layout.known or any(is_known(layout, name[: end.start()]) for end in re.finditer(r"\[\]|\.", name))


class Cells:
    """A row while it is read by a layout: its values by target, and which columns were used for them."""

    def __init__(self, layout: Layout, row: dict):
        self.layout, self.row = layout, row
        self.used: dict[str, list[tuple[str, ...]]] = {}  # column -> paths below it that were read; () is all of it
        self.values: dict[str, object] = {}  # target -> what was read
        self.left: dict[str, object] = {}  # parts of messages that nothing was made of: name -> value
        self.counts: Counter[str] = Counter()  # fates of this row's answers
        if gone := [column for column in layout.columns if column not in row]:
            raise InputError(f"missing column {', '.join(gone)}; found {', '.join(sorted(map(str, row))) or 'none'}")
        if empty := [column for column in layout.columns if self._is_mistake(column)]:
            raise InputError(f"expected a value in column {', '.join(empty)}, found null")
        for column in tables()["every"]["media"]:
            if column in row and holds(row[column]):
                raise InputError(
                    f"{column} holds {str(row[column])[:40]!r}: expected text alone, a judge here reads no media"
                )

    def _is_mistake(self, column: str) -> bool:
        if not missing(self.row[column]):
            return False
        targets = (target for target in NULLABLE if target in self.layout.paths)
        return not any(path.partition(".")[0] == column for target in targets for path in self.layout.paths[target])

    def get(self, target: str):
        """What the first path of a target that leads to something leads to, be it empty where all are; None if none."""
        return self._get(target, holds, or_first=True)

    def get_only(self, target: str, kind: type | UnionType):
        """What the first path of a target that leads to one of `kind` leads to; None if none."""
        return self._get(target, lambda value: isinstance(value, kind), or_first=False)

    def _get(self, target: str, accept: Callable[[object], bool], or_first: bool):
        if target not in self.values:
            found = [(path, value) for path in self._open(target) if (value := _find(self.row, path)) is not None]
            first = found[0] if found and or_first else ((), None)
            path, value = next((item for item in found if accept(item[1])), first)
            if path:
                self.used.setdefault(path[0], []).append(path[1:])
            self.values[target] = value
        return self.values[target]

    def get_all(self, target: str) -> list:
        """What each path of a target leads to; of a single path to a list, its items."""
        paths = list(self._open(target))
        for path in paths:
            self.used.setdefault(path[0], []).append(path[1:])
        values = [_find(self.row, path) for path in paths]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values

    def take(self, column: str):
        """The value of a column, which counts as used."""
        self.used.setdefault(column, []).append(())
        return self.row[column]

    def column(self, target: str) -> str:
        """The column that a target's first path starts at, for messages."""
        return self.layout.paths[target][0].partition(".")[0]

    def has(self, target: str) -> bool:
        """Whether the row has a column of this target, be it empty."""
        return any(path in self.row or path.partition(".")[0] in self.row for path in self.layout.paths.get(target, ()))

    def _open(self, target: str) -> Iterator[tuple[str, ...]]:
        """A target's paths that start at a column of the row which is not used as a whole: a column is used once."""
        for path in self.layout.paths.get(target, ()):
            steps = (path,) if path in self.row else _steps(path)  # a column's name may hold dots
            if steps[0] in self.row and () not in self.used.get(steps[0], ()):
                yield steps

    def unread(self) -> Iterator[tuple[str, object, bool]]:
        """Columns, and keys below them, that hold something and were not read: name, value, whether the layout knows them."""
        for column, value in self.row.items():
            paths = self.used.get(column)
            if paths is None:
                if holds(value):
                    yield column, value, is_known(self.layout, column)
            elif () not in paths:
                for name, item in dict(_unread(value, paths, column)).items():
                    if holds(item):
                        yield name, item, is_known(self.layout, name)
        for name, value in self.left.items():
            yield name, value, is_known(self.layout, name)


@cache
def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _find(value, path: tuple[str, ...], gone=None):
    """What a path leads to; `gone` where it ends before. After `*`, a list of what each item leads to."""
    for depth, step in enumerate(path):
        if step == "*":
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            found = [_find(item, path[depth + 1 :], gone) for item in items]
            return gone if gone is GONE and all(item is GONE for item in found) else found
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.removeprefix("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return gone
    return value


def _unread(value, paths: list[tuple[str, ...]], name: str) -> Iterator[tuple[str, object]]:
    """The parts of a value that none of the paths leads to or through."""
    if () in paths:
        return
    if isinstance(value, dict):
        parts = [(f"{name}.{key}", item, (key,)) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"{name}[]", item, (str(i), str(i - len(value)))) for i, item in enumerate(value)]
    else:
        parts = []
    for part, item, steps in parts:
        below = [path[1:] for path in paths if path[0] == "*" or path[0] in steps]
        if below:
            yield from _unread(item, below, part)
        else:
            yield part, item
