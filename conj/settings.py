"""The commands, and a file of settings for all stages of a run: from TOML to the options of every stage.

    run_dir = "runs/mine"
    model = "models/Qwen2-7B-Instruct"

    [dpo]
    learning_rate = 1e-6

What stands above the tables reaches every stage that has such an option (one that asks an endpoint has no device of its own);
what stands in a stage's table wins, and the command line over both. `[runs.NAME.STAGE]` tables make a sweep: each NAME is a
run folder below `run_dir` with the file's other settings. Keys are the stages' options; paths are as seen from where the command is given.

Questions of the data of stage 7 are left out of the data of stage 1; `exclude = []` in [preprocess] keeps them.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import re
import shlex
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cyclopts import Group

from conj import InputError
from conj.data import manifest
from conj.data.files import brief
from conj.data.hub import name_of
from conj.data.options import GROUPS, brief_line, key, option, parse_options, require, require_each, without_none


class Command(NamedTuple):
    module: str  # `python -m` runs it
    options: str  # the dataclass of its options, where torch is not imported for it: MODULE:CLASS

    def load_options(self) -> type:
        module, name = self.options.split(":")
        found = getattr(importlib.import_module(module), name)
        return found if isinstance(found, type) else found()


COMMANDS = {
    "run": Command("conj.run", "conj.settings:run_file_options"),
    "check": Command("conj.preflight", "conj.settings:check_file_options"),
    "plan": Command("conj.plan", "conj.plan:plan_options"),
    "preprocess": Command("conj.data.preprocess", "conj.data.preprocess:PreprocessOptions"),
    "repeated": Command("conj.sample.repeated", "conj.sample.repeated:RepeatedOptions"),
    "hinted": Command("conj.sample.hinted", "conj.sample.hinted:HintedOptions"),
    "pairs": Command("conj.data.pairs", "conj.data.pairs:PairsOptions"),
    "reference": Command("conj.train.reference", "conj.train.options:ReferenceOptions"),
    "dpo": Command("conj.train.dpo", "conj.train.options:DPOOptions"),
    "evaluate": Command("conj.sample.evaluation.evaluate", "conj.sample.evaluation.evaluate:EvaluateOptions"),
    "judge": Command("conj.sample.judge", "conj.sample.judge:JudgeOptions"),
    "attacks": Command("conj.sample.evaluation.attacks", "conj.sample.evaluation.attacks:AttackOptions"),
    "push": Command("conj.data.push", "conj.data.push:PushOptions"),
    "audit": Command("conj.train.audit", "conj.train.options:AuditOptions"),
}
STAGES = ("preprocess", "repeated", "hinted", "pairs", "reference", "dpo", "evaluate")
NAME = re.compile(r"\w[\w.+-]*", re.ASCII)  # of a run of a sweep: it becomes a folder and a judge
RESERVED = ("base", "report.json", "report.md", "report.html", "report.json.manifest.json")  # what stands beside them


ALL = Group("For all stages", sort_key=1)


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """What stands above the tables of a file: every stage gets it that has such an option."""

    run_dir: Path | None = option(None, group=ALL, help="run folder")
    from_runs: tuple[Path, ...] | None = option(None, group=ALL, name="from", help=manifest.FROM_RUNS)
    model: Path | None = option(None, group=ALL, help=manifest.BASE_MODEL)
    judge: str | None = option(None, group=ALL, help="a judge that conj ships, or a judge file")
    dtype: str | None = option(None, group=ALL, help="dtype of sampling and training")
    max_length: int | None = option(None, group=ALL, help="longest prompt + judgment, tokens")
    device: str | None = option(None, group=ALL, help="auto, cpu or cuda")
    seed: int | None = option(None, group=ALL, help="seed of every choice")
    nproc_per_node: int | None = option(
        None, group=ALL, help="processes of stages 5 and 6 on a node: one a GPU; 1 if not given"
    )
    nnodes: int | None = option(None, group=ALL, help="nodes that stages 5 and 6 run on; 1 if not given")
    launcher: str | None = option(
        None, group=ALL, help="what starts a command on each of these nodes, such as: srun --ntasks-per-node=1"
    )
    rdzv_endpoint: str | None = option(
        None, group=ALL, help="HOST:PORT where nodes meet, for torchrun; by default this host's name and 29400"
    )
    max_restarts: int | None = option(
        None, group=ALL, help="times that stages 5 and 6 start again when a rank fails; 0 if not given"
    )
    ray_address: str | None = option(None, group=ALL, help="Ray cluster that stages 2, 3 and 7 sample on")
    stages: tuple[Literal[STAGES], ...] | None = option(None, group=ALL, help="stages to run; all seven if not given")

    def __post_init__(self):
        require_each(self, ("nproc_per_node", "nnodes"), lambda value: value >= 1, "1 or more")
        require_each(self, ("max_restarts",), lambda value: value >= 0, "0 or more")
        require_each(self, ("launcher",), _has_words, "a command whose quotes are closed")
        require_each(self, ("rdzv_endpoint",), re.compile(r"[^\s:]+:\d{1,5}").fullmatch, "HOST:PORT")


def _has_words(command: str) -> bool:
    with contextlib.suppress(ValueError):  # an open quote
        return bool(shlex.split(command))
    return False


SHARED = [key(field) for field in dataclasses.fields(SharedOptions)]
OF_TORCHRUN = ("nproc_per_node", "nnodes", "launcher", "rdzv_endpoint", "max_restarts")
OF_THE_FILE = ("run_dir", "from", "stages", *OF_TORCHRUN)  # no run of a sweep has its own


def run_file_options() -> type:
    """The options of `conj run`: those of `conj check`, and how."""
    dry_run = option(False, help="print what would run, what is complete, what is stale and why", group=GROUPS["other"])
    fields, bases = [("dry_run", bool, dry_run)], (check_file_options(),)
    return dataclasses.make_dataclass("RunFileOptions", fields, bases=bases, frozen=True, kw_only=True)


def check_file_options() -> type:
    """The options of `conj check`: the file, what all stages share, and every option of a stage as `--STAGE.OPTION`."""
    files = option(help="files of settings, TOML; the later ones over the earlier", positional=True)
    fields = [("settings", tuple[Path, ...], files)]
    for place, stage in enumerate(STAGES, 1):
        kind, group = COMMANDS[stage].load_options(), Group(f"Stage {place}: {stage}", sort_key=10 + place)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name not in ("run_dir", "from_runs"):
                given = option(None, name=f"{stage}.{key(field)}", group=group, help=field.metadata["help"])
                fields.append((f"{stage}__{field.name}", hints[field.name] | None, given))
    return dataclasses.make_dataclass("CheckFileOptions", fields, bases=(SharedOptions,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, and what each stage of it is to do."""

    name: str  # in a sweep, else empty
    options: dict[str, manifest.RunOptions]  # by stage, in their order
    num_processes: int  # of stages 5 and 6, on a node
    nodes: dict = dataclasses.field(default_factory=dict)  # how they start: what is given of OF_TORCHRUN but the first

    @property
    def num_ranks(self) -> int:
        return self.num_processes * self.nodes.get("nnodes", 1)

    @property
    def folder(self) -> Path:
        return next(iter(self.options.values())).run_dir


