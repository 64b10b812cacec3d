"""Trains generative judges the Con-J way: one command a stage, and `conj run` for all of them.

`python -m conj` is the same. `conj dpo …` is `python -m conj.train.dpo …`, the form that torchrun takes.
"""

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

from cyclopts import App

from conj import __version__
from conj.data.options import GROUPS, bad_input_in_one_line, command_of, first_paragraph, run_app
from conj.settings import COMMANDS


def build_app(*, with_options: bool) -> App:
    """All commands with the first line of their help; `with_options`: and all that they take, which imports them."""
    app = App(
        name="conj", version=f"conj {__version__}", help=first_paragraph(__doc__), help_format="plaintext",
        result_action="return_value",
    )  # fmt: skip
    app["--help"].group = app["--version"].group = GROUPS["other"]
    for place, (name, command) in enumerate(COMMANDS.items()):
        function = command_of(command.load_options()) if with_options else lambda: None
        app.command(function, name=name, help=describe(command.module), sort_key=place)
    app.register_install_completion_command(help="Completes commands and options in your shell.", group=GROUPS["other"])
    return app


def describe(module: str) -> str:
    """The first paragraph of a module's docstring. Its code is not run: that would import torch for a line of help."""
    spec = importlib.util.find_spec(module)
    folder = spec.submodule_search_locations
    path = Path(folder[0], "__main__.py") if folder else Path(spec.origin)
    return first_paragraph(ast.get_docstring(ast.parse(path.read_bytes())))


def main() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"conj {name}", *rest]
        runpy.run_module(COMMANDS[name].module, run_name="__main__")
    else:
        with bad_input_in_one_line():
            run_app(build_app(with_options=name == "--install-completion"), sys.argv[1:])


if __name__ == "__main__":
    main()
