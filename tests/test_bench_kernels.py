"""`scripts/bench_kernels.py`: it measures every operation, times nothing that is wrong, and its memory table is true."""

import dataclasses
import json
import sys

import bench_kernels as bench
import kernel_problems
import pytest
import torch
from conftest import run_script

from conj.model import logprob
from conj.model.logprob import linear_logprob_reference

OPERATIONS = ("linear_logprob", "selected_logprob", "add_rms_norm", "rope", "swiglu", "gather_rows")
FP32 = ("cpu", torch.float32)


def problem_with(function) -> object:
    """linear_logprob at a small size, with `function` among the candidates."""
    torch.manual_seed(0)
    problem = bench.linear_logprob({"D": 32, "V": 500}, 64, FP32, False)
    return dataclasses.replace(problem, candidates=[*problem.candidates, bench.Candidate("suspect", function)])


def test_dry_run_measures_ours_and_torch_in_each_operation_and_mode(tmp_path):
    """An operation or a mode that is left out, a time of nothing, or an error that passed the gate by being missing."""
    path = tmp_path / "rows.json"
    run_script("bench_kernels.py", "--device", "cpu", "--dtype", "float32", "--tiny", "--json", path)
    rows = {(row["op"], row["mode"], row["candidate"]): row for row in json.loads(path.read_text())}
    for op in OPERATIONS:
        for mode in ("forward", "backward", "both"):
            for candidate in ("conj", "torch eager"):
                row = rows[op, mode, candidate]
                assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
                assert any(name.startswith("grad_") for name in row["errors"])
                assert all(error < 1e-5 for error in row["errors"].values()), row
                assert row["bytes"] > 0 and row["commit"] and row["device"]
    ours, eager = (rows["linear_logprob", "both", name] for name in ("conj", "torch eager"))
    assert ours["flops_minimal"] == eager["flops_minimal"] == eager["flops_executed"] == 3 * 2 * 128 * 64 * 5000
    assert ours["flops_executed"] == 4 * 2 * 128 * 64 * 5000  # the logits are made twice


def test_gate_passes_the_reference_under_another_name():
    """A gate that stops everything would stop the wrong candidates below too."""
    assert bench.gate(problem_with(linear_logprob_reference))["suspect"]["error"] is None


@pytest.mark.parametrize(("wrong", "named"), [
    (lambda h, w, t: linear_logprob_reference(h, w, t) * 1.0001, "logprobs"),
    (lambda h, w, t: linear_logprob_reference(h, w.detach() + (w - w.detach()) * 1.0001, t), "grad_weight"),
    (lambda h, w, t: linear_logprob_reference(h, w, t) * float("nan"), "logprobs"),
    (lambda h, w, t: linear_logprob_reference(h, w, t).mean().expand(len(h)), "grad_hidden"),
    (lambda h, w, t: 1 / 0, "ZeroDivisionError"),
], ids=["output", "gradient", "nan", "one-upstream-for-all", "raises"])  # fmt: skip
def test_gate_catches_a_wrong_candidate(wrong, named):
    """A wrong kernel may be as fast as it likes. The last but one has the mean's gradients: right for no token."""
    verdicts = bench.gate(problem_with(wrong))
    assert named in verdicts["suspect"]["error"]
    assert verdicts["conj"]["error"] is None


def test_a_run_in_which_ours_is_wrong_exits_1_and_times_the_others(monkeypatch, capsys):
    """A wrong kernel of ours must stop whoever runs the benchmark, not only miss from a table."""
    monkeypatch.setattr(logprob, "linear_logprob", lambda *x: linear_logprob_reference(*x) * 1.0001)
    line = ["bench_kernels.py", "--device", "cpu", "--dtype", "float32", "--tiny", "--only", "linear_logprob"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match="conj fails in linear_logprob"):
        bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert all("gate: logprobs" in line for line in lines if "| conj |" in line)
    assert not any("gate:" in line for line in lines if "| torch eager |" in line)


def test_a_candidate_that_fails_while_it_is_timed_does_not_end_the_others():
    """Out of memory at a large shape is a row, not the end of the run."""

    def exhausted(*_):
        raise torch.OutOfMemoryError("none left")

    found = bench.measure(problem_with(exhausted), "both", {"conj", "suspect"}, "cpu", 0.01)
    assert "none left" in found["suspect"]["error"]
    assert set(found) == {"conj", "suspect"} and len(found["conj"]["times"]) >= 5


def test_memory_of_ours_does_not_grow_with_the_vocabulary():
    """The claim of `linear_logprob`, read from the kernel's high-water mark; eager shows that the reading can grow."""
    T, D, small, large = 512, 64, 32768, 131072
    rows = bench.memory_rows(T, D, "cpu", "float32", ["conj", "torch eager"], (small, large))
    peak = {(row["candidate"], row["V"]): row["peak_mib"] for row in rows}
    logits = (large - small) * T * 4 / 2**20  # 192 MiB more
    assert peak["torch eager", large] - peak["torch eager", small] > 0.9 * logits
    assert peak["conj", large] - peak["conj", small] < 0.1 * logits
    assert peak["conj", small] > 1  # a reading of nothing would pass the line above


def test_a_peer_whose_import_fails_is_named_and_the_others_run(monkeypatch, tmp_path):
    """A package that breaks with these versions of torch and triton must cost its own row, not those of all."""
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('made for another triton')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(kernel_problems, "LIGER", ("broken_peer", "function"))
    monkeypatch.setattr(kernel_problems, "CUT", ("no_such_package", "function"))
    lines = "\n".join(kernel_problems.skipped("cuda"))
    assert "broken_peer: RuntimeError: made for another triton" in lines and "no_such_package" in lines
    names = [candidate.name for candidate in kernel_problems.linear_logprob_candidates("cuda", False)]
    assert {"conj", "torch eager", "blockwise"} <= set(names) and "liger" not in names
    assert set(names) <= set(bench.CANDIDATES)
