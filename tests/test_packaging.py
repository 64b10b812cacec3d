"""What is shipped: a wheel with all that the package reads, an sdist that is a checkout, locks that are whole."""

import functools
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conj

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REQUIREMENTS = ROOT / "requirements"


@functools.cache
def tracked() -> tuple[str, ...]:
    """The files that git tracks and that are here. Skips where there is no git checkout."""
    try:
        line = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    if not listed:  # also in an sdist that was unpacked in another project's checkout
        pytest.skip("not a git checkout: no list of files to compare with")
    return tuple(name for name in listed.split("\0") if name and (ROOT / name).exists())


def build(kind: str, folder: Path) -> Path:
    """A wheel or an sdist of the tracked files alone: a SOURCES.txt of an earlier build would add what it lists."""
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    line = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    done = subprocess.run(line, cwd=folder / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = [path for path in folder.iterdir() if path.is_file()]
    return made


def test_the_wheel_holds_the_whole_package(tmp_path):
    """A judge's file, a template or the marker of types that is left out is missed by users alone: here it is in the tree."""
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name for name in names if ".dist-info/" not in name} == {n for n in tracked() if n.startswith("conj/")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for line in (f"Version: {conj.__version__}", "License-Expression: Apache-2.0", "# conj"):
        assert f"\n{line}\n" in metadata, line


def test_every_tracked_file_is_in_the_sdist(tmp_path):
    """Distributors build and test from it: what tests, scripts or the demo read must not stay behind."""
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert set(tracked()) <= names
    made = {n for n in names - set(tracked()) if not n.startswith("conj.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def stated(name: str) -> list[Requirement]:
    """The lines of a file of requirements, comments aside."""
    lines = (line.partition("#")[0].strip() for line in (REQUIREMENTS / name).read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pins(device: str) -> dict[str, Requirement]:
    """Of a lock, name → the line that holds here."""
    return {canonicalize_name(r.name): r for r in stated(f"{device}.txt") if r.marker is None or r.marker.evaluate()}


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    return specifier.version


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_lock_pins_and_names_no_place(device):
    """A path or an index in it would hold on the machine that made it alone."""
    for requirement in pins(device).values():
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert requirement.url is None
    text = (REQUIREMENTS / f"{device}.txt").read_text("utf-8")
    assert not re.search(r"://|^-|\.whl|(?<!requirements)/(?!(cpu|gpu)\.in)", text, re.M)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_lock_meets_what_is_asked_for(device):
    """Of what is stated in two places, one changes alone."""
    project, lock = PYPROJECT["project"], pins(device)
    named = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    for requirement in (*named, *stated(f"{device}.in")):
        assert version_of(lock[requirement.name]) in requirement.specifier, requirement


def test_the_lock_is_whole():
    """It is installed without solving, and torch's own demands are written into it by hand: one that is missing is an
    import that fails on a fresh machine alone."""
    left_out = {requirement.name for requirement in stated("left-out.txt")}
    lock, looked_at = pins("cpu"), 0
    for name, pin in lock.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version != version_of(pin):
            continue  # another environment: its demands say nothing of the lock's
        looked_at += 1
        for demand in map(Requirement, installed.requires or []):
            if demand.marker is None or demand.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(demand.name)
                met = needed in lock and version_of(lock[needed]) in demand.specifier
                assert met or needed in left_out - {"torch"}, f"{name} asks for {demand}"
    if looked_at < len(lock) // 2:
        pytest.skip(f"{looked_at} of {len(lock)} packages of requirements/cpu.txt are installed here")


def test_the_version_is_stated_once_more_for_citations_alone():
    assert f"\nversion: {conj.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
