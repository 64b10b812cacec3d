"""`conj run`: one file of settings, all of it checked before the first stage; sweeps share what is the same."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, command, cpu_seconds, judgment_text

from conj import InputError
from conj.data import manifest
from conj.data.files import read_jsonl, write_jsonl
from conj.data.options import parse_options
from conj.data.preprocess import preprocess
from conj.preflight import check, check_one_judge, survey
from conj.run import command_line
from conj.settings import COMMANDS, STAGES, as_toml, merge, resolve, run_file_options
from conj.train.audit.chain import check_chain

SETTINGS = """
run_dir = "{run}"
model = "{model}"
seed = 7
[preprocess]
data = ["{data}"]
[pairs]
seed = 8
[dpo]
learning-rate = 1e-4
[evaluate]
data = ["demo/test.jsonl"]
"""


def write_settings(folder: Path, more: str = "", **changes) -> Path:
    """A file of settings for a run in `folder / "run"`."""
    values = {"run": folder / "run", "model": ROOT / "demo" / "base", "data": ROOT / "demo" / "train.jsonl"} | changes
    (folder / "run.toml").write_text(SETTINGS.format(**values) + more)
    return folder / "run.toml"


def resolved(*arguments) -> list:
    return resolve(parse_options(run_file_options(), [str(a) for a in arguments]))


# ---- From the file to every stage ----


def test_what_is_shared_reaches_no_stage_behind_an_endpoint_that_has_its_own(tmp_path):
    """It was refused there, and a file could not unset it. In the stage's own table it is still a mistake."""
    file = write_settings(tmp_path, '[repeated]\napi_model = "large"\nbase_url = "http://localhost:1/v1"\ntop_k = 40\n')
    judge = ["--evaluate.judge", "gpt-4o", "--device", "cpu", "--dtype", "float32", "--max-length", "900"]
    judge += ["--ray-address", "node-1:6379"]  # as scripts/run_conj.sbatch gives it
    [run] = resolved(file, *judge)
    repeated, hinted, judged = (run.options[stage] for stage in ("repeated", "hinted", "evaluate"))
    assert (repeated.device, repeated.dtype, repeated.max_length) == ("auto", "auto", 900)
    assert repeated.model == hinted.model == ROOT / "demo" / "base"  # whose tokens are counted
    assert (repeated.top_k, repeated.repetition_penalty) == (40, None) and hinted.repetition_penalty == 1.0
    assert (hinted.device, run.options["dpo"].device, judged.device) == ("cpu", "cpu", "auto")
    assert judged.model is judged.max_length is None
    assert (repeated.ray_address, hinted.ray_address, judged.ray_address) == (None, "node-1:6379", None)
    assert [str(path) for path in repeated.makes()[repeated.run_dir / "repeated.jsonl"]][1] == "endpoint model large"
    line = command_line("repeated", repeated, 1)
    assert {"--api-model=large", "--base-url=http://localhost:1/v1", "--top-k=40"} < set(line)
    with pytest.raises(InputError, match="--device: large is behind an endpoint"):
        resolved(file, *judge, "--repeated.device", "cpu")


@pytest.mark.parametrize(("asked", "message"), [
    (["--repeated.judge", "english"], r"\[hinted\] judge: expected english, as in \[repeated\], found con-j"),
    (["--dpo.judge", "english"], r"\[dpo\] judge: expected con-j, as in \[repeated\], found english"),
    (["--evaluate.judge", "english"], r"\[evaluate\] judge: expected con-j, as in \[repeated\], found english; a --eval"),
    (["--evaluate.judge", "english", "--evaluate.name", "other"], None), (["--judge", "english"], None),
    (["--evaluate.judge", "qwen2-7b"], None),
])  # fmt: skip
def test_stages_with_different_judges_are_refused_before_the_first_one(asked, message, tmp_path):
    """Each would refuse what the one before it made, after the hours that it took."""
    [run] = resolved(write_settings(tmp_path), *asked)
    if message is None:
        check_one_judge(run)
        return
    with pytest.raises(InputError, match=message):
        check_one_judge(run)


