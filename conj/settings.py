"""The commands, and a file of settings for all stages of a run: from TOML to the options of every stage.

    run_dir = "runs/mine"
    model = "models/Qwen2-7B-Instruct"

    [dpo]
    learning_rate = 1e-6

What stands above the tables reaches every stage that has such an option; what stands in a stage's table wins, and the
command line over both. `[runs.NAME.STAGE]` tables make a sweep: each NAME is a run folder below `run_dir` with the file's
other settings. Keys are the stages' options; paths are as seen from where the command is given.
"""

import dataclasses
import difflib
import functools
import importlib
import re
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cyclopts import Group

from conj import InputError
from conj.data.files import brief
from conj.data.manifest import FROM_RUNS, RunOptions
from conj.data.options import GROUPS, key, option, parse_options, require, require_each


class Command(NamedTuple):
    module: str  # `python -m` runs it
    options: str  # the dataclass of its options, where torch is not imported for it: MODULE:CLASS

    def load_options(self) -> type:
        module, name = self.options.split(":")
        found = getattr(importlib.import_module(module), name)
        return found if isinstance(found, type) else found()


COMMANDS = {
    "run": Command("conj.run", "conj.settings:run_file_options"),
    "preprocess": Command("conj.data.preprocess", "conj.data.preprocess:PreprocessOptions"),
    "repeated": Command("conj.sample.repeated", "conj.sample.repeated:RepeatedOptions"),
    "hinted": Command("conj.sample.hinted", "conj.sample.hinted:HintedOptions"),
    "pairs": Command("conj.data.pairs", "conj.data.pairs:PairsOptions"),
    "reference": Command("conj.train.reference", "conj.train.options:ReferenceOptions"),
    "dpo": Command("conj.train.dpo", "conj.train.options:DPOOptions"),
    "evaluate": Command("conj.sample.evaluation.evaluate", "conj.sample.evaluation.evaluate:EvaluateOptions"),
    "judge": Command("conj.sample.judge", "conj.sample.judge:JudgeOptions"),
    "attacks": Command("conj.sample.evaluation.attacks", "conj.sample.evaluation.attacks:AttackOptions"),
    "audit": Command("conj.train.audit", "conj.train.options:AuditOptions"),
}
STAGES = ("preprocess", "repeated", "hinted", "pairs", "reference", "dpo", "evaluate")
NAME = re.compile(r"\w[\w.+-]*")  # of a run of a sweep: it becomes a folder and a judge


ALL = Group("For all stages", sort_key=1)


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """What stands above the tables of a file: every stage gets it that has such an option."""

    run_dir: Path | None = option(None, group=ALL, help="run folder")
    from_runs: tuple[Path, ...] | None = option(None, group=ALL, name="from", help=FROM_RUNS)
    model: Path | None = option(None, group=ALL, help="base model, a Hugging Face folder")
    judge: str | None = option(None, group=ALL, help="a judge that conj ships, or a judge file")
    dtype: str | None = option(None, group=ALL, help="dtype of sampling and training")
    max_length: int | None = option(None, group=ALL, help="longest prompt + judgment, tokens")
    device: str | None = option(None, group=ALL, help="auto, cpu or cuda")
    seed: int | None = option(None, group=ALL, help="seed of every choice")
    nproc_per_node: int | None = option(None, group=ALL, help="processes of stages 5 and 6: one a GPU; 1 if not given")
    stages: tuple[Literal[STAGES], ...] | None = option(None, group=ALL, help="stages to run; all seven if not given")

    def __post_init__(self):
        require_each(self, ("nproc_per_node",), lambda value: value >= 1, "1 or more")


SHARED = [key(field) for field in dataclasses.fields(SharedOptions)]
OF_THE_FILE = ("run_dir", "from", "nproc_per_node", "stages")  # no run of a sweep has its own


