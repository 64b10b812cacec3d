"""Manifests: a stage is done, goes on, or is refused; and what it is made from must fit together."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, write_model

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
from conj.data.model_files import deciding_files
from conj.data.options import option


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    n: int = option(8, help="a number that the result depends on")
    batch: int = option(1, help="a number that it does not depend on", affects_result=False)
    later: bool = option(False, help="an option of a later version")


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


def test_an_option_that_came_later_makes_nothing_stale_where_it_is_off(run):
    """Otherwise each new option would cost those who update all that they have sampled."""
    made = read_manifest(run / "b")
    made["options"].pop("later")
    write_sealed(manifest_path(run / "b"), made)
    assert not stage(run, "b", [run / "raw", run / "a"])
    with pytest.raises(InputError, match="was made with later=None, now True"):
        stage(run, "b", [run / "raw", run / "a"], later=True)


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


def test_a_base_that_conj_trained_was_made_from_other_files_of_the_same_names(run, model_copy):
    """A second round of training, on a judge that a first one made of its own pairs. What is no model is still refused."""
    first = run / "first"
    first.mkdir()
    (first / "raw").write_text("the first round's")
    begin(first / "model", inputs=[first / "raw"], options=Options(run_dir=first))
    shutil.copytree(model_copy, first / "model")
    finish(first / "model", num_rows=None, counts={}, seconds=0.0)
    assert stage(run, "second", [run / "raw", first / "model"])
    (first / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json: was changed after model.manifest.json was written"):
        stage(run, "third", [run / "raw", first / "model"])


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


# ---- A model folder ----

# What a hub client, a card's writer or another reader's tokenizer leaves in it.
BESIDE = ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/download/config.json.metadata", "vocab.json")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A model with all that may decide a result, and with what stands beside it."""
    folder = write_model(tmp_path_factory.mktemp("sharded") / "base", max_shard_size="200KB")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in BESIDE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def base(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "base"))


DECIDE = ["chat_template.jinja", "config.json", "generation_config.json", "model-00001-of-00003.safetensors"]
DECIDE += ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json"]
DECIDE += ["tokenizer.json", "tokenizer_config.json"]


def flip(path: Path) -> None:
    """Changes the last byte that is no white space; an index stays one that can be read."""
    content = path.read_bytes()
    if path.name.endswith(".index.json"):
        path.write_bytes(content + b"\n")
        return
    place = len(content.rstrip()) - 1
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def test_the_files_that_decide_results_are_these(base):
    """And where there is no tokenizer.json, those that stand for it."""
    assert [path.name for path in deciding_files(base)] == DECIDE
    (base / "tokenizer.json").unlink()
    for name in "tokenizer.model", "special_tokens_map.json", "added_tokens.json":
        (base / name).touch()
    instead = {"tokenizer.model", "special_tokens_map.json", "added_tokens.json"}
    assert {path.name for path in deciding_files(base)} == {*DECIDE, *instead} - {"tokenizer.json"}


@pytest.mark.parametrize("name", DECIDE)
def test_a_byte_of_a_file_that_decides_makes_a_stage_stale_and_is_named(name, base, tmp_path):
    assert stage(tmp_path, "a", [base]) and not stage(tmp_path, "a", [base])
    flip(base / name)
    with pytest.raises(InputError, match=rf"a: was made from other inputs \(changed: {base / name}\);"):
        stage(tmp_path, "a", [base])
    if name in ("chat_template.jinja", "generation_config.json"):  # one that is gone is named too
        (base / name).unlink()
        with pytest.raises(InputError, match=rf"changed: {base / name}\)"):
            stage(tmp_path, "a", [base])


def test_what_decides_nothing_leaves_every_stage_complete(base, tmp_path):
    """A hub client's bookkeeping, a card and a licence are written anew by others, who do not ask."""
    stage(tmp_path, "a", [base])
    for name in BESIDE:
        (base / name).write_text("another")
    for name in "NOTICE", ".cache/new", "pytorch_model.bin", "original/consolidated.pth":
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("new")
    (base / "README.md").unlink()
    for path in base.iterdir():
        os.utime(path, (1, 1))
    assert not stage(tmp_path, "a", [base])