@pytest.mark.parametrize("asked", [["--repeated.api-model", "large"], ["--evaluate.judge", "gpt-4o"]])
def test_an_endpoint_that_no_request_could_reach_is_refused_before_the_first_stage(asked, tmp_path, monkeypatch):
    """A key that is missed hours later is a night lost. No request is sent: a server may be started between stages."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = write_settings(tmp_path)
    with pytest.raises(InputError, match="OPENAI_API_KEY: expected the key"):
        check(resolved(file, *asked))
    address = asked[0].partition(".")[0] + ".base-url"
    check(resolved(file, *asked, address, "http://localhost:1/v1"))
    if asked[0] == "--repeated.api-model":  # whose tokens are counted by a --model
        with pytest.raises(InputError, match="--max-new-tokens: expected fewer than the"):
            check(resolved(file, *asked, address, "http://localhost:1/v1", "--repeated.max-new-tokens", "99999"))
    with pytest.raises(InputError, match="--base-url: expected an address"):
        check(resolved(file, *asked, address, "http://localhost:port"))


def test_what_stands_above_reaches_every_stage_a_table_wins_and_the_command_line_wins_over_both(tmp_path):
    [run] = resolved(write_settings(tmp_path))
    assert list(run.options) == list(STAGES)
    assert {stage: options.seed for stage, options in run.options.items() if hasattr(options, "seed")} == {
        **dict.fromkeys(("preprocess", "repeated", "hinted", "dpo", "evaluate"), 7), "pairs": 8,
    }  # fmt: skip
    assert run.options["dpo"].learning_rate == 1e-4
    [run] = resolved(
        write_settings(tmp_path), "--seed", "9", "--dpo.learning-rate", "1e-5", "--evaluate.data", "a.jsonl", "b.jsonl"
    )
    assert {options.seed for options in run.options.values() if hasattr(options, "seed")} == {9}
    assert run.options["dpo"].learning_rate == 1e-5
    assert run.options["evaluate"].data == ("a.jsonl", "b.jsonl")


def test_a_later_file_goes_over_an_earlier_one_table_by_table(tmp_path):
    (tmp_path / "more.toml").write_text("seed = 5\n[dpo]\nbeta = 0.3\n")
    [run] = resolved(write_settings(tmp_path), tmp_path / "more.toml")
    dpo = run.options["dpo"]
    assert (dpo.seed, dpo.beta, dpo.learning_rate) == (5, 0.3, 1e-4)
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(("files", "runs"), [
    (["demo/demo.toml", "demo/betas.toml"], 3),
    (["demo/demo.toml", "scripts/ablations.toml"], 6),
    (["real/real.toml"], 1),
    (["real/real.toml", "real/ladder.toml"], 8),
    (["real/real.toml", "real/ablations.toml"], 11),
])  # fmt: skip
def test_the_settings_that_are_shipped_are_those_of_as_many_runs(files, runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = resolved(*files, "--run-dir", "runs/x")
    assert len({repr({**run.options, "name": run.folder}) for run in found}) == len(found) == runs


def test_the_resolved_settings_are_a_file_that_gives_the_same_run(tmp_path):
    import tomli_w

    (tmp_path / "other").mkdir()
    [run] = resolved(write_settings(tmp_path), "--nproc-per-node", "2", "--from", tmp_path / "other")
    (tmp_path / "again.toml").write_text(tomli_w.dumps(as_toml(run)))
    assert resolved(tmp_path / "again.toml") == [run]


def test_questions_of_the_evaluation_are_left_out_of_training_unless_the_file_says_otherwise(tmp_path):
    """Whatever stages a start asks for, or what is in the run folder would be of other inputs; `exclude = []` stays off in
    the resolved settings, too."""
    import tomli_w

    def excluded(*arguments) -> set:
        return {run.options["preprocess"].exclude for run in resolved(*arguments)}

    file = write_settings(tmp_path)
    assert excluded(file) == excluded(file, "--stages", "preprocess") == {("demo/test.jsonl",)}
    assert excluded(file, "--evaluate.data", "reward-bench", "a.jsonl") == {("reward-bench", "a.jsonl")}
    assert excluded(file, "--preprocess.exclude", "b.jsonl") == {("b.jsonl",)}
    sweep = write_settings(tmp_path, "[runs.a]\n[runs.b.preprocess]\nexclude = []\n")
    assert excluded(sweep) == {("demo/test.jsonl",), ()}
    off = tmp_path / "off.toml"
    off.write_text("[preprocess]\nexclude = []\n")
    [run] = resolved(write_settings(tmp_path), off)
    assert run.options["preprocess"].exclude == ()
    (tmp_path / "again.toml").write_text(tomli_w.dumps(as_toml(run)))
    assert resolved(tmp_path / "again.toml") == [run]
    with pytest.raises(InputError, match="nowhere.jsonl: no such file or folder"):
        check(resolved(file, "--preprocess.exclude", "nowhere.jsonl"))


@pytest.mark.parametrize(("given", "message"), [
    (["--preprocess.columns", "questoin=a", "better=b", "worse=c"], "--columns questoin=: no such target"),
    (["--preprocess.columns", "question=a", "question=b", "better=b", "worse=c"], "--columns: expected each target once"),
    (["--preprocess.columns", "question=nope", "better=chosen", "worse=rejected"], "question=nope: no such column"),
    (["--preprocess.data", "EMPTY"], "empty.jsonl: expected at least one row"),
    (["--preprocess.exclude", "EMPTY"], "empty.jsonl: expected at least one row"),
    (["--evaluate.data", "OTHER"], "other.jsonl:1: columns text are of no known layout"),
])  # fmt: skip
def test_what_the_first_row_shows_is_refused_before_the_first_stage(tmp_path, given, message):
    """What stage 1 or, hours later, stage 7 would refuse."""
    files = {"EMPTY": tmp_path / "empty.jsonl", "OTHER": tmp_path / "other.jsonl"}
    files["EMPTY"].write_text("")
    files["OTHER"].write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=message):
        check(resolved(write_settings(tmp_path), *(str(files.get(part, part)) for part in given)))


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_of_a_stage_gives_its_options_again(tmp_path, stage):
    """Options that are not their defaults travel as a command line."""
    changes = ["--pairs.no-rationale", "--pairs.pair-types", "hinted", "--dpo.share", "pair", "--dpo.cpu-offload"]
    [run] = resolved(write_settings(tmp_path), *changes, "--from", ROOT / "demo", ROOT / "tests")
    line = command_line(stage, run.options[stage], num_processes=1)
    assert line[:3] == [sys.executable, "-m", COMMANDS[stage].module]
    assert parse_options(COMMANDS[stage].load_options(), line[3:]) == run.options[stage]
    ranks = command_line(stage, run.options[stage], num_processes=4)
    assert ("torch.distributed.run" in ranks) == (stage in ("reference", "dpo"))


# ---- Mistakes: one line, in seconds, nothing written ----


@pytest.mark.parametrize(
    ("more", "changes", "parts"),
    [
        ('beta = "x"', {}, ["run.toml [dpo]: beta: expected a number, found 'x'"]),
        ("betta = 1", {}, ["run.toml [dpo]: unknown key betta; did you mean beta?"]),
        ("beta = -1", {}, ["run.toml [dpo]: --beta: expected more than 0, found -1"]),
        ("", {"model": "nowhere"}, ["nowhere: no such model folder"]),
        ("", {"data": "nowhere.jsonl"}, ["nowhere.jsonl: no such file or folder"]),
        ("[dppo]", {}, ["unknown key dppo; did you mean dpo?"]),
        ("[runs.'a/b']", {}, ["[runs.a/b]: expected another name"]),
        ("[runs.a.dpo]\nbeta = 'x'", {}, ["[runs.a.dpo]: beta: expected a number"]),
        ("[runs.a]\nrun_dir = 'x'", {}, ["[runs.a]: unknown key run_dir"]),
        ("[runs.base]", {}, ["[runs.base]: expected another name"]),  # the base judge has that name in the report
        ("[dpo", {}, ["expected TOML"]),
        ("beta = 1\nb-e-t-a = 1", {}, ["run.toml [dpo]: unknown key b_e_t_a"]),
        ("beta_1 = 1\nbeta-1 = 1", {}, ["given twice"]),
        (
            "no_cpu_offload = true",
            {},
            ["unknown key no_cpu_offload"],
        ),  # of the command line; here it is cpu_offload = false
        ("seed = 1.5", {}, ["seed: expected a whole number, found 1.5"]),
        ("run_dir = 'z'", {}, ["[dpo]: unknown key run_dir"]),
        ("[runs.a.pairs]\npair_types = []", {}, ["[runs.a.pairs]: pair_types: expected at least one, found []"]),
        ("dtype = 'float32'", {}, ["[dpo] dtype: expected bfloat16, as in [reference], found float32"]),
        ("attention = 'flash_attn'", {}, ["[dpo] attention: expected None, as in [reference], found flash_attn"]),
        ("device = 'cuda'", {}, ["[dpo] --device: expected auto or cpu, since no GPU is visible"]),
        (
            "[runs.a.pairs]\npair_types = 'hinted'",
            {},
            ["[runs.a.pairs]: pair_types: expected a list of texts, found 'hinted'"],
        ),
    ],
)
def test_a_mistake_in_any_table_is_one_line_before_anything_is_written(tmp_path, more, changes, parts):
    text = SETTINGS + more if more.startswith("[") else SETTINGS.replace("[evaluate]", f"{more}\n[evaluate]")
    path = write_settings(tmp_path)
    path.write_text(
        text.format(**{"run": tmp_path / "run", "data": "demo/train.jsonl", "model": "demo/base"} | changes)
    )
    before = os.times()
    assert_one_line_error(command("conj", "run", path), *parts)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < cpu_seconds(2) or changes or "--device" in parts[0]  # asking torch takes longer
    assert not (tmp_path / "run").exists()


def test_a_missing_option_is_named_with_its_table(tmp_path):
    path = write_settings(tmp_path)
    path.write_text(path.read_text().replace("[preprocess]", "[hinted]").replace("data = [", "#", 1))
    with pytest.raises(InputError, match=r"run.toml \[preprocess\]: .*--data requires an argument"):
        resolved(path)


# ---- What would run, and what runs ----


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> list[Path]:
    """Settings of a run whose stages 1 to 3 are complete: 24 prompts of the demo, of each 2 right and 2 wrong judgments
    and the hinted two."""
    folder = tmp_path_factory.mktemp("sampled")
    files = [write_settings(folder, "[repeated]\nnum_samples = 4\n"), folder / "more.toml"]
    files[1].write_text(
        "device = 'cpu'\n[preprocess]\nlimit = 24\n[pairs]\neval_fraction = 0.0\n[reference]\ndtype = 'float32'\n"
        "[dpo]\ndtype = 'float32'\npairs_per_step = 12\nmax_steps = 2\nlearning_rate = 5e-5\n"
    )
    [run] = resolved(*files)
    preprocess(run.options["preprocess"])
    rows = {"repeated": [], "hinted": []}
    for prompt in read_jsonl(run.folder / "prompts.jsonl"):
        verdicts = [("repeated", i, 1 + i % 2) for i in range(4)]
        verdicts += [("hint", 0, prompt["label"]), ("hint_reversed", 0, 3 - prompt["label"])]
        for kind, index, verdict in verdicts:
            row = {"id": prompt["id"], "kind": kind, "index": index, "verdict": verdict}
            rows["hinted" if "hint" in kind else "repeated"].append(
                row | {"text": judgment_text(f"{kind} {index}", verdict)}
            )
    for stage, judgments in rows.items():
        [(artefact, inputs)] = run.options[stage].makes().items()
        manifest.begin(artefact, inputs=inputs, options=run.options[stage])
        write_jsonl(artefact, judgments)
        manifest.finish(artefact, num_rows=len(judgments), counts={}, seconds=0)
    return files


def surveyed(*arguments) -> dict[str, str]:
    """What `conj run` finds of each artefact, the last run folder's."""
    return {artefact.name: found for artefact, found in survey(resolved(*arguments)).items()}


