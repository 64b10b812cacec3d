"""A whole run on this device: trained, trained again but killed in the middle and started anew, audited, compared.

    python scripts/train_killed.py --json killed.json
    python scripts/train_killed.py --device cpu --dtype float32 --prompts 60 --max-steps 6 --json killed.json

The shipped tiny judge on pairs of the demo's preferences, in audit mode. The second run must end in the bits of the first:
its audit takes 2 steps again, has `transformers` compute a sample, and compares the two runs. Stages are the functions
that the commands call, each in a fork of this process: what is imported is imported once, and nothing here touches a GPU
before the last one has ended. Exits 1 if a stage fails or something does not hold.
"""

import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import ROOT, argument_parser, where_measured
from kill_common import num_lines, write_pairs

from conj.data.files import read_jsonl, write_atomic
from conj.train import dpo, reference
from conj.train.audit import __main__ as audit

BASE = ROOT / "demo" / "base"


def run_stage(function: Callable, options, kill_when: Callable[[], bool] = lambda: False) -> float:
    """Seconds of a stage in a fork, to its end or its kill (SIGKILL). Leaves if it fails, or ends before the kill."""
    started, will_die = time.perf_counter(), False
    process = multiprocessing.get_context("fork").Process(target=function, args=(options,))
    process.start()
    while process.is_alive() and not (will_die := kill_when()):
        time.sleep(0.005)
    if will_die:
        process.kill()
    process.join()
    if process.exitcode != (-9 if will_die else 0):
        sys.exit(f"error: {function.__module__}: exit code {process.exitcode}")
    return time.perf_counter() - started


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="of every stage")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=396, help="prompts, with one pair each")
    parser.add_argument("--max-steps", type=int, default=24, help="optimizer steps; killed in the middle")
    parser.add_argument("--json", type=Path, required=True, help="file for seconds, checks and metrics")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        common = {"model": BASE, "device": args.device, "dtype": args.dtype, "max_tokens_per_pack": 4096}
        undisturbed.mkdir()
        write_pairs(undisturbed / "pairs.jsonl", args.prompts, random.Random(0))
        seconds = {"reference": run_stage(reference.main, reference.ReferenceOptions(run_dir=undisturbed, **common))}
        shutil.copytree(undisturbed, killed)
        how = {**common, "audit_mode": True, "max_steps": args.max_steps, "num_train_epochs": 2, "learning_rate": 5e-5}
        once, again = (dpo.DPOOptions(run_dir=run, **how, eval_steps=10, save_every=2) for run in (undisturbed, killed))
        seconds["training"] = run_stage(dpo.main, once)
        half, log = args.max_steps // 2, killed / "metrics.jsonl"
        seconds["until killed"] = run_stage(dpo.main, again, lambda: num_lines(log) >= half)
        print(f"killed after step {num_lines(log)} of {args.max_steps}", flush=True)
        seconds["started anew"] = run_stage(dpo.main, again)
        rows = read_jsonl(log)
        result = {"seconds": seconds, "metrics": [rows[0], rows[-1]]}
        checks = audit.AuditOptions(run_dir=killed, device=args.device, replay=2, reference=True, against=undisturbed)
        try:
            seconds["audit"] = run_stage(audit.main, checks)
        finally:  # also when it says BROKEN
            report = killed / "audit.json"
            result |= {"audit": json.loads(report.read_text()) if report.exists() else None}
            write_atomic(args.json, json.dumps(result | where_measured(args.device), indent=1).encode())
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
