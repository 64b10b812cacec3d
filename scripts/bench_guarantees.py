"""What the guarantees cost: seconds a checkpoint takes from the training, and the time of a step in audit mode.

    python scripts/bench_guarantees.py --json out.json
    torchrun --nproc_per_node 2 scripts/bench_guarantees.py --json out.json

A random Qwen2 of 20 M parameters on the pairs of bench_train.py. Everything is interleaved in one process: a block of
steps that starts a checkpoint beside a block that does not; a step in audit mode beside one that is not. A checkpoint is
written while the steps after it run, so its cost is what the whole block loses, the copy to host memory included.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_common import where_measured
from bench_train import make_model, write_pairs

from conj.data.packs import plan_packs, plan_steps
from conj.train import dpo
from conj.train.checkpoint import Saver
from conj.train.reference import load_pairs
from conj.train.sharding import World, distributed

SAVE_EVERY = dpo.DPOOptions.__dataclass_fields__["save_every"].default


def prepare(folder: Path, args: argparse.Namespace) -> None:
    make_model(folder / "model", "float32", "20M", "cpu")
    sizes = {"prompt_tokens": (250, 350), "judgment_tokens": (40, 120)}
    write_pairs(folder, SimpleNamespace(seed=0, prompts=args.steps * 2, pairs_per_prompt=4, **sizes))


def make_steps(folder: Path, options: dpo.DPOOptions) -> tuple:
    pairs, _, usable = load_pairs(folder, options.model, options.max_length)
    steps = plan_steps(pairs, usable, pairs_per_step=options.pairs_per_step, share=options.share, seed="0")
    packs = [plan_packs(pairs, s, max_tokens=options.max_tokens_per_pack, share=options.share) for s in steps]
    return pairs, packs


def time_saving(folder: Path, options: dpo.DPOOptions, args: argparse.Namespace, world: World) -> dict:
    """Blocks of four short steps, of 2 pairs each, with a checkpoint at the start of every second block."""
    pairs, steps = make_steps(folder, dpo.DPOOptions(**vars(options) | {"pairs_per_step": 2}))
    reference = torch.zeros(len(pairs), 2)
    model, optimizer = dpo.build_policy(options, world)
    saver = Saver(folder=folder / "checkpoints", world=world, identity="", keep=2)
    seconds = {True: [], False: []}
    for number in range(2 * args.rounds + 2):
        saves = number % 2 == 0
        started = time.perf_counter()
        if saves:
            saver.save(number, model, optimizer)
        for packs in steps[:4]:
            dpo.train_step(model, optimizer, pairs, reference, packs, 1e-6, options, world)
        saver.wait()
        seconds[saves].append(time.perf_counter() - started)
    differences = [a - b for a, b in zip(seconds[True][1:], seconds[False][1:])]  # the first of each warms up
    low, middle, high = statistics.quantiles(differences, n=4)
    return {"save_seconds": middle, "save_seconds_quartiles": [low, high], "block_seconds": seconds}


def time_audit_mode(folder: Path, options: dpo.DPOOptions, args: argparse.Namespace, world: World) -> dict:
    """A step in audit mode after each one that is not, the same pairs in both."""
    pairs, steps = make_steps(folder, options)
    reference = torch.zeros(len(pairs), 2)
    seconds = {}
    modes = [dpo.DPOOptions(**vars(options) | {"audit_mode": mode}) for mode in (False, True)]
    policies = [dpo.build_policy(mode, world) for mode in modes]
    for packs in steps[: args.steps + 1]:
        for mode, (model, optimizer) in zip(modes, policies):
            dpo.select_arithmetic(mode, world.device)
            metrics = dpo.train_step(model, optimizer, pairs, reference, packs, 1e-6, mode, world)
            seconds.setdefault(mode.audit_mode, []).append(metrics["step_seconds"])
    ratios = [audit / plain for audit, plain in zip(seconds[True][1:], seconds[False][1:])]
    medians = {"audit_seconds": statistics.median(seconds[True][1:]), "seconds": statistics.median(seconds[False][1:])}
    return medians | {"ratio": statistics.median(ratios), "packs_per_step": len(steps[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="steps in audit mode, and as many not (default 8)")
    parser.add_argument(
        "--rounds", type=int, default=12, help="blocks with a checkpoint, and as many without (default 12)"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "conj-bench-guarantees"
    with distributed() as world:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            prepare(folder, args)
        world.on_main(lambda: None)
        options = dpo.DPOOptions(
            run=folder, model=folder / "model", dtype="fp32", pairs_per_step=8, max_tokens_per_pack=1024
        )
        dpo.select_arithmetic(options, world.device)
        audit, saving = (measure(folder, options, args, world) for measure in (time_audit_mode, time_saving))
        saving |= {"save_every": SAVE_EVERY, "share_of_run": saving["save_seconds"] / (SAVE_EVERY * audit["seconds"])}
        row = {"ranks": world.size, "saving": saving, "audit_mode": audit, **where_measured(world.device.type)}
    if world.is_main:
        print(
            f"{world.size} ranks: a checkpoint costs {saving['save_seconds']:.2f} s (quartiles "
            f"{saving['save_seconds_quartiles'][0]:.2f} and {saving['save_seconds_quartiles'][1]:.2f}), "
            f"{saving['share_of_run']:.2%} of {SAVE_EVERY} steps of {audit['seconds']:.2f} s and 8 pairs; a step in audit "
            f"mode takes {audit['ratio']:.2f} times as long ({audit['packs_per_step']} packs a step)"
        )
        if args.json:
            rows = json.loads(args.json.read_text()) if args.json.exists() else []
            args.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