def test_a_dry_run_says_what_is_complete_what_is_to_do_and_what_is_stale_and_why(sampled):
    found = surveyed(*sampled)
    assert found["repeated.jsonl"] == found["hinted.jsonl"] == "complete"
    assert found["pairs.jsonl"] == found["model"] == "to do"
    found = surveyed(*sampled, "--repeated.temperature", "0.7")
    assert "stale" in found["repeated.jsonl"] and "temperature=1.2, now 0.7" in found["repeated.jsonl"]
    assert found["hinted.jsonl"] == "complete"


def test_what_follows_from_a_file_that_will_be_made_anew_is_stale_too(sweep, tmp_path):
    """Otherwise stages 1 to 5 run for hours, and stage 6 then refuses what they made."""
    line, out, _ = sweep
    found = surveyed(*line[2:], "--pairs.seed", "7")  # b takes its pairs from a
    assert found["pairs.jsonl"] == "taken from " + str(out / "a") and found["model"].startswith("stale: ")
    found = surveyed(*line[2 : -len(STAGES)], "--run-dir", tmp_path / "new")
    assert found["repeated.jsonl"].startswith("taken from") and found["pairs.jsonl"].startswith("taken from")


def test_settings_of_stages_that_a_line_leaves_out_are_kept(sweep):
    line, out, _ = sweep
    assert command(*line[: -len(STAGES) + 1], "pairs").returncode == 0
    assert tomllib.loads((out / "a" / "settings.toml").read_text())["dpo"]["beta"] == 0.1


