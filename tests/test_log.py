"""What a training run says: fields of a row, the same names in every sink, plain lines where nobody watches."""

import os
import pty
import shutil
import subprocess
import sys
import termios
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ENV, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dpo import ARGUMENTS, NOT_COMPARED, dpo_options, go_back, load, make_reference
from torch.utils.flop_counter import FlopCounterMode

from conj import InputError
from conj.data.files import read_jsonl, write_jsonl
from conj.data.packs import Group, plan_packs
from conj.model.config import read_config
from conj.train import dpo, options
from conj.train.audit.compare import STEP_FIELDS
from conj.train.flops import idle_share, step_flops
from conj.train.log import COLUMNS, summary
from conj.train.reference import compute_logps
from conj.train.sharding import build_sharded_model, distributed


@pytest.fixture
def ready(run_folder, tied_model):
    """A run folder with pairs of two types and their reference logprobs."""
    rows = enumerate(read_jsonl(run_folder / "pairs.jsonl"))
    write_jsonl(run_folder / "pairs.jsonl", [r | {"pair_type": ("repeated", "hinted")[i % 2]} for i, r in rows])
    make_reference(run_folder, tied_model)
    return run_folder


# ---- Rows ----


def test_every_field_of_a_row_is_compared_or_says_when_where_and_how_fast(ready, tied_model):
    """A field in neither list would differ from run to run unseen, or fail the audit of a sound run."""
    dpo.main(dpo_options(ready, tied_model, num_train_epochs=2, eval_steps=3))
    rows = read_jsonl(ready / "metrics.jsonl")
    by_type = {f"rewards/accuracies/{kind}" for kind in ("repeated", "hinted")}
    for row in rows:
        own = {name for name in row if not name.startswith("eval/")} - by_type
        assert own == {*STEP_FIELDS, *NOT_COMPARED, "epoch"}
    assert {"eval/loss", "eval/rewards/margins", "eval/rewards/accuracies", "eval/logps/chosen"} <= rows[-1].keys()
    assert rows[-1]["epoch"] == 2.0 and rows[len(rows) // 2 - 1]["epoch"] == 1.0
    assert rows[0]["rewards/accuracies"] is None and 0 <= rows[-1]["rewards/accuracies"] <= 1
    for row in rows:
        assert 0 < row["share_of_ceiling"] < 1 and row["idle_share"] == 0 and row["peak_memory_bytes"] > 1e8
        of_weights = 6 * 2 * 64 * (64 + 3 * 160)  # a token's
        assert row["flops_per_second"] / row["tokens_per_second"] > of_weights
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_accuracies_are_shares_of_pairs_by_type_and_absent_while_all_margins_are_0(ready, tied_model):
    """At step 1 no pair is right or wrong; 0 % would say that all of them are wrong."""
    pairs, _ = load(ready, tied_model)
    packs = [[Group(prompt=pairs.prompt_of[i], pairs=[i])] for i in range(6)]
    values = torch.zeros(6, len(COLUMNS))
    names = [f"rewards/accuracies{kind}" for kind in ("", "/repeated", "/hinted")]
    assert [summary(values, pairs, packs)[name] for name in names] == [None, None, None]
    values[:, 1] = torch.tensor([0.5, 0.0, -0.5, 0.0, 0.5, 0.0])
    found = summary(values, pairs, packs)
    assert [found[name] for name in names] == [2 / 6, 2 / 3, None]
    assert found["rewards/margins"] == pytest.approx(0.5 / 6) and found["logps/chosen"] == 0


@pytest.mark.parametrize("share", ["prompt", "pair", "none"])
def test_flops_are_those_that_the_model_does(share, ready, tied_model):
    """Matmuls as torch counts them, and the keys that each query sees, one by one; so a shared prompt counts once."""
    pairs, _ = load(ready, tied_model)
    packs = plan_packs(pairs, range(12), max_tokens=2000, share=share)
    config, keys_seen = read_config(tied_model), 0
    with distributed("cpu") as world:
        model = build_sharded_model(tied_model, world, "float32")
        with FlopCounterMode(display=False) as counted:
            compute_logps(model, pairs, packs, world)
    for group in (group for pack in packs for group in pack):
        prompt, judgments = pairs.prompt_tokens[group.prompt], [j for i in group.pairs for j in pairs.judgments[i]]
        keys_seen += sum(range(1, prompt + 1)) * (len(judgments) if group.split else 1)
        keys_seen += sum(prompt + place for judgment in judgments for place in range(1, len(judgment)))
    matmuls = sum(flops for op, flops in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys_seen
    assert sum(step_flops(pairs, packs, config)) == matmuls + attention


def test_ranks_idle_for_as_long_as_the_fullest_pack_of_a_turn_takes(ready, tied_model):
    pairs, _ = load(ready, tied_model)
    pack = [Group(prompt=0, pairs=[0])]
    for packs, ranks, idle in ((3, 1, 0), (4, 2, 0), (1, 2, 0.5), (3, 4, 0.25)):
        assert idle_share(pairs, [pack] * packs, ranks) == idle, (packs, ranks)
    assert idle_share(pairs, [pack * 3, pack], 2) == pytest.approx(1 / 3)


# ---- Sinks ----


def test_tensorboard_has_the_names_and_numbers_of_the_rows_and_the_options(ready, tied_model):
    """One name in both: a mapping would be one more thing that drifts."""
    dpo.main(dpo_options(ready, tied_model, max_steps=3, eval_steps=2))
    events = EventAccumulator(str(ready / "tensorboard")).Reload()
    found = {(e.step, name): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    expected = {
        (row["step"], name): value
        for row in read_jsonl(ready / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float))
    }
    assert found == pytest.approx(expected, rel=1e-6)
    (settings,) = events.Tensors("options/text_summary")
    assert "| learning_rate | 0.001 |" in settings.tensor_proto.string_val[0].decode()


@pytest.fixture
def hosted(monkeypatch) -> dict[str, SimpleNamespace]:
    """wandb and trackio as they are called."""
    calls = {}
    for name in ("wandb", "trackio"):
        fake, seen = ModuleType(name), SimpleNamespace(inits=[], rows=[], finished=0)
        fake.__spec__ = ModuleSpec(name, None, origin="a test")
        fake.init = lambda seen=seen, **settings: seen.inits.append(settings)
        fake.log = lambda numbers, step, seen=seen: seen.rows.append((step, numbers))
        fake.finish = lambda seen=seen: setattr(seen, "finished", seen.finished + 1)
        monkeypatch.setitem(sys.modules, name, fake)
        calls[name] = seen
    return calls


def test_wandb_and_trackio_get_the_rows_and_a_resumed_run_goes_on_in_the_same_one(hosted, ready, tied_model):
    settings = dpo_options(ready, tied_model, max_steps=4, save_every=2, report_to=("wandb", "trackio"))
    dpo.main(settings)
    go_back(ready, 2)
    dpo.main(settings)
    rows = read_jsonl(ready / "metrics.jsonl")
    for name, seen in hosted.items():
        assert [step for step, _ in seen.rows] == [1, 2, 3, 4, 3, 4] and seen.finished == 2
        assert seen.inits[0] == seen.inits[1] and seen.inits[0]["resume"] == "allow"
        assert seen.inits[0]["config"]["learning_rate"] == 1e-3 and ("id" in seen.inits[0]) == (name == "wandb")
        for step, numbers in seen.rows[-2:]:
            row = {k: v for k, v in rows[step - 1].items() if k not in ("step", "time", "order")}
            assert numbers == row
    go_back(other := shutil.copytree(ready, ready.with_name("other")), 0)
    dpo.main(dpo_options(other, tied_model, max_steps=1, report_to=("wandb",)))
    assert hosted["wandb"].inits[2]["id"] != hosted["wandb"].inits[0]["id"]  # negative control: another run
    assert not (ready / "tensorboard").exists()


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["missing", "a folder of logs"])
def test_a_sink_that_is_not_installed_is_refused_before_anything_is_read(spec, tmp_path, monkeypatch):
    """wandb leaves a folder `wandb` where it ran, which Python would import."""
    monkeypatch.setattr(options, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match="--report-to wandb: not installed; pip install wandb"):
        dpo_options(tmp_path, tmp_path, report_to=("wandb",))


# ---- Lines ----

LOOP = "from conj.data.progress import progress\nfor _ in progress(range(10_000), desc='loop'): pass"


def test_off_a_terminal_progress_is_a_few_plain_lines(ready, tied_model):
    """A cluster's log of a night held one line of megabytes, which no pager and no grep can take."""
    done = command("conj.train.dpo", *ARGUMENTS, "--max-steps", "8", "--model", tied_model, "--run-dir", ready)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpo:")]
    assert done.returncode == 0 and "\r" not in done.stderr and 2 <= len(lines) <= 4
    assert "8/8" in lines[-1] and f"loss={read_jsonl(ready / 'metrics.jsonl')[-1]['loss']:.3f}" in lines[-1]


def test_on_a_terminal_progress_is_tqdms_bar():
    """Negative control of the test above: the same loop, on a terminal and piped."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    subprocess.run([sys.executable, "-c", LOOP], stderr=end, env=ENV, check=True)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "\r" in shown and "█" in shown
    piped = subprocess.run([sys.executable, "-c", LOOP], stderr=subprocess.PIPE, text=True, env=ENV, check=True).stderr
    assert "\r" not in piped and [line.split()[2] for line in piped.splitlines()] == ["0/10000", "10000/10000"]
