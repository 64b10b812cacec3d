"""`conj.train.dpo` with a fault on one rank, for tests:

    torchrun … tests/faulty_train.py FAULT PHASE RANK MARK options of conj.train.dpo

FAULT: exception, kill, disk. PHASE: load, step, save, export. It strikes once: not if the file MARK exists, which then
holds the time at which it struck."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

from conj.data.options import run_command
from conj.train import checkpoint, dpo
from conj.train.sharding import ending_process

# What runs in each phase, and at which call the fault strikes: the first save is over when the second one fails.
PHASES = {
    "load": (dpo, "make_plan", 1), "step": (dpo, "gradient_norm", 4), "save": (checkpoint, "save_file", 2),
    "export": (dpo, "export_model", 1),
}  # fmt: skip


def strike(fault: str, mark: Path) -> None:
    mark.write_text(str(time.time()))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints/full")
    raise RuntimeError("boom")


def set_up(fault: str, phase: str, rank: str, mark: Path) -> None:
    module, name, when = PHASES[phase]
    function, calls = getattr(module, name), []

    def faulty(*arguments, **options):
        calls.append(1)
        if len(calls) == when and os.environ["RANK"] == rank and not mark.exists():
            strike(fault, mark)
        return function(*arguments, **options)

    setattr(module, name, faulty)


if __name__ == "__main__":
    set_up(*sys.argv[1:4], Path(sys.argv[4]))
    with ending_process():
        run_command(dpo.main, dpo.DPOOptions, "", sys.argv[5:])
