"""Command lines and tables of a settings file from dataclasses: one frozen, keyword-only dataclass a stage is all there
is to configure. `cyclopts` reads both.

    @dataclass(frozen=True, kw_only=True)
    class PairsOptions(RunOptions):
        seed: int = option(2021, help="seed of the choice among judgments")

Each field becomes an option (`--pairs-per-step`, or with underscores); `bool` fields also get a `--no-` form.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict

from conj import InputError, __version__

SECONDS_TO_SAY_WHY = 2
GROUPS = {  # of the help, in this order
    "required": Group("Required", sort_key=0),
    True: Group("What is made", sort_key=1),
    False: Group("How it is made: may be another when a stage goes on", sort_key=2),
    "other": Group("Other", sort_key=3),
}


def option(
    default=dataclasses.MISSING,
    *,
    help: str,
    affects_result: bool = True,
    automatic: bool = False,
    name: str | None = None,
    group: Group | str | None = None,
    positional: bool = False,
):
    """A dataclass field that is a command line option; without a default it must be given. `name`: where it is not the
    field's own; `group`: where the help shows it; `positional`: given without its name.

    An option that leaves the artefact as it is (paths, memory, how often to save) says so: a stage that was cut short
    may go on with another value of it. An `automatic` one is None until the stage chooses it, at its first start; later
    starts find it in the manifest."""
    metadata = {"help": help, "affects_result": affects_result, "automatic": automatic, "name": name, "group": group}
    metadata |= {"positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def unresolved(options) -> list[str]:
    """The automatic options that have no value yet."""
    return [f.name for f in dataclasses.fields(options) if f.metadata["automatic"] and getattr(options, f.name) is None]


def key(field: dataclasses.Field) -> str:
    """How a field is called in a file of settings."""
    return field.metadata["name"] or field.name


def flag(field: dataclasses.Field) -> str:
    """How a field is given on a command line."""
    return "--" + key(field).replace("_", "-")


def check_value(hint: object, value: object) -> None:
    """Raises ValueError for a number that is not finite, and for a list with an empty text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Expected a finite number, found {value}")
    if isinstance(value, tuple) and "" in value:
        raise ValueError("Expected texts, found an empty one")


def _path(kind: type, tokens: Sequence) -> Path:
    value = tokens[0].value
    if not value or not value.isprintable():
        raise ValueError(f"Expected a path, found {value!r}")
    return Path(value)


def _whole_number(kind: type, tokens: Sequence) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"Expected a whole number, found {tokens[0].value}") from None


CONVERTERS = {int: _whole_number, Path: _path}  # cyclopts rounds 1.5, and takes "" for the current folder


def without_none(hint: object) -> object:
    """A type without the `None` of an option that need not be given."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return hint if typing.get_origin(hint) not in (typing.Union, types.UnionType) else typing.Union[tuple(parts)]  # noqa: UP007


def _show(default: object) -> str:
    return " ".join(default) if isinstance(default, tuple) else str(default)


def command_of(options_class: type) -> Callable:
    """A function of the options by keyword, for cyclopts; it gives an `options_class`."""

    def make(*positional, **values):
        return options_class(**dict(zip((p.name for p in parameters), positional)), **values)

    hints, parameters = typing.get_type_hints(options_class), []
    for field in dataclasses.fields(options_class):
        needed = field.default is dataclasses.MISSING
        kind = inspect.Parameter.POSITIONAL_ONLY if field.metadata["positional"] else inspect.Parameter.KEYWORD_ONLY
        settings = Parameter(
            name=() if field.metadata["positional"] else flag(field), help=field.metadata["help"], validator=check_value,
            group=field.metadata["group"] or GROUPS["required" if needed else field.metadata["affects_result"]],
            consume_multiple=1, allow_repeating=True, negative_iterable=(), converter=CONVERTERS.get(without_none(hints[field.name])),
            show_default=field.default not in (None, ()) and _show,
        )  # fmt: skip
        parameters.append(
            inspect.Parameter(
                field.name, kind, annotation=Annotated[hints[field.name], settings],
                default=inspect.Parameter.empty if needed else field.default,
            )
        )  # fmt: skip
    parameters.sort(key=lambda parameter: parameter.kind)  # positional ones first
    make.__signature__ = inspect.Signature(parameters)
    return make


def parse_options(
    options_class: type,
    argv: Sequence[str],
    *,
    description: str | None = None,
    settings: Mapping | None = None,
    source: str = "",
):
    """An `options_class` from a command line, and where that says nothing from `settings`, a table of the file `source`.

    Raises InputError for what is unknown, missing or of another type, and what `__post_init__` raises; prints help or
    version, and exits with 0, where the line asks for it."""
    app = App(
        name=_program(), help=description, version=f"conj {__version__}", default_command=command_of(options_class),
        config=Dict(dict(settings), source=source) if settings else (), result_action="return_value",
        help_format="plaintext", group_commands=GROUPS["other"],
    )  # fmt: skip
    options = run_app(app, argv)
    if options is None:  # help or version were printed
        sys.exit()
    return options


def run_app(app: App, argv: Sequence[str]):
    """What the app's command returns. Raises InputError for a line that it does not understand."""
    try:
        return app(list(argv), exit_on_error=False, print_error=False)
    except CycloptsError as e:
        raise InputError(brief_line(str(e).rstrip("."))) from None


def _program() -> str:
    """How this process was started, for the help."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("conj ") or spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run_command(
    stage: Callable, options_class: type, description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Runs `stage(options)`, as `bad_input_in_one_line` has it. `description` is the module docstring."""
    with bad_input_in_one_line():
        argv = sys.argv[1:] if argv is None else argv
        options = parse_options(options_class, argv, description=first_paragraph(description))
        getattr(options, "check_from", lambda: None)()
        stage(getattr(options, "at_hand", lambda: options)())


@contextlib.contextmanager
def bad_input_in_one_line() -> Iterator[None]:
    """What a user gave that cannot be used ends the process with one line on stderr and exit code 2."""
    try:
        yield
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every rank sees the same bad input
            print(f"error: {e}", file=sys.stderr)
        else:  # it ends all ranks with the first that exits, and the one that says why has to be there in time
            time.sleep(SECONDS_TO_SAY_WHY)
        sys.exit(2)
    except OSError as e:  # a path that cannot be read or written, a full disk
        print(f"error: {e.filename or 'input/output'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def brief_line(text: str, most: int = 500) -> str:
    """A text as one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"


def first_paragraph(docstring: str | None) -> str:
    return (docstring or "").split("\n\n")[0].replace("\n", " ")


def require_each(options, names: Sequence[str], holds: Callable, expected: str) -> None:
    """Raises InputError, naming the option, unless `holds(value)` for each of the named options that is given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")


def refuse(options, names: Sequence[str], why: str) -> None:
    """Raises InputError, naming them, where one of these options is given: it would be ignored."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != defaults[name]]
    require(not given, f"{', '.join(given)}: {why}")


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
