"""`conj.train.dpo` with half a second in every step, so that a test can act within one."""

import time

from conj.data.options import run_command
from conj.train import dpo
from conj.train.sharding import ending_process


def slowly(function):
    def wrapped(*arguments, **options):
        time.sleep(0.5)
        return function(*arguments, **options)

    return wrapped


if __name__ == "__main__":
    dpo.gradient_norm = slowly(dpo.gradient_norm)
    with ending_process():
        run_command(dpo.main, dpo.DPOOptions, "")
