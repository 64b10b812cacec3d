"""What the guarantees cost: a step in audit mode beside one without, and the seconds a checkpoint takes from the training.

    python scripts/bench_guarantees.py --ranks 1 2 --json out.json

A random Qwen2 of 20 M parameters in fp32, on the pairs of bench_sides.py. Audit mode sets a process's threads and kernels
for good, so each run of `conj.train.dpo` is a process of its own, in turns; its first step is warm-up. Beside the run that
a user gets, with all cores, stands one with a single thread, which is what audit mode has.

A checkpoint is written while the steps after it run: its cost is what a block of four short steps loses that starts with
one, beside the block before, in one process a round. The step itself waits for the copy to host memory alone.

The matmul ceiling is measured before, between and after: no figure is given of a machine that others were using.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_common import ROOT, argument_parser, require_quiet, where_measured, write_rows
from bench_sides import GEOMETRIES, make_model, write_pairs

from conj.data.files import read_jsonl
from conj.data.packs import plan_packs, plan_steps
from conj.train import dpo
from conj.train.checkpoint import Saver
from conj.train.reference import load_pairs
from conj.train.sharding import distributed
from conj.train.speed import matmul_ceiling

SAVE_EVERY = dpo.DPOOptions.__dataclass_fields__["save_every"].default
DEVICE = "cpu"  # of all that runs here, also where a GPU is visible
COMMON = ("--device", DEVICE, "--dtype", "float32", "--max-tokens-per-pack", 1024)
SHORT_STEPS = 4  # of a block, 2 pairs each


def launch(ranks: int, threads: int, *line) -> None:
    """`python LINE`, or as many ranks of it; ends the benchmark with what went wrong."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ()
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: exit code {done.returncode}\n{done.stderr}")


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The model, and a run folder with pairs and their reference logprobs."""
    make_model(folder / "model", "float32", args.geometry, DEVICE)
    sizes = {"prompt_tokens": (250, 350), "judgment_tokens": (40, 120), "pairs_per_prompt": 4}
    write_pairs(folder / "run", SimpleNamespace(prompts=(args.steps + 2) * 2 + SHORT_STEPS, **sizes))
    launch(1, 1, "-m", "conj.train.reference", "--run-dir", folder / "run", "--model", folder / "model", *COMMON)


def time_steps(folder: Path, ranks: int, threads: int, steps: int, *more) -> float:
    """Seconds of `steps` steps of 8 pairs, after the first."""
    run = folder / "copy"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "run", run)
    line = ("--run-dir", run, "--model", folder / "model", *COMMON, "--pairs-per-step", 8, "--max-steps", steps + 1)
    launch(ranks, threads, "-m", "conj.train.dpo", *line, *more)
    rows = read_jsonl(run / "metrics.jsonl")
    assert len(rows) == steps + 1
    return sum(row["step_seconds"] for row in rows[1:])


def time_saving(folder: Path, blocks: int) -> None:
    """Writes to `saving.json` what a checkpoint adds to its block, and how long the step waits for it: medians."""
    with distributed(DEVICE) as world:
        common = {"run_dir": folder / "run", "model": folder / "model", "dtype": "float32"}
        options = dpo.DPOOptions(**common, pairs_per_step=2, max_tokens_per_pack=1024)
        dpo.select_arithmetic(options, world.device)
        pairs, _, usable = load_pairs(options.find("pairs.jsonl"), options.model, options.max_length)
        steps = plan_steps(pairs, usable, pairs_per_step=options.pairs_per_step, share=options.share, seed="0")
        steps = [plan_packs(pairs, s, max_tokens=1024, share=options.share) for s in steps[:SHORT_STEPS]]
        reference = torch.zeros(len(pairs), 2)
        model, optimizer = dpo.build_policy(options, world)
        saver = Saver(folder=folder / "checkpoints", world=world, identity="", keep=2)
        seconds, waits = {True: [], False: []}, []
        batches = dpo.batches_of(pairs, reference, steps * (2 * blocks + 2), world)
        for number in range(2 * blocks + 2):
            saves = number % 2 == 0
            started = time.perf_counter()
            if saves:
                saver.save(number, model, optimizer)
                waits.append(time.perf_counter() - started)
            for packs in steps:
                dpo.train_step(model, optimizer, pairs, packs, batches, 1e-6, options, world)
            saver.wait()
            seconds[saves].append(time.perf_counter() - started)
    differences = [a - b for a, b in zip(seconds[True][1:], seconds[False][1:])]  # the first of each warms up
    medians = {"added": statistics.median(differences), "waited": statistics.median(waits[1:])}
    if world.is_main:
        (folder / "saving.json").write_text(json.dumps(medians))


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(folder: Path, ranks: int, args: argparse.Namespace) -> dict:
    """The row of figures for this many ranks, with the ceilings measured before, between and after the runs."""
    threads = max(1, os.cpu_count() // ranks)
    sides = {"plain": (threads,), "plain_one_thread": (1,), "audit_mode": (threads, "--audit-mode")}
    seconds, saving, ceilings = {side: [] for side in sides}, [], [matmul_ceiling(DEVICE, "float32")]
    for _ in range(args.rounds):
        for side, (threads_of_side, *more) in sides.items():
            seconds[side].append(time_steps(folder, ranks, threads_of_side, args.steps, *more))
            ceilings.append(matmul_ceiling(DEVICE, "float32"))
        launch(ranks, threads, __file__, "--saving", folder, "--blocks", args.blocks)
        saving.append(json.loads((folder / "saving.json").read_text()))
        ceilings.append(matmul_ceiling(DEVICE, "float32"))
    step_seconds = {side: spread([s / args.steps for s in seconds[side]]) for side in sides}
    checkpoint_seconds = spread([medians["added"] for medians in saving])
    return {
        "ranks": ranks, "threads_per_rank": threads, "rounds": args.rounds, "steps": args.steps, "blocks": args.blocks,
        "geometry": args.geometry, "step_seconds": step_seconds,
        "audit_ratio": spread([a / b for a, b in zip(seconds["audit_mode"], seconds["plain"])]),
        "audit_ratio_one_thread": spread([a / b for a, b in zip(seconds["audit_mode"], seconds["plain_one_thread"])]),
        "checkpoint_seconds": checkpoint_seconds,
        "checkpoint_wait_seconds": spread([medians["waited"] for medians in saving]),
        "checkpoint_share_of_run": checkpoint_seconds["median"] / (SAVE_EVERY * step_seconds["plain"]["median"]),
        "matmul_ceilings_flops_per_second": ceilings,
    }  # fmt: skip


def in_short(row: dict) -> str:
    def of(values: dict, digits: int = 2) -> str:
        return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"

    return (
        f"{row['ranks']} ranks of {row['threads_per_rank']} threads, {row['rounds']} rounds, median (least to most): a step in "
        f"audit mode takes {of(row['audit_ratio'])} times as long, {of(row['audit_ratio_one_thread'])} times where both have "
        f"one thread; a checkpoint costs {of(row['checkpoint_seconds'])} s, of which the step waits "
        f"{of(row['checkpoint_wait_seconds'], 3)} s, {row['checkpoint_share_of_run']:.2%} of {SAVE_EVERY} steps of "
        f"{of(row['step_seconds']['plain'])} s"
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes that share the cores")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=8, help="steps timed in a run, of 8 pairs")
    parser.add_argument("--blocks", type=int, default=8, help="of a round with a checkpoint, and as many without")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="20M", help="the model")
    parser.add_argument("--ceiling", type=float, default=0.0, help="GFLOP/s of fp32 matmuls on this machine when idle")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--saving", type=Path, help="only time checkpoints, in this folder: a rank of the above")
    args = parser.parse_args()
    if args.saving:
        time_saving(args.saving, args.blocks)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args)
        rows = [compare(folder, ranks, args) | where_measured(DEVICE) for ranks in args.ranks]
    require_quiet([c for row in rows for c in row["matmul_ceilings_flops_per_second"]], args.ceiling * 1e9)
    print(*map(in_short, rows), sep="\n")
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
