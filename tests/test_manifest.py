"""Manifests: a stage is done, goes on, or is refused; and what it is made from must fit together."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from conj import InputError
from conj.data import manifest
from conj.data.files import write_jsonl
from conj.data.manifest import (
    RunOptions,
    begin,
    describe_inputs,
    finish,
    locate,
    manifest_path,
    read_manifest,
    write_sealed,
)
from conj.data.options import option


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    n: int = option(8, help="a number that the result depends on")
    batch: int = option(1, help="a number that it does not depend on", affects_result=False)


def stage(run: Path, name: str, inputs: list, **changes) -> bool:
    """A stage that writes the names of its inputs. Returns whether it had anything to do."""
    artefact = run / name
    if not begin(artefact, inputs=inputs, options=Options(run_dir=run, **changes)):
        return False
    write_jsonl(artefact, [{"from": [Path(p).name for p in inputs]}])
    finish(artefact, num_rows=1, counts={}, seconds=0.0)
    return True


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two stages: raw → a → b."""
    (tmp_path / "raw").write_text("data")
    stage(tmp_path, "a", [tmp_path / "raw"])
    stage(tmp_path, "b", [tmp_path / "raw", tmp_path / "a"])
    return tmp_path


def test_a_complete_stage_is_done_once_whatever_does_not_affect_it(run):
    assert not stage(run, "b", [run / "raw", run / "a"], batch=2)


def test_other_options_or_inputs_are_refused_and_named(run):
    with pytest.raises(InputError, match="was made with n=8, now 9"):
        stage(run, "a", [run / "raw"], n=9)
    (run / "raw").write_text("other data")
    with pytest.raises(InputError, match=r"was made from other inputs \(changed: .*raw\)"):
        stage(run, "a", [run / "raw"])


def test_the_same_data_at_another_path_is_the_same(run, tmp_path):
    (tmp_path / "moved").mkdir()
    (run / "raw").rename(tmp_path / "moved" / "raw")
    assert not stage(run, "a", [tmp_path / "moved" / "raw"])


def test_an_artefact_that_was_changed_is_refused_by_its_stage_and_by_those_after_it(run):
    (run / "a").write_text("tampered")
    with pytest.raises(InputError, match="is not what a.manifest.json describes"):
        stage(run, "a", [run / "raw"])
    with pytest.raises(InputError, match="a: was changed after a.manifest.json was written"):
        stage(run, "b", [run / "raw", run / "a"])


def test_files_that_were_not_made_from_each_other_are_refused(run):
    """Judgments of one order of the answers beside prompts of another would turn labels around."""
    (run / "raw").write_text("other data")
    with pytest.raises(InputError, match="a: was made from another raw than the one that stands here now"):
        stage(run, "c", [run / "raw", run / "a"])


@pytest.mark.parametrize("written", [False, True])
def test_a_stage_killed_before_or_after_it_wrote_ends_with_the_same_file(run, written):
    expected = (run / "b").read_bytes()
    if not written:
        (run / "b").unlink()
    manifest = {k: v for k, v in read_manifest(run / "b").items() if k in ("artefact", "inputs", "options")}
    write_sealed(manifest_path(run / "b"), manifest | {"complete": False})
    assert stage(run, "b", [run / "raw", run / "a"])
    assert (run / "b").read_bytes() == expected and read_manifest(run / "b")["complete"]


def test_a_stage_that_failed_before_it_wrote_does_not_bind_the_next_try(run):
    begin(run / "c", inputs=[run / "a"], options=Options(run_dir=run, n=1))
    assert stage(run, "c", [run / "b"], n=2)


def test_an_unfinished_input_is_refused(run):
    begin(run / "c", inputs=[run / "a"], options=Options(run_dir=run))
    (run / "c").write_text("half")
    with pytest.raises(InputError, match="c: was cut short"):
        stage(run, "d", [run / "c"])


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"inputs": 1, "options": {}, "complete": true}'])
def test_a_damaged_manifest_is_refused_in_one_line(content, run):
    manifest_path(run / "a").write_text(content)
    with pytest.raises(InputError, match="a.manifest.json: expected a") as error:
        stage(run, "a", [run / "raw"])
    assert "\n" not in str(error.value)


def test_a_hub_name_stands_for_itself():
    assert describe_inputs(["org/name", "train"]) == [
        {"path": "org/name", "sha256": None},
        {"path": "train", "sha256": None},
    ]


@pytest.mark.parametrize(("started", "written"), [(False, False), (False, True), (True, True)])
def test_a_stage_that_another_process_is_making_is_refused(run, started, written):
    """Two that append to one file, or write one checkpoint, would spoil it. The other one ends, and it goes on."""
    if started:
        begin(run / "c", inputs=[run / "a"], options=Options(run_dir=run))
        (run / "c").write_text("half")
    code = f"""
import time
from test_manifest import *
begin(Path({str(run / "c")!r}), inputs=[Path({str(run / "a")!r})], options=Options(run_dir=Path({str(run)!r})))
print("made", flush=True)
time.sleep(60)
"""
    manifest._held.clear()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:{ROOT / 'tests'}"}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout.readline() == "made\n"
    if written:  # a file that is written as a whole, and a model, are not there before the end
        (run / "c").write_text("half")
    for _ in range(2):  # also to the third
        with pytest.raises(InputError, match="c: another process is making it at this moment"):
            begin(run / "c", inputs=[run / "a"], options=Options(run_dir=run))
    other.kill()
    other.wait()
    assert begin(run / "c", inputs=[run / "a"], options=Options(run_dir=run))


# ---- Built on another run folder ----


def build(run: Path, base: Path, **changes) -> bool:
    """The stages of `run`'s fixture in a folder that builds on `base`."""
    options = Options(run_dir=run, from_runs=(base,))
    stage(run, "a", [base / "raw"], from_runs=(base,))
    return stage(run, "b", [base / "raw", options.find("a")], from_runs=(base,), **changes)


def test_what_another_run_holds_complete_is_taken_from_there_and_not_made_again(run):
    assert not build(run / "new", run)
    assert sorted(path.name for path in (run / "new").iterdir()) == ["a.manifest.json", "b.manifest.json"]
    assert locate(run / "new" / "b").samefile(run / "b")
    assert Options(run_dir=run / "newer", from_runs=(run / "new",)).find("b").samefile(run / "b")
    (run / "elsewhere").mkdir()
    assert Options(run_dir=run / "elsewhere", from_runs=(run,)).find("raw") == run / "raw"


def test_with_other_options_it_is_made_here_from_what_the_other_run_holds(run):
    assert build(run / "new", run, n=9)
    assert (run / "new" / "b").exists() and not (run / "new" / "a").exists()
    assert read_manifest(run / "new" / "b")["inputs"][1]["path"] == str(run / "a")


def test_what_was_taken_is_made_anew_when_it_is_asked_for_otherwise_or_changed_there(run):
    """A reference holds nothing that could be lost, so it never stands in the way."""
    build(run / "new", run)
    assert build(run / "new", run, n=9)
    build(run / "newer", run)
    (run / "b").write_text("spoiled")
    assert build(run / "newer", run) and (run / "newer" / "b").exists()
