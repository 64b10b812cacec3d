"""Command lines and tables of a settings file from dataclasses: one frozen, keyword-only dataclass a stage is all there
is to configure. `cyclopts` reads both.

    @dataclass(frozen=True, kw_only=True)
    class PairsOptions(RunOptions):
        seed: int = option(2021, help="seed of the choice among judgments")

Each field becomes an option (`--pairs-per-step`, or with underscores); `bool` fields also get a `--no-` form.
"""

import dataclasses
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict

from conj import InputError, __version__

GROUPS = {  # of the help, in this order
    "required": Group("Required", sort_key=0),
    True: Group("What is made", sort_key=1),
    False: Group("How it is made: a stage that was cut short may go on with other values of these", sort_key=2),
    "other": Group("Other", sort_key=3),
}


def option(default=dataclasses.MISSING, *, help: str, affects_result: bool = True, name: str | None = None):
    """A dataclass field that is a command line option; without a default it must be given. `name`: where the field's own
    is a word of Python's.

    An option that leaves the artefact as it is (paths, memory, how often to save) says so: a stage that was cut short
    may go on with another value of it."""
    metadata = {"help": help, "affects_result": affects_result, "name": name}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every stage of a run has."""

    run_dir: Path = option(
        help="run folder: the stage's files are read from there and written to it", affects_result=False
    )


def flag(field: dataclasses.Field) -> str:
    """How a field is given on a command line."""
    return "--" + (field.metadata["name"] or field.name).replace("_", "-")


def _check_finite(kind: type, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Expected a finite number, found {value}")


def _show(default: object) -> str:
    return " ".join(default) if isinstance(default, tuple) else str(default)


def command_of(options_class: type) -> Callable:
    """A function of the options by keyword, for cyclopts; it gives an `options_class`."""

    def make(**values):
        return options_class(**values)

    hints, parameters = typing.get_type_hints(options_class), []
    for field in dataclasses.fields(options_class):
        needed = field.default is dataclasses.MISSING
        settings = Parameter(
            name=flag(field), help=field.metadata["help"], validator=_check_finite,
            group=GROUPS["required" if needed else field.metadata["affects_result"]],
            consume_multiple=True, allow_repeating=True, negative_iterable=(), show_default=_show if field.default else None,
        )  # fmt: skip
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[hints[field.name], settings],
                default=inspect.Parameter.empty if needed else field.default,
            )
        )  # fmt: skip
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
    """An `options_class` from a command line, above it from `settings`, a table of the file `source`.

    Raises InputError for what is unknown, missing or of another type; prints the help, or the version, and exits with 0
    where the line asks for it. Whatever `__post_init__` raises passes."""
    app = App(
        name=_program(), help=description, version=f"conj {__version__}", default_command=command_of(options_class),
        config=Dict(dict(settings), source=source) if settings else (), result_action="return_value",
        help_format="plaintext", group_commands=GROUPS["other"],
    )  # fmt: skip
    try:
        options = app(list(argv), exit_on_error=False, print_error=False)
    except CycloptsError as e:
        raise InputError(f"{str(e).rstrip('.')}; see --help") from None
    if options is None:  # the help or the version was asked for, and printed
        sys.exit()
    return options


def _program() -> str:
    """How this process was started, for the help."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("conj ") or spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run_command(
    stage: Callable, options_class: type, description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Runs `stage(options)`; bad input ends in one line on stderr and exit code 2. `description` is the module docstring."""
    try:
        stage(
            parse_options(
                options_class, sys.argv[1:] if argv is None else argv, description=first_paragraph(description)
            )
        )
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every rank sees the same bad input
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:  # a path that cannot be read or written, a full disk
        print(f"error: {e.filename or 'input/output'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def first_paragraph(docstring: str | None) -> str:
    return (docstring or "").split("\n\n")[0].replace("\n", " ")


def require_each(options, names: Sequence[str], holds: Callable, expected: str) -> None:
    """Raises InputError, naming the option, unless `holds(value)` for each of the named options that is given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
