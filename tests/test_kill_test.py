"""The kill test itself: a kill leaves no process behind, a difference between two runs is found and named."""

import shutil
import sys
import time

import pytest
from conftest import random_pairs
from kill_common import Aim, descendants, differences, is_alive, listing, run_command
from kill_test import training_phase

from conj.data.files import write_jsonl
from conj.train.log import TIMES


def test_a_kill_reaches_processes_in_sessions_of_their_own(tmp_path):
    """torchrun's workers are such; one that lives on writes into the folder of the resumed run."""
    pids = tmp_path / "pids"
    line = ["bash", "-c", f"(setsid bash -c 'echo $$ >> {pids}; sleep 100; true') & echo $$ >> {pids}; sleep 100; true"]
    ready = Aim(ready=lambda _: pids.exists() and pids.read_text().count("\n") == 2, delay=0.05)
    assert run_command(line, tmp_path / "log", ready)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2 and not any(is_alive(pid) or descendants(pid) for pid in started)


def test_a_command_that_ends_first_is_not_killed_and_one_that_fails_is_no_kill(tmp_path):
    never = Aim(ready=lambda seconds: seconds > 60)
    assert not run_command([sys.executable, "-c", "pass"], tmp_path / "log", never)
    with pytest.raises(SystemExit, match="exit code 3, not by a kill"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", never)


def test_every_difference_between_two_runs_is_named(tmp_path):
    """Times aside. A comparison that overlooks one makes every kill a success."""
    one = tmp_path / "one"
    write_jsonl(one / "pairs.jsonl", random_pairs(2))
    write_jsonl(one / "metrics.jsonl", [{"step": 1, "loss": 0.5} | dict.fromkeys(TIMES, 1.0)])
    two = shutil.copytree(one, tmp_path / "two")
    write_jsonl(two / "metrics.jsonl", [{"step": 1, "loss": 0.5} | dict.fromkeys(TIMES, 2.0)])
    assert differences(two, one) == []
    write_jsonl(two / "metrics.jsonl", [{"step": 1, "loss": 0.25} | dict.fromkeys(TIMES, 1.0)])
    with open(two / "pairs.jsonl", "a") as file:
        file.write("\n")
    (two / "left.part").touch()
    found = "; ".join(differences(two, one))
    for part in "metrics.jsonl differs", "pairs.jsonl differs", "only in one of the two: left.part":
        assert part in found


@pytest.mark.parametrize(("phase", "files"), [
    ("loading", []),
    ("step", ["metrics.jsonl"]),
    ("shards", ["metrics.jsonl", "checkpoints/step-00000006.part/rank-00000.safetensors"]),
    ("manifest and rename", ["metrics.jsonl", "checkpoints/step-00000006.part/manifest.json.part"]),
    ("deletion", ["metrics.jsonl", "checkpoints/step-00000006/manifest.json"]),
    ("export", ["metrics.jsonl", "model.part/config.json"]),
])  # fmt: skip
def test_where_a_kill_landed_is_read_off_what_it_left(phase, files, tmp_path):
    """What an earlier kill left, here a torn checkpoint, says nothing about this one."""
    for name in ("step-00000002", "step-00000004", "step-00000006.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    if phase == "deletion":
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000006.part")
    if phase == "shards":  # a save begins by taking the torn one away
        before = listing(tmp_path)
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000006.part")
    else:
        before = listing(tmp_path)
    time.sleep(0.02)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert training_phase(before, tmp_path) == phase
