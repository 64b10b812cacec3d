"""The text of a judge that another package has: constants of its source, which is read and never run."""

import ast
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

from conj import InputError
from conj.data.files import brief, first_line


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None


def text_of_package(table: object, places: Sequence[str], path: Path) -> dict[str, str]:
    """`system` and `user` out of constants of an installed package's source file, which is read and never run.

    `fill` says what goes to each {place} of the text: one of `places`, or another constant."""
    keys = {"package": str, "file": str, "system": str, "user": str, "fill": dict}
    if not isinstance(table, dict) or {k: type(v) for k, v in table.items()} != keys:
        raise InputError(f"{path}: text: expected {', '.join(keys)}, found {brief(table)}")
    package, file = table["package"], table["file"]
    try:
        constants = _constants(importlib.metadata.distribution(package).locate_file(file).read_text("utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, SyntaxError):
        raise InputError(
            f"{path}: text: expected {file} of the package {package}, found none; `pip install --no-deps {package}`, or "
            "put the text into a file, and name that"
        ) from None
    wanted = [table["system"], table["user"], *(name for name in table["fill"].values() if name not in places)]
    if missing := [str(name) for name in wanted if str(name) not in constants]:
        raise InputError(f"{path}: text: expected {', '.join(missing)} in {file} of {package}, found none")
    fill = {name: f"{{{to}}}" if to in places else constants[to] for name, to in table["fill"].items()}
    user = re.sub(r"{(\w+)}", lambda place: fill.get(place[1], place[0]), constants[table["user"]])
    return {"system": constants[table["system"]], "user": user}


def _constants(source: str) -> dict[str, str]:
    """NAME = "text" of a module, also with .strip() behind it."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        value, strip = node.value, False
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "strip":
            value, strip = value.func.value, True
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found[node.targets[0].id] = value.value.strip() if strip else value.value
    return found
