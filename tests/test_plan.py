"""`conj plan`: what a run will take, from a model's config and tokenizer, without its weights."""

import re
import shutil
from pathlib import Path

import pytest
from bench_common import QWEN2
from conftest import ROOT, assert_one_line_error, change_config, command, random_pairs
from test_run import write_settings

from conj import plan as plan_module
from conj.data.files import read_jsonl, write_jsonl
from conj.data.options import parse_options, run_command
from conj.data.tokenizer import JudgeTokenizer
from conj.model.config import read_config
from conj.plan import expected_pairs, plan_options, read_workload
from conj.rates import rates_of
from conj.settings import resolve

README = (ROOT / "README.md").read_text("utf-8")
BASE = ROOT / "demo" / "base"


def write_geometry(folder: Path) -> Path:
    """Qwen2-7B's config.json beside the demo's tokenizer: all that a plan reads of a model."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(BASE / name, folder / name)
    q = QWEN2["7B"]
    sizes = {"vocab_size": q["V"], "hidden_size": q["D"], "intermediate_size": q["F"], "num_hidden_layers": q["L"]}
    sizes |= {
        "num_attention_heads": q["N"],
        "num_key_value_heads": q["K"],
        "head_dim": q["H"],
        "tie_word_embeddings": q["tie"],
    }
    change_config(
        folder,
        **sizes,
        max_position_embeddings=32768,
        layer_types=["full_attention"] * q["L"],
        max_window_layers=q["L"],
    )
    return folder


def readme_settings() -> str:
    return re.search(r"```toml\n(run_dir = .*?)```", README, re.S)[1]


@pytest.fixture
def plan_in(tmp_path, monkeypatch):
    """`conj plan` as the README has it, in a folder with the README's file and a model of Qwen2-7B's geometry."""
    write_geometry(tmp_path / "Qwen" / "Qwen2-7B-Instruct")
    (tmp_path / "skywork.toml").write_text(readme_settings(), "utf-8")
    monkeypatch.chdir(tmp_path)

    def plan(line: str):
        run_command(plan_module.main, plan_options(), plan_module.__doc__, line.split())

    return plan


SECTION = README[README.index("## Eight GPUs, and one") : README.index("## Evaluate any judge")]
WORK = "--num-prompts 80000 --prompt-tokens 1500 --judgment-tokens 250 --train-tflops 400"
ROWS = re.findall(r"^\| `(--.*?)` \| (.*) \|$", SECTION, re.M)
FIGURES = (
    r"--activation-checkpointing (\w+)", r"--max-tokens-per-pack (\d+)", r"GPU ([\d.]+ of [\d.]+) GiB \(", r"host ([\d.]+) GiB",
    r"; disk ([\d.]+) GB", r"again not counted, ([\d.]+) hours",
)  # fmt: skip


def test_the_readme_shows_what_the_command_prints(plan_in, capsys):
    line, said = re.search(r"```text\nconj plan (.*?[^\\])\n(.*?)```", SECTION, re.S).groups()
    plan_in(line.replace("\\\n", ""))
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(("machine", "figures"), ROWS, ids=[machine for machine, _ in ROWS])
def test_the_readmes_figures_of_other_machines_are_what_the_command_prints(machine, figures, plan_in, capsys):
    plan_in(f"skywork.toml {WORK} {machine}")
    out = capsys.readouterr().out
    assert [re.search(pattern, out)[1] for pattern in FIGURES] == figures.split(" | ") and len(ROWS) == 4


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--nproc-per-node 1 --gpu-memory 79", ("stage 6: expected at most 74.8 GiB", "--cpu-offload takes")),
        ("--gpu-memory 79 --nnodes 8", ("64 ranks", "--pairs-per-step of 64")),
        (
            "--nproc-per-node 1 --gpu-memory 79 --dpo.cpu-offload --host-memory 128",
            ("128.0 GiB of host memory", "254.0"),
        ),
        ("--nproc-per-node 1 --gpu-memory 20", ("stage 5", "more GPUs would fit")),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(line, parts, plan_in, capsys):
    with pytest.raises(SystemExit) as left:
        plan_in(f"skywork.toml --num-prompts 80000 --prompt-tokens 1500 {line}")
    [said] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert left.value.code == 2 and all(part in said for part in parts), said


def test_hours_are_said_where_a_rate_is_known_and_only_there(plan_in, capsys):
    plan_in("skywork.toml --num-prompts 8000 --prompt-tokens 1500 --gpu-memory 79")
    assert "hours" not in capsys.readouterr().out
    plan_in(
        "skywork.toml --num-prompts 8000 --prompt-tokens 1500 --gpu-memory 79 --sample-tokens-per-second 1000 --train-tflops 100"
    )
    out = capsys.readouterr().out
    [judgments] = re.findall(r"stage 2 ([\d,]+) judgments, ([\d.]+) million tokens written.*?, ([\d.]+) hours", out)
    assert judgments[0] == "64,000"
    assert float(judgments[2]) == pytest.approx(float(judgments[1]) * 1e6 / 1000 / 8 / 3600, abs=0.06)
    [(flops, hours)] = re.findall(r"([\d,]+) PFLOP, what is computed again not counted, ([\d.]+) hours", out)
    assert float(hours) == pytest.approx(float(flops.replace(",", "")) * 1e15 / 100e12 / 8 / 3600, abs=0.06)


def test_a_plan_of_data_alone_and_then_of_its_pairs(tmp_path, capsys):
    """Before anything ran lengths are of the data; with pairs.jsonl nothing is assumed."""
    given = parse_options(plan_options(), [str(write_settings(tmp_path)), "--device", "cpu"])
    [run] = resolve(given)
    tokenizer, config = JudgeTokenizer.load(BASE), read_config(BASE)
    work = read_workload(run, given, tokenizer, config)
    assert work.num_prompts == 396 and any("assumed" in note for note in work.notes)
    assert len(work.pairs) == 396 * 4 and work.share == 1
    [both] = resolve(
        parse_options(plan_options(), [*map(str, given.settings), "--device", "cpu", "--preprocess.both-orders"])
    )
    assert read_workload(both, given, tokenizer, config).num_prompts == 2 * 396
    write_jsonl(run.folder / "pairs.jsonl", random_pairs(30))
    work = read_workload(run, given, tokenizer, config)
    assert len(work.pairs) == len(read_jsonl(run.folder / "pairs.jsonl"))
    assert not any("assumed" in note for note in work.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('stages = ["pairs", "reference", "dpo"]', "--judgment-tokens: expected a number, as there is no stage 2"),
        ("--pairs-per-prompt 0.01", "--pairs-per-prompt 0.01: expected a pair at least, found none of 50 prompts"),
        (
            'stages = ["pairs", "reference", "dpo"] --judgment-tokens 99 --probe 2',
            "without preprocess, repeated, hinted",
        ),
    ],
)
def test_what_a_plan_cannot_assume_is_one_line(line, said, plan_in, capsys, tmp_path):
    """Each was a traceback."""
    if line.startswith("stages"):
        first, _, line = line.partition("] ")
        settings = tmp_path / "skywork.toml"
        settings.write_text(first.removesuffix("]") + "]\n" + settings.read_text("utf-8"), "utf-8")
    with pytest.raises(SystemExit):
        plan_in(f"skywork.toml --num-prompts 50 --prompt-tokens 100 {line}")
    assert said in capsys.readouterr().err


def test_a_stage_behind_an_endpoint_takes_no_hours_of_the_gpus_here(plan_in, capsys):
    rates = "--num-prompts 8000 --prompt-tokens 1500 --gpu-memory 79 --sample-tokens-per-second 1000"
    plan_in(f"skywork.toml {rates} --repeated.api-model large --repeated.base-url http://localhost:1/v1")
    second, third = (line for line in capsys.readouterr().out.splitlines() if re.match("stage [23]", line))
    assert second.endswith("by large behind an endpoint") and third.endswith("hours")


def test_expected_pairs_have_the_mean_that_was_given(tmp_path):
    [run] = resolve(parse_options(plan_options(), [str(write_settings(tmp_path))]))
    pairs = expected_pairs([10, 20], 100, 2.5, 30, run)
    assert len(pairs) == 250 and {len(ids) for ids in pairs.prompts} == {10, 20}


def test_rates_are_those_of_the_runs_own_files(tmp_path):
    """The median step but for the first, which compiles and warms up; a GPU's, not all ranks'."""
    assert rates_of(tmp_path, 1) == (None, None)
    rows = [{"flops_per_second": f, "num_ranks": 2} for f in (1.0, 40.0, 60.0, 50.0)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert rates_of(tmp_path, 2) == (25.0, None)


def test_the_command_needs_no_weights_and_says_what_is_missing(tmp_path):
    settings = write_settings(tmp_path, model=write_geometry(tmp_path / "model"), data=tmp_path / "none.jsonl")
    assert_one_line_error(command("conj", "plan", settings, "--gpu-memory", "79"), "none.jsonl")
    assert_one_line_error(command("conj", "plan", settings, "--num-prompts", "5"), "--prompt-tokens: expected both")
