"""Command lines from dataclasses: one frozen, keyword-only dataclass a stage is all there is to configure.

    @dataclass(frozen=True, kw_only=True)
    class PairsOptions:
        run: Path = option(help="run folder")
        seed: int = option(2021, help="seed of the choice among judgments")

Each field becomes an option (`--pairs-per-step`); `bool` fields also get a `--no-` form. Unknown options are errors.
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence

from conj import InputError


def option(default=dataclasses.MISSING, *, help: str, affects_result: bool = True):
    """A dataclass field that is a command line option; without a default it must be given.

    An option that leaves the artefact as it is (paths, memory, how often to save) says so: a stage that was cut short
    may go on with another value of it."""
    return dataclasses.field(default=default, metadata={"help": help, "affects_result": affects_result})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def build_parser(options_class: type, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        kind, arguments = hints[field.name], {"help": field.metadata["help"]}
        # `int | None`: absent unless given; with a Literal in it, it is another type of Python's
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        if field.default is dataclasses.MISSING:
            arguments["required"] = True
        else:
            arguments["default"] = field.default
        if typing.get_origin(kind) is tuple:
            arguments["nargs"] = "+"
            kind = typing.get_args(kind)[0]
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            arguments["choices"] = typing.get_args(kind)
        else:
            arguments["type"] = _finite if kind is float else kind
        flags = ["--" + field.name.replace("_", "-")]
        if field.name == "run":
            # Before Python 3.12.7 torchrun's own parser takes a script's --run for a short form of its --run-path.
            flags.append("--run-dir")
        parser.add_argument(*flags, **arguments)
    return parser


def parse_options(options_class: type, description: str, argv: Sequence[str] | None = None):
    """An `options_class` from the command line. Raises InputError from its `__post_init__`; exits 2 on unknown options."""
    values = vars(build_parser(options_class, description).parse_args(argv))
    return options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def run_command(
    stage: Callable, options_class: type, description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Runs `stage(options)`; bad input ends in one line on stderr and exit code 2. `description` is the module docstring."""
    try:
        stage(parse_options(options_class, (description or "").split("\n\n")[0], argv))
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every rank sees the same bad input
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:  # a path that cannot be read or written, a full disk
        print(f"error: {e.filename or 'input/output'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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
