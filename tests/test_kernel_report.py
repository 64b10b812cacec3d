"""`scripts/kernel_report.py`: the kernels compile for GPUs that this machine need not have."""

import json

import pytest
from conftest import kernel_names, run_script

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("report") / "rows.json"
    run_script("kernel_report.py", "--json", path)
    return json.loads(path.read_text())


def test_every_kernel_compiles_for_three_architectures_without_spills(report):
    """A kernel that is left out of the report, that Triton refuses, or that overflows its registers at real sizes."""
    names = kernel_names()
    assert len(names) == 8
    for architecture in ("sm_80", "sm_90a", "sm_100a"):
        rows = [row for row in report if row["architecture"] == architecture]
        assert names <= {row["kernel"] for row in rows}
        ours = [row for row in rows if row["kernel"] in names]  # the rival in benchmarks/ is listed, not held to it
        assert not [row for row in ours if row["spill_stores"] or row["spill_loads"]]


def test_shared_memory_fits_the_smallest_of_the_architectures(report):
    """163 KiB a block on A100, 227 KiB on H100, H200 and B200: more compiles, and fails at its first launch."""
    limits = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
    assert not [row for row in report if row["shared_bytes"] > limits[row["architecture"]]]
