"""`scripts/bench_train.py`: rows with the figures that are quoted, and equal work on both sides."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_conj_and_trl_do_equal_work_and_the_rows_say_so(tmp_path):
    """Other pairs, masks, order or optimizer on one side would part the losses after the first update."""
    pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[dev]')")
    out = tmp_path / "rows.json"
    line = [
        sys.executable,
        ROOT / "scripts" / "bench_train.py",
        "--geometry",
        "1M",
        "--settings",
        "default",
        "--json",
        out,
    ]
    line += ["--prompts", "4", "--pairs-per-prompt", "2", "--pairs-per-step", "4", "--steps", "2", "--share", "prompt"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert (row["share"], row["peer"], row["vocab_size"]) == ("prompt", "default", 1536)
    assert row["loss_conj"] == pytest.approx(row["loss_peer"], abs=1e-4) and abs(row["loss_conj"] - 0.6931) > 0.01
    assert row["ratio_pairs_per_second"] > 0 and 0 < row["ratio_peak_memory"] < 1
    assert 0 < row["model_flops_utilisation_conj"] < row["hardware_flops_utilisation_conj"] < 1.2