def run_file_options() -> type:
    """The options of `conj run`: the file, what all stages share, and every option of a stage as `--STAGE.OPTION`."""
    files = option(help="files of settings, TOML; the later ones over the earlier", positional=True)
    dry_run = option(False, help="print what would run, what is complete, what is stale and why", group=GROUPS["other"])
    fields = [("settings", tuple[Path, ...], files), ("dry_run", bool, dry_run)]
    for place, stage in enumerate(STAGES, 1):
        kind, group = COMMANDS[stage].load_options(), Group(f"Stage {place}: {stage}", sort_key=10 + place)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name not in ("run_dir", "from_runs"):
                given = option(None, name=f"{stage}.{key(field)}", group=group, help=field.metadata["help"])
                fields.append((f"{stage}__{field.name}", hints[field.name] | None, given))
    return dataclasses.make_dataclass("RunFileOptions", fields, bases=(SharedOptions,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, and what each stage of it is to do."""

    name: str  # in a sweep, else empty
    options: dict[str, RunOptions]  # by stage, in their order
    num_processes: int  # of stages 5 and 6

    @property
    def folder(self) -> Path:
        return next(iter(self.options.values())).run_dir


def read_settings(path: Path) -> dict:
    """The file's content, keys with underscores. Raises InputError for malformed TOML and a key that means nothing."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected TOML: {e}") from None
    runs = content.pop("runs", {})
    content = _tables(content, (*SHARED, *STAGES), str(path))
    content["runs"] = dict(_keys(runs, f"{path} [runs]"))
    for name, tables in content["runs"].items():
        require(bool(NAME.fullmatch(name)), f"{path} [runs.{name}]: expected a name of {NAME.pattern}")
        of_a_run = [k for k in (*SHARED, *STAGES) if k not in OF_THE_FILE]
        content["runs"][name] = _tables(tables, of_a_run, f"{path} [runs.{name}]")
    return content


def _tables(content: object, allowed: Iterable[str], where: str) -> dict:
    """Shared keys and stages' tables. What a stage's table holds is checked with its options."""
    checked = {name.replace("-", "_"): value for name, value in _keys(content, where)}
    for name, value in checked.items():
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(allowed)}"
            raise InputError(f"{where}: unknown key {name}; {hint}")
        if name in STAGES:
            checked[name] = {k.replace("-", "_"): v for k, v in _keys(value, f"{where} {name}")}
    return checked


def _keys(table: object, where: str) -> Iterable[tuple[str, object]]:
    require(isinstance(table, dict), f"{where}: expected a table, found {brief(table)}")
    return table.items()


def merge(first: dict, second: dict) -> dict:
    """Settings with those of another file over them, table by table."""
    both = {k: merge(first[k], v) for k, v in second.items() if isinstance(v, dict) and k in first}
    return first | second | both


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
    runs = []
    for name in content["runs"] or ("",):
        own, options = content["runs"].get(name, {}), {}
        place = {"run_dir": str(shared.run_dir / name)}
        place["from"] = [*_plain(shared.from_runs or ()), *(str(run.folder) for run in runs)]
        for stage in STAGES:
            if stage in (shared.stages or STAGES):
                kind = COMMANDS[stage].load_options()
                table = _stage_table(stage, {key(f) for f in dataclasses.fields(kind)}, content, own, asked) | place
                options[stage] = _parse(kind, table, f"{where} [{f'runs.{name}.' if name else ''}{stage}]")
        runs.append(Run(name=name, options=options, num_processes=shared.nproc_per_node or 1))
    return runs


def _stage_table(stage: str, names: set[str], content: dict, own: dict, asked: dict) -> dict:
    """A stage's options: shared ones, over them the tables of the file and of a sweep's run, over these the command line."""
    shared = {k: v for k, v in (content | own).items() if k in SHARED and k in names}
    for_all = {k: v for k, v in asked.items() if k in names}
    for_stage = {k.removeprefix(f"{stage}."): v for k, v in asked.items() if k.startswith(f"{stage}.")}
    return shared | content.get(stage, {}) | own.get(stage, {}) | for_all | for_stage


def _plain(value: object) -> object:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _parse(kind: type, table: dict, where: str):
    try:
        return parse_options(kind, [], settings=table, source=where)
    except InputError as e:
        raise InputError(str(e) if where in str(e) else f"{where}: {e}") from None


def as_toml(run: Run) -> dict:
    """The resolved settings of one run, every option of every stage, as a file that gives the same run again."""
    shared = {"run_dir", "from_runs"}
    tables = {
        stage: {
            key(field): _plain(value)
            for field in dataclasses.fields(options)
            if field.name not in shared and (value := getattr(options, field.name)) is not None
        }
        for stage, options in run.options.items()
    }
    head = {"run_dir": str(run.folder), "from": _plain(next(iter(run.options.values())).from_runs)}
    return head | {"nproc_per_node": run.num_processes, "stages": list(run.options)} | tables
