"""Texts and model folders made to break conj: every one must end in a verdict or none, a model or one line of refusal.

    python scripts/fuzz.py verdicts --runs 1000000          # judgments for the parsers of conj.data.verdicts
    python scripts/fuzz.py model-folder --runs 200000       # damaged folders for the readers of training and sampling
    python scripts/fuzz.py verdicts --runs 100000 --coverage  # inputs chosen by the code they reach (needs atheris)

Each input grows from a few bytes: as many decisions of a grammar. The grammar knows, by construction, which verdict a
text states, and which folders must be refused. Findings: an exception that is no InputError, a message of more than a
line, an input that takes over a second of a core, memory that grows by over 500 MB, a verdict that the text does not
state, a lie that is believed. Exit code 1, and the input's number: `--only NUMBER` runs it alone.
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_common import Finding

MAX_SECONDS, MAX_GROWTH_MB = 1.0, 500.0
RUNS_PER_PROCESS = 20_000


@dataclass
class Tally:
    counts: Counter = field(default_factory=Counter)  # accepted, refused, exceptions, invented, slow, other
    slowest: tuple[float, int] = (0.0, -1)  # seconds of a core, number of the input
    growth_mb: float = 0.0  # of the peak, the largest of all processes
    findings: list[str] = field(default_factory=list)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_one(target: Callable, data: bytes, number: int, tally: Tally, more: str = "") -> None:
    began = time.process_time()

    def find(kind: str, what: str) -> None:
        tally.counts[kind] += 1
        tally.findings.append(f"{number}: {what}{more}")

    try:
        tally.counts[target(data)] += 1
    except Finding as e:
        find("invented" if str(e).startswith(("invented:", "believed:")) else "other", str(e))
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of Rust code is no Exception
        find("exceptions", f"{type(e).__name__}: {str(e)[:500]!r}")
    seconds = time.process_time() - began
    tally.slowest = max(tally.slowest, (seconds, number))
    if seconds > MAX_SECONDS:
        find("slow", f"took {seconds:.2f} s")


def input_bytes(seed: int, number: int) -> bytes:
    rng = random.Random(seed * 1_000_000_007 + number)
    return rng.randbytes(rng.choice((16, 64, 200)))


def report(tally: Tally, began: float, out: Path | None) -> int:
    """Prints the table and the findings. Returns the exit code."""
    if tally.growth_mb > MAX_GROWTH_MB:
        tally.findings.append(f"memory grew by {tally.growth_mb:.0f} MB")
    kinds = ("accepted", "refused", "exceptions", "invented", "other")
    row = {"runs": sum(tally.counts[kind] for kind in kinds)} | {kind: tally.counts[kind] for kind in kinds} | {
        "over_1_s": tally.counts["slow"], "slowest_ms": round(tally.slowest[0] * 1000, 1), "slowest_input": tally.slowest[1],
        "growth_mb": round(tally.growth_mb), "wall_s": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(" | ".join(row), " | ".join(map(str, row.values())), sep="\n", flush=True)
    for finding in tally.findings[:20]:
        print("FINDING", finding.encode("utf-8", "backslashreplace").decode(), flush=True)
    if out is not None:
        out.write_text(json.dumps(row | {"findings": len(tally.findings)}) + "\n")
    return 1 if tally.findings else 0


def prepare(kind: str, root: Path) -> Callable[[bytes], str]:
    """The target, with everything imported and used once, so that growth of memory is the inputs' own."""
    if kind == "verdicts":
        from fuzz_verdicts import fuzz_verdict

        return fuzz_verdict
    from fuzz_folders import Folders, empty_tensors, fuzz_model_folder

    from conj.model.weights import load_model

    folders = Folders.write(root)
    load_model(root / "single")  # imports what torch imports late
    for count in (60_000, 500_000):
        empty_tensors(count)
    return functools.partial(fuzz_model_folder, folders=folders)


def main() -> int:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=form)
    parser.add_argument("target", choices=("verdicts", "model-folder"), help="what reads the inputs")
    parser.add_argument("--runs", type=int, default=10_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--only", type=int, default=None, help="number of the only input to run")
    parser.add_argument("--coverage", action="store_true", help="let atheris choose inputs by the code they reach")
    parser.add_argument("--json", type=Path, default=None, help="file for the table's row")
    args = parser.parse_args()
    began = time.monotonic()
    if args.coverage:
        return run_coverage(args, began)
    numbers = range(args.runs) if args.only is None else range(args.only, args.only + 1)
    # A process that reads folders for ever grows: native code keeps some kB of every tokenizer. A stage reads one.
    chunks = [numbers[i : i + RUNS_PER_PROCESS] for i in range(0, len(numbers), RUNS_PER_PROCESS)]
    total, spawn = Tally(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for tally in pool.map(functools.partial(run_chunk, args.target, args.seed), chunks):
            total.counts += tally.counts
            total.slowest = max(total.slowest, tally.slowest)
            total.growth_mb = max(total.growth_mb, tally.growth_mb)
            total.findings += tally.findings
            print(dict(total.counts), file=sys.stderr, flush=True)
    return report(total, began, args.json)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as root:
        yield Path(root)


def run_chunk(kind: str, seed: int, numbers: range) -> Tally:
    tally = Tally()
    with scratch_folder() as root:
        target = prepare(kind, root)
        run_one(target, b"", -1, Tally())
        base_mb = peak_mb()
        for number in numbers:
            if number % 1000 == 0:
                faulthandler.dump_traceback_later(300, exit=True)  # a hang in Rust code heeds no signal of Python's
            run_one(target, input_bytes(seed, number), number, tally)
        faulthandler.cancel_dump_traceback_later()
        tally.growth_mb = peak_mb() - base_mb
    return tally


def run_coverage(args, began: float) -> int:
    import atheris

    read = ["conj.data"] if args.target == "verdicts" else ["conj.data", "conj.model", "conj.sample"]
    tally = Tally()
    with scratch_folder() as root:
        with atheris.instrument_imports(include=read):
            target = prepare(args.target, root)
            target(b"")
        base_mb = peak_mb()

        def one(data: bytes) -> None:
            number = sum(tally.counts.values()) - tally.counts["slow"]
            run_one(target, data, number, tally, f" (bytes {data.hex()})")
            if number + 1 == args.runs:
                tally.growth_mb = peak_mb() - base_mb
                code = report(tally, began, args.json)
                shutil.rmtree(root, ignore_errors=True)
                os._exit(code)  # libFuzzer does not come back

        flags = [f"-seed={args.seed + 1}", "-max_len=400", "-rss_limit_mb=0", f"-runs={2 * args.runs}"]
        atheris.Setup([sys.argv[0], *flags], one)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