def test_a_folder_without_a_config_is_all_of_its_files(tmp_path):
    """A README.md beside data may say which files are which split."""
    (tmp_path / "data").mkdir()
    for name in "README.md", "train.jsonl":
        (tmp_path / "data" / name).write_text("{}")
    stage(tmp_path, "a", [str(tmp_path / "data")])
    (tmp_path / "data" / "README.md").write_text("another")
    with pytest.raises(InputError, match=rf"changed: {tmp_path / 'data'}\)"):
        stage(tmp_path, "a", [str(tmp_path / "data")])


def test_links_count_as_what_they_lead_to(base, tmp_path):
    """The hub's cache holds nothing else."""
    stage(tmp_path, "a", [base])
    linked = tmp_path / "models--org--base" / "snapshots" / ("0" * 40)
    blobs = Path(shutil.copytree(base, linked.parent.parent / "blobs"))
    linked.mkdir(parents=True)
    for path in blobs.iterdir():
        (linked / path.name).symlink_to(path)
    assert not stage(tmp_path, "a", [linked])
    flip(blobs / "tokenizer.json")
    with pytest.raises(InputError, match=rf"changed: org/base@{'0' * 40}/tokenizer.json\)"):
        stage(tmp_path, "a", [linked])


@pytest.fixture
def made(base, tmp_path) -> Path:
    """A run whose `model` is an artefact, and a stage that reads it."""
    (tmp_path / "raw").write_text("data")
    begin(tmp_path / "model", inputs=[tmp_path / "raw"], options=Options(run_dir=tmp_path))
    shutil.copytree(base, tmp_path / "model")
    finish(tmp_path / "model", num_rows=1, counts={}, seconds=0.0)
    stage(tmp_path, "b", [tmp_path / "model"])
    return tmp_path


def remake(run: Path) -> bool:
    return begin(run / "model", inputs=[run / "raw"], options=Options(run_dir=run))


@pytest.mark.parametrize("name", [*DECIDE, "vocab.json", "LICENSE"])
def test_of_a_model_that_was_made_every_file_counts(name, made):
    """Also one that decides nothing: someone has changed what the run made. Those who read it mind what decides."""
    assert not remake(made) and not stage(made, "b", [made / "model"])
    flip(made / "model" / name)
    with pytest.raises(InputError, match="model: is not what model.manifest.json describes"):
        remake(made)
    if name not in DECIDE:
        assert not stage(made, "b", [made / "model"])
        return
    with pytest.raises(InputError, match=f"model/{name}: was changed after model.manifest.json was written"):
        stage(made, "b", [made / "model"])
    if name == "generation_config.json":
        (made / "model" / name).unlink()
        with pytest.raises(InputError, match=f"model/{name}: was changed after"):
            stage(made, "c", [made / "model"])


def test_the_card_of_a_model_that_was_made_may_be_written_anew(made):
    (made / "model" / "README.md").write_text("there is more to say")
    assert not remake(made) and not stage(made, "b", [made / "model"])
    (made / "model" / "README.md").unlink()
    assert not remake(made) and not stage(made, "b", [made / "model"])


def test_a_model_is_hashed_once_when_a_stage_that_reads_it_begins(made, monkeypatch):
    """15 GB take a minute; the comparison with its own manifest needs no second one."""
    hashed, real = [], manifest.sha256_file
    monkeypatch.setattr(manifest.describe, "__defaults__", (lambda path: hashed.append(path.name) or real(path),))
    assert begin(made / "c", inputs=[made / "model"], options=Options(run_dir=made))
    assert sorted(hashed) == DECIDE


def test_a_manifest_of_an_earlier_version_is_one_clear_line(made):
    content = read_manifest(made / "model")
    del content["files"]
    write_sealed(manifest_path(made / "model"), content)
    with pytest.raises(
        InputError, match="model: its manifest is of an earlier version, which named no files; make it again"
    ):
        stage(made, "c", [made / "model"])