def test_what_is_stale_is_found_before_the_first_stage(sampled):
    """Two hours of sampling must not end in an error of stage 6 that could have been told before."""
    run = sampled[0].parent / "run"
    before = sorted(path.name for path in run.iterdir())
    done = command("conj", "run", *sampled, "--hinted.temperature", "0.7")
    assert_one_line_error(done, "hinted.jsonl", "temperature=1.0, now 0.7", "delete it")
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.fixture(scope="module")
def sweep(sampled) -> tuple[list, Path, subprocess.CompletedProcess]:
    """Two betas over one set of pairs, on samples that another run folder holds: the line, its folder, what it said."""
    base = sampled[0].parent / "run"
    out, settings = base.with_name("sweep"), base.with_name("sweep.toml")
    settings.write_text("[runs.a.dpo]\nbeta = 0.1\n[runs.b.dpo]\nbeta = 0.2\n")
    line = ["conj", "run", *sampled, settings, "--run-dir", out, "--from", base, "--stages", *STAGES[:-1]]
    before = {path: path.read_bytes() for path in base.iterdir()}
    done = command(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    return line, out, done


def test_a_sweep_makes_once_what_its_runs_share(sampled, sweep):
    line, out, done = sweep
    started = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("== ")]
    assert started == ["== pairs", "== reference", "== dpo", "== dpo"]
    assert manifest.hash_input(out / "a" / "model") != manifest.hash_input(out / "b" / "model")
    assert not (out / "b" / "pairs.jsonl").exists() and not (out / "a" / "prompts.jsonl").exists()
    written = [tomllib.loads((out / name / "settings.toml").read_text())["dpo"]["beta"] for name in "ab"]
    assert written == [0.1, 0.2]
    again = command(*line)
    assert again.stdout.count("already complete") == 12 and "== " not in again.stdout
    said = surveyed(*line[2 : -len(STAGES)], "--run-dir", out.with_name("new"))
    assert said["pairs.jsonl"] == f"taken from {out.with_name('new') / 'a'}" and said["model"] == "to do"


def test_an_audit_follows_a_run_to_those_that_it_builds_on(sweep):
    """`b` takes its pairs from `a`, and `a` its samples from another run. A byte that is changed there is found, also by
    the audit of a run that one command made on another's files."""
    _, out, _ = sweep
    options = ["--model", ROOT / "demo" / "base", "--dtype", "float32", "--pairs-per-step", "12", "--max-steps", "1"]
    alone = command("conj.train.dpo", "--run-dir", out / "alone", "--from", out / "b", *options)
    assert alone.returncode == 0 and not (out / "alone" / "pairs.jsonl").exists(), alone.stderr
    for name in "b", "alone":
        done = command("conj.train.audit", "--run-dir", out / name)
        assert done.returncode == 0 and str(out.with_name("run")) in done.stdout, done.stdout
    samples = out.with_name("run") / "repeated.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(whole.replace(b"repeated 0", b"repeated 9", 1))
    try:
        for name in "b", "alone":
            with pytest.raises(InputError, match="repeated.jsonl was changed"):
                require_all(check_chain(out / name, None))
    finally:
        samples.write_bytes(whole)


def require_all(checks: list) -> None:
    for one in checks:
        if one.outcome != "holds":
            raise InputError(one.found)
