"""Names on the hub: every stage gets one commit, and all that can go wrong on the way is one line.

The hub is a small one on 127.0.0.1, which the hub's own client asks, in processes of their own."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ENV, ROOT, assert_one_line_error, make_run, random_pairs, write_model
from small_hub import SmallHub, read_folder

from conj import InputError
from conj.data.files import read_jsonl, write_jsonl
from conj.data.hub import find_model, name_of, provenance, split_repo
from conj.data.identity import describe_inputs
from conj.data.manifest import manifest_path, read_manifest, write_sealed
from conj.data.model_files import weight_files
from conj.data.readers import pin_data

COMMIT = "0123456789" * 4
NEVER_FETCHED = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "training_args.bin"}
CARD = """---
configs:
- config_name: easy
  data_files: [{split: train, path: easy/train.jsonl}, {split: test, path: easy/test.jsonl}]
- config_name: hard
  data_files: [{split: train, path: hard/train.jsonl}]
---
"""


@pytest.fixture
def hub():
    with SmallHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, bytes]:
    """A model in two files of weights, with what repositories hold beside it."""
    folder = write_model(tmp_path_factory.mktemp("hub") / "model", max_shard_size="200KB")
    files = read_folder(folder)
    assert sum(name.endswith(".safetensors") for name in files) > 1
    return files | dict.fromkeys(NEVER_FETCHED, b"pickle") | {"README.md": b"a card", "LICENSE": b"a licence"}


@pytest.fixture
def model(hub, model_files):
    """The repository org/judge: tag v1, whose weights main then changes; a card is all that differs at v1-card."""
    repo = hub.add("models/org/judge")
    repo.first = repo.commit(model_files, tag="v1")
    repo.card = repo.commit(model_files | {"README.md": b"another card"}, tag="v1-card")
    repo.refs["main"] = repo.first
    return repo


def move_on(repo, files: dict[str, bytes]) -> str:
    """main gets another weight. Returns its commit, and the name of the file."""
    name = max(name for name in files if name.startswith("model-"))
    changed = bytearray(files[name])
    changed[-1] ^= 1
    return repo.commit(files | {name: bytes(changed)}), name


@pytest.fixture
def conj(hub, tmp_path):
    """Runs `conj ARGUMENTS` with that hub and a cache of its own."""

    def run(*arguments, program=("-m", "conj"), **environment) -> subprocess.CompletedProcess:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        line = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env=ENV | own | environment, cwd=ROOT, timeout=300)

    return run


# Stage 2 but for what it samples: the model is found, and stands in the manifest, without an engine.
SAMPLE = """
from conj.data.files import write_jsonl
from conj.data.manifest import begin, finish
from conj.data.options import run_command
from conj.sample.repeated import RepeatedOptions

def sample(options):
    [(artefact, inputs)] = options.makes().items()
    if begin(artefact, inputs=inputs, options=options):
        write_jsonl(artefact, [{}])
        finish(artefact, num_rows=1, counts={}, seconds=0)