# ---- Files ----


def read_settings(path: Path) -> dict:
    """The file's content, keys with underscores. Raises InputError for malformed TOML, for a key that means nothing, and
    for a value of another type than its option's."""
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InputError(brief_line(f"{path}: expected TOML: {e}")) from None
    runs = content.pop("runs", {})
    require(isinstance(runs, dict), f"{path} [runs]: expected a table, found {brief(runs)}")
    content = _check_tables(content, (*SHARED, *STAGES), str(path))
    content["runs"] = {}
    for name, tables in runs.items():
        require(
            bool(NAME.fullmatch(name)) and name not in RESERVED,
            f"{path} [runs.{brief(name)[1:-1]}]: expected another name, of letters, digits and . _ + -",
        )
        of_a_run = [k for k in (*SHARED, *STAGES) if k not in OF_THE_FILE]
        content["runs"][name] = _check_tables(tables, of_a_run, f"{path} [runs.{name}]")
    return content


def _check_tables(content: object, allowed: Iterable[str], where: str) -> dict:
    """Shared keys and stages' tables."""
    content = _table(content, where)
    shared = {name: value for name, value in content.items() if name not in STAGES}
    checked = _check_values(shared, SharedOptions, [name for name in allowed if name not in STAGES], where, STAGES)
    for stage in content.keys() - shared.keys():
        kind = COMMANDS[stage].load_options()
        place = f"{where[:-1]}.{stage}]" if where.endswith("]") else f"{where} [{stage}]"
        names = [key(field) for field in dataclasses.fields(kind) if key(field) not in ("run_dir", "from")]
        checked[stage] = _check_values(_table(content[stage], place), kind, names, place)
    return checked


def _table(table: object, where: str) -> dict:
    require(isinstance(table, dict), f"{where}: expected a table, found {brief(table)}")
    names = [name.replace("-", "_") for name in table]
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, f"{where}: {brief(twice[:1])} is given twice, with - and with _")
    return dict(zip(names, table.values()))


def _check_values(table: dict, kind: type, allowed: Iterable[str], where: str, also: Iterable[str] = ()) -> dict:
    """The table, if each key is allowed and each value of its option's type. `also`: keys that stand beside them."""
    hints = {key(f): without_none(typing.get_type_hints(kind)[f.name]) for f in dataclasses.fields(kind)}
    empty = {key(field) for field in dataclasses.fields(kind) if field.default in ((), None)}
    for name, value in table.items():
        if name not in allowed:
            close = difflib.get_close_matches(name, [*allowed, *also], 1)
            hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(sorted((*allowed, *also)))}"
            raise InputError(f"{where}: unknown key {brief(name)[1:-1]}; {hint}")
        expected = _expected(hints[name], value)
        if value == [] and name not in empty:
            expected = "at least one"
        if expected:
            raise InputError(f"{where}: {name}: expected {expected}, found {brief(value)}")
    return table


