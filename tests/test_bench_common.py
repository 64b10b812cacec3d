"""`scripts/bench_common.py`: no figure of a machine that others were using."""

import pytest
from bench_common import require_quiet


@pytest.mark.parametrize(("ceilings", "own"), [([100e9, 91e9, 95e9], 0.0), ([100e9], 0.0), ([91e9, 95e9], 100e9)])
def test_a_quiet_machine_passes_and_its_ceiling_is_the_best_one(ceilings, own):
    assert require_quiet(ceilings, own) == 100e9


@pytest.mark.parametrize(("ceilings", "own"), [
    ([100e9, 89e9, 100e9], 0.0),  # between two runs
    ([89e9, 100e9], 0.0),  # before the first
    ([50e9, 50e9], 100e9),  # all the time: only the machine's own tells
])  # fmt: skip
def test_a_busy_machine_gives_no_figure(ceilings, own):
    with pytest.raises(SystemExit) as refused:
        require_quiet(ceilings, own)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("error: the machine was busy") and "90 GFLOP/s" in line