run_command(sample, RepeatedOptions, "")
"""


@pytest.fixture
def sample(conj):
    def run(folder: Path, model: str, **environment) -> subprocess.CompletedProcess:
        if not (folder / "prompts.jsonl").exists():
            write_jsonl(folder / "prompts.jsonl", [{}])
        return conj("--run-dir", folder, "--model", model, program=("-c", SAMPLE), **environment)

    return run


def model_input(run: Path, name: str = "repeated.jsonl") -> dict:
    return next(entry for entry in read_manifest(run / name)["inputs"] if "files" in entry)


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- Models ----


def test_a_model_by_its_name_is_one_commit_for_a_run_folder_wherever_main_moves(
    hub, model, model_files, sample, tmp_path
):
    """Sampling with one commit and training with another would compare logprobs of two models."""
    run = tmp_path / "run"
    succeeded(sample(run, "org/judge"))
    entry = model_input(run)
    assert (entry["repo"], entry["revision"]) == ("org/judge", model.first)
    assert entry["path"].endswith(f"models--org--judge/snapshots/{model.first}")
    weights = {name for name in model_files if name.startswith("model")} - NEVER_FETCHED
    texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(entry["files"]) == weights | texts
    assert not hub.fetched() & NEVER_FETCHED and {"README.md", "LICENSE"} <= hub.fetched()

    second, changed = move_on(model, model_files)
    before = (run / "repeated.jsonl.manifest.json").read_bytes()
    for name in "org/judge", "org/judge@v1", "org/judge@v1-card":  # the last is another commit, and the same model
        assert "already complete" in succeeded(sample(run, name))
    assert_one_line_error(sample(run, "org/judge@main"), "repeated.jsonl", f"changed: org/judge@{second}/{changed}")
    assert (run / "repeated.jsonl.manifest.json").read_bytes() == before
    succeeded(sample(tmp_path / "new", "org/judge"))
    assert model_input(tmp_path / "new")["revision"] == second
    write_sealed(manifest_path(run / "hinted.jsonl"), read_manifest(tmp_path / "new" / "repeated.jsonl"))
    (run / "hinted.jsonl").touch()
    assert_one_line_error(sample(run, "org/judge"), f"{run} was made from", model.first, second, "org/judge@COMMIT")


def test_training_and_audit_take_names_too(model, model_files, conj, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", random_pairs(2))
    line = ["--run-dir", tmp_path, "--device", "cpu", "--model", "org/judge"]
    succeeded(conj("reference", *line, "--dtype", "float32"))
    assert model_input(tmp_path, "reference.safetensors")["revision"] == model.first
    second, changed = move_on(model, model_files)
    assert "holds      reference.safetensors" in succeeded(conj("audit", *line))
    moved = conj("audit", *line[:-1], "org/judge@main")
    assert f"made from another org/judge@{second}/{changed} than" in moved.stdout and moved.returncode == 1


def test_a_run_from_a_file_names_the_commits_in_its_settings_and_keeps_to_them(
    hub, data, model, model_files, conj, sample, tmp_path
):
    """All stages get the commit that the first start found; the settings give the same run again."""
    run, file = tmp_path / "run", tmp_path / "run.toml"
    file.write_text(
        f'run_dir = "{run}"\nmodel = "org/judge"\nstages = ["preprocess", "repeated"]\n'
        '[preprocess]\ndata = ["org/data:easy/test"]\n'
    )
    assert "== preprocess" in succeeded(conj("run", file, "--stages", "preprocess"))
    succeeded(sample(run, "org/judge"))
    assert "== " not in succeeded(conj("run", file))
    kept = tomllib.loads((run / "settings.toml").read_text())
    assert kept["repeated"]["model"] == f"org/judge@{model.first}"
    assert kept["preprocess"]["data"] == [f"org/data@{data.first}:easy/test"]
    move_on(model, model_files)
    data.commit(data_files("second"))
    for settings in file, run / "settings.toml":
        said = succeeded(conj("run", settings))
        assert "== " not in said and said.count("already complete") == 2, said
    moved = ["--model", "org/judge@main", "--preprocess.data", "org/data@main:easy/test"]
    assert succeeded(conj("run", file, "--dry-run", *moved)).count("stale") == 2
    # A run that builds on it takes what it made, and so its commits; one that does not, those of today.
    new = ["--dry-run", "--run-dir", tmp_path / "new"]
    assert succeeded(conj("run", file, *new, "--from", run)).count(f"taken from {run}") == 2
    said = succeeded(conj("run", file, *new))
    assert said.count("to do") == 2 and model.refs["main"] in said and data.refs["main"] in said


def test_a_judge_brings_its_model_along(hub, model, conj, tmp_path):
    """The file of a judge names its model; who gives --model wins."""
    judge = tmp_path / "mine.toml"
    judge.write_text('prompt = "con-j"\nmodel = "org/judge@v1"\n')
    (tmp_path / "run.toml").write_text(
        f'run_dir = "{tmp_path / "run"}"\nstages = ["evaluate"]\n[evaluate]\njudge = "{judge}"\n'
    )
    line = ["run", tmp_path / "run.toml", "--dry-run", "--evaluate.data", ROOT / "demo" / "test.jsonl"]
    assert f"--model={tmp_path}/home/hub/models--org--judge/snapshots/{model.first}" in succeeded(conj(*line))
    assert f"--model={ROOT / 'demo' / 'base'}" in succeeded(conj(*line, "--model", ROOT / "demo" / "base"))


def test_without_a_network_the_cache_is_enough_and_without_a_cache_it_is_one_line(model, sample, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1"}
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens
    run, parts = (
        tmp_path / "run",
        ("org/judge: no such folder here", "not whole in the cache", "`hf download org/judge`"),
    )
    assert_one_line_error(sample(run, "org/judge", **offline), *parts, "HF_HUB_OFFLINE is set")
    assert_one_line_error(sample(run, "org/judge", **gone), *parts, "the hub cannot be reached")
    succeeded(sample(run, "org/judge"))
    for number, environment in enumerate((offline, gone)):
        assert "already complete" in succeeded(sample(run, "org/judge", **environment))
        succeeded(sample(tmp_path / f"new {number}", "org/judge", **environment))
    assert_one_line_error(sample(run, "org/judge@v2", **offline), "org/judge@v2", "not whole in the cache")
    blob = next((tmp_path / "home").glob(f"hub/models--org--judge/snapshots/{model.first}/model-00001*"))
    blob.unlink()
    assert_one_line_error(sample(tmp_path / "new", "org/judge", **offline), "org/judge", "not whole in the cache")


def test_a_download_that_breaks_off_is_one_line_and_the_next_start_goes_on(hub, sample, tmp_path):
    """15 GB on a bad line: a file is asked for from where it broke off, and files that are whole stay."""
    files = read_folder(write_model(tmp_path / "large", intermediate_size=30_000))
    size = len(files["model.safetensors"])
    assert size > 30_000_000  # the client writes 10 MB at once
    hub.add("models/org/large").commit(files)
    hub.break_at, run = 15_000_000, tmp_path / "run"
    assert_one_line_error(sample(run, "org/large"), "org/large", "the download broke off", "start again to go on")
    assert not list(run.glob("repeated*"))
    assert {int(span.removeprefix("bytes=").split("-")[0]) >= 10_000_000 for span in hub.ranges} == {True}
    for without in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert_one_line_error(sample(run, "org/large", **without), "org/large", "not whole in the cache")
    hub.break_at, hub.asked = None, []
    succeeded(sample(run, "org/large"))
    assert hub.fetched() == {"model.safetensors"}
    assert model_input(run)["files"] == describe_inputs([tmp_path / "large"])[0]["files"]


def test_what_the_hub_does_not_give_is_one_line(hub, model, model_files, conj, tmp_path):
    hub.add("models/org/gated").commit({"config.json": b"{}"})
    hub.repos["models/org/gated"].is_gated = True
    hub.add("models/org/pickle").commit(
        {name: content for name, content in model_files.items() if not name.startswith("model")}
    )
    make_run(tmp_path)
    for name, *parts in (
        ("org/nothing", "org/nothing: no such folder here, and no such model on the hub, or a private one"),
        ("org/judge@v9", "org/judge@v9: the model has no such revision"),
        ("org/gated", "org/gated: is gated; accept its terms at", "/org/gated and log in"),
        ("org/pickle", "org/pickle: has no weights in safetensors, and a pickle is never fetched"),
        ("runs/typo/model", "runs/typo/model: no such model folder"),
        ("org/a--b", "org/a--b: no such folder here, and no name on the hub"),
        ("nowhere", "nowhere: no such model folder"),
    ):
        assert_one_line_error(conj("repeated", "--run-dir", tmp_path, "--model", name), *parts)
    assert "pytorch_model.bin" not in hub.fetched()


def test_help_asks_no_hub(hub, conj):
    succeeded(conj("repeated", "--help"))
    assert not hub.asked


# ---- Data sets ----


def data_files(word: str) -> dict[str, bytes]:
    def rows(name: str) -> bytes:
        rows = ({"prompt": f"{name} {i}", "chosen": word, "rejected": "worse"} for i in range(3))
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    names = ("easy/train", "easy/test", "hard/train")
    return {"README.md": CARD.encode()} | {f"{name}.jsonl": rows(name) for name in names}


@pytest.fixture
def data(hub):
    repo = hub.add("datasets/org/data")
    repo.first = repo.commit(data_files("first"), tag="v1")
    return repo


def preprocess(run: Path, name: str) -> list:
    return ["preprocess", "--run-dir", run, "--data", name]


@pytest.mark.parametrize(
    ("name", "part", "question"),
    [
        ("org/data:easy/test", "easy/test", "easy/test 0"),
        ("org/data@v1:easy/", "easy/", "easy/train 0"),
        ("org/data:hard/train", "hard/train", "hard/train 0"),
    ],
)
def test_data_by_name_configuration_and_split_stand_in_the_manifest_with_their_commit(
    data, conj, tmp_path, name, part, question
):
    succeeded(conj(*preprocess(tmp_path, name)))
    repo, split = read_manifest(tmp_path / "prompts.jsonl")["inputs"]
    assert repo == {"path": f"org/data@{data.first}", "sha256": None, "repo": "org/data", "revision": data.first}
    assert split == {"path": part, "sha256": None}
    rows = read_jsonl(tmp_path / "prompts.jsonl")
    assert question in [row["question"] for row in rows] and len(rows) == 3
    assert {row["source"] for row in rows} == {name.replace("@v1", "")}  # rows do not depend on who names the commit


def test_a_run_folder_keeps_to_the_commit_of_its_data(data, conj, tmp_path):
    run = tmp_path / "run"
    succeeded(conj(*preprocess(run, "org/data:easy/train")))
    second = data.commit(data_files("second"))
    assert "already complete" in succeeded(conj(*preprocess(run, "org/data:easy/train")))
    assert "already complete" in succeeded(conj(*preprocess(run, "org/data@v1:easy/train")))
    assert_one_line_error(conj(*preprocess(run, "org/data@main:easy/train")), f"changed: org/data@{second}")
    (run / "prompts.jsonl").unlink()  # and nothing is bound by what is not there
    (run / "prompts.jsonl.manifest.json").unlink()
    succeeded(conj(*preprocess(run, "org/data:easy/train")))
    assert read_manifest(run / "prompts.jsonl")["inputs"][0]["revision"] == second
    excluding = ["--exclude", "org/data:easy/test"]  # has a commit too
    succeeded(conj(*preprocess(tmp_path / "without", "org/data:easy/train"), *excluding))
    inputs = read_manifest(tmp_path / "without" / "prompts.jsonl")["inputs"]
    assert [entry.get("revision") for entry in inputs] == [second, None, None, second, None]

    # Without a network: what was read is read again, by its commit; another commit is not taken for it.
    offline = {"HF_HUB_OFFLINE": "1"}
    succeeded(conj(*preprocess(tmp_path / "again", f"org/data@{second}:easy/train"), **offline))
    assert (tmp_path / "again" / "prompts.jsonl").read_bytes() == (run / "prompts.jsonl").read_bytes()
    third = data.commit(data_files("third"))
    done = conj(*preprocess(tmp_path / "third", f"org/data@{third}:easy/train"), **offline)
    assert_one_line_error(done, f"org/data@{third}", "not in the cache at this commit")
    done = conj(*preprocess(tmp_path / "none", "org/other"), **offline)
    assert_one_line_error(done, "org/other: no such file or folder here", "--repo-type dataset")


def test_what_a_data_set_does_not_have_is_one_line_that_names_what_it_has(data, conj, tmp_path):
    for name, *parts in (
        ("org/data", "has several configurations; expected org/data:CONFIG/SPLIT with one of easy, hard"),
        ("org/data:medium/train", "no configuration 'medium'; expected org/data:CONFIG/SPLIT with one of easy, hard"),
        ("org/data:easy/eval", "no split 'eval'; expected org/data:easy/SPLIT with one of train, test"),
        ("org/data@v9:easy/train", "org/data@v9: the data set has no such revision"),
        ("org/nothing", "org/nothing: no such file or folder here, and no such data set on the hub"),
    ):
        assert_one_line_error(conj(*preprocess(tmp_path / "run", name)), *parts)
    assert not (tmp_path / "run" / "prompts.jsonl").exists()


# ---- Names ----


def test_a_path_that_exists_wins_and_what_cannot_be_a_name_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "rows.jsonl").touch()
    assert find_model(Path("org/name")) == Path("org/name")
    assert pin_data("org/name:train") == "org/name:train"
    for name in "org/name", "a.b/c_d-e@v1.0", "org/name@refs/pr/1", "org/name@" + COMMIT:
        assert split_repo(name) == (name.split("@")[0], name.split("@")[1] if "@" in name else None)
    for name in "a/b/c", "/a/b", "a b/c", "../b", "org/name@", "org/name@a b", "":
        assert split_repo(name) is None, name
    for name in "nowhere", "a/b/c", "/a/b":
        with pytest.raises(InputError, match="no such model folder"):
            find_model(Path(name))
    assert pin_data("org/mistyped.jsonl") == "org/mistyped.jsonl"  # the reader says that there is no such file


def test_the_commit_is_read_off_the_cache(tmp_path):
    folder = tmp_path / "models--org--a-b" / "snapshots" / COMMIT
    assert provenance(folder) == {"repo": "org/a-b", "revision": COMMIT}
    assert provenance(f"org/data@{COMMIT}") == {"repo": "org/data", "revision": COMMIT}
    for other in tmp_path / "org" / "a-b", "org/data@main", "org/data", "easy/test", f"judge x {COMMIT}":
        assert provenance(other) == {}
    assert name_of(folder) == str(folder)  # of another cache than this process's: its name would not lead there


def test_weights_that_models_of_the_cache_share_are_read_and_links_out_of_it_are_not(tmp_path):
    """The client keeps what several models hold once, in blobs/ of the whole cache: snapshots link to links."""
    folder = write_model(tmp_path / "plain", max_shard_size="200KB")
    cache = tmp_path / "cache"
    snapshot, store = cache / "models--org--name" / "snapshots" / COMMIT, cache / "blobs" / "ab"
    own = cache / "models--org--name" / "blobs"
    for place in snapshot, store, own:
        place.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, store / path.name)
        (own / path.name).symlink_to(store / path.name)
        (snapshot / path.name).symlink_to(own / path.name)
    assert len(weight_files(snapshot)) > 1
    assert describe_inputs([snapshot])[0]["sha256"] == describe_inputs([folder])[0]["sha256"]
    weight = weight_files(snapshot)[0]
    (own / weight.name).unlink()
    (own / weight.name).symlink_to(folder / weight.name)
    with pytest.raises(InputError, match="a link out of it"):
        weight_files(snapshot)