def _expected(hint: object, value: object) -> str:
    """What a value of TOML should be for an option of this type; empty if it is that."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return (
            "" if isinstance(value, list) and not any(_expected(inner, part) for part in value) else "a list of texts"
        )
    if hint in (bool, int, float):
        fits = type(value) is hint or (hint is float and type(value) is int)
        return "" if fits else {bool: "true or false", int: "a whole number", float: "a number"}[hint]
    return "" if isinstance(value, str) and value and value.isprintable() else "a text"  # paths and choices too


def merge(first: dict, second: dict) -> dict:
    """Settings with those of another file over them, table by table."""
    both = {k: merge(first[k], v) for k, v in second.items() if isinstance(v, dict) and k in first}
    return first | second | both


# ---- To the options of every stage ----


def resolve(given) -> list[Run]:
    """The runs that files and command line ask for, with the options of every stage. Raises InputError, with file, table and
    key, for what is unknown, missing or of another type."""
    where = " + ".join(map(str, given.settings))
    content = functools.reduce(merge, map(read_settings, given.settings))
    asked = {key(f): _plain(getattr(given, f.name)) for f in dataclasses.fields(given) if f.name != "settings"}
    asked = {name: value for name, value in asked.items() if value is not None}
    of_all = {name: value for name, value in (content | asked).items() if name in SHARED}
    shared = _parse(SharedOptions, of_all, where)
    require(shared.run_dir is not None, f"{where}: run_dir: expected a run folder, found none")
    manifest.RunOptions(run_dir=shared.run_dir, from_runs=shared.from_runs or ()).check_from()
    runs = []
    for name in content["runs"] or ("",):
        own, options = content["runs"].get(name, {}), {}
        place = {"run_dir": str(shared.run_dir / name)}
        place["from"] = [*_plain(shared.from_runs or ()), *(str(run.folder) for run in runs)]
        for stage in [stage for stage in STAGES if stage in (shared.stages or STAGES)]:
            kind = COMMANDS[stage].load_options()
            names = {key(field) for field in dataclasses.fields(kind)}
            table = _stage_table(stage, names, (content, own), asked) | place
            if stage == "preprocess":  # whichever stages are asked for, so that all starts make the same
                table.setdefault("exclude", _stage_table("evaluate", {"data"}, (content, own), asked).get("data", []))
            options[stage] = _parse(kind, table, f"{where} [{f'runs.{name}.' if name else ''}{stage}]")
        nodes = {name: value for name in OF_TORCHRUN[1:] if (value := getattr(shared, name)) is not None}
        runs.append(Run(name=name, options=options, num_processes=shared.nproc_per_node or 1, nodes=nodes))
    return runs


def _stage_table(stage: str, names: set[str], levels: Iterable[dict], asked: dict) -> dict:
    """A stage's options: of each level (the file, then a sweep's run) what is for all stages, over it the stage's own
    table; over all of them the command line, in the same order."""
    table, own = {}, {k.removeprefix(f"{stage}."): v for k, v in asked.items() if k.startswith(f"{stage}.")}
    given = own.keys() | {k for level in levels for k in level.get(stage, {})}
    for level in levels:
        table |= {k: v for k, v in level.items() if k in SHARED and k in names} | level.get(stage, {})
    table |= {k: v for k, v in asked.items() if k in names} | own
    unread = _unread(stage, table)
    return {k: v for k, v in table.items() if k in given or k not in unread}


def _unread(stage: str, table: dict) -> tuple[str, ...]:
    """What is for all stages, and not for one that asks an endpoint: it has its own."""
    if "api_model" in table:
        return ("device", "dtype", "ray_address")
    if stage != "evaluate" or "judge" not in table or table.get("judgments"):
        return ()
    from conj.data.judges import load_judge

    judge = load_judge(table["judge"], Path(table["judge_text"]) if "judge_text" in table else None)
    return ("model", "max_length", "device", "dtype", "ray_address") if judge.backend == "openai" else ()


def _plain(value: object) -> object:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _parse(kind: type, table: dict, where: str):
    try:
        # An empty list is what is not given.
        return parse_options(kind, [], settings={k: v for k, v in table.items() if v != []}, source=where)
    except InputError as e:
        raise InputError(str(e) if where in str(e) else f"{where}: {e}") from None


def as_toml(run: Run, before: dict | None = None) -> dict:
    """The resolved settings of one run, every option of every stage, as a file that gives the same run again. Of stages that
    it leaves out, `before` is kept."""
    shared = {"run_dir", "from_runs"}
    tables = {
        stage: {
            key(field): _plain(name_of(value) if isinstance(value, Path) else value)
            for field in dataclasses.fields(options)
            if field.name not in shared and (value := getattr(options, field.name)) is not None
        }
        for stage, options in run.options.items()
    }
    head = {"run_dir": str(run.folder), "from": _plain(next(iter(run.options.values())).from_runs)}
    tables = {stage: table for stage in STAGES if (table := tables.get(stage, (before or {}).get(stage)))}
    return head | {"nproc_per_node": run.num_processes, **run.nodes, "stages": list(tables)} | tables
