"""What ran: the versions of all that is installed, and conj's own commit. A manifest says so."""

import functools
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path


@functools.cache
def describe_code() -> dict:
    """Versions of Python and of all that is installed, and the git commit of conj (None outside a checkout)."""
    installed = {}
    for package in distributions():  # in the order of sys.path: of two versions the first is the one that is imported
        if name := package.metadata["Name"]:
            installed.setdefault(re.sub(r"[-_.]+", "-", name).lower(), package.version)
    versions = {"python": sys.version.split()[0], **dict(sorted(installed.items()))}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # An environment may lie in another project's checkout, whose commit says nothing of conj.
    commit = git("rev-parse", "HEAD") if git("ls-files", Path(__file__).name) else None
    dirty = None if commit is None else bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"versions": versions, "git": {"commit": commit, "dirty": dirty}}
