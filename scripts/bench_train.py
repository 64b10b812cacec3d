"""Training speed of conj beside TRL's DPOTrainer: the same pairs.jsonl, model, dtype and pairs in each step.

    python scripts/bench_train.py --device cpu --peer trl --json out.json

Makes its own data (64 prompts of about 300 tokens, 4 pairs each, judgments of 40 to 120 tokens) and random models.
conj runs `conj.train.reference` and the steps of `conj.train.dpo`; TRL runs `trainer.train()`. Each run is a process of its
own, so that its peak memory is its own. In a round every side takes its turn, and ratios are taken within a round. The
first step of every run is warm-up. All start at the base model and take the same pairs, step by step (a prompt's pairs
share a step), with the same optimizer: their losses after each step must agree, or the work was not equal.

TRL runs as `DPOConfig()` gives it (`default`: batch of 8, reference model beside the policy, activation checkpointing)
and in its best configuration (`best`: reference logprobs precomputed, the fastest batch size with and without
activation checkpointing, found here first). Off a GPU it scores every position, on one those of judgments alone; a CPU's
figures should not be better than a GPU user's, so there each of the two runs as it is and with `judgment-only` logits.

A figure is given only by a quiet machine: matmuls are timed around every round, and a round beside which they were more
than a tenth slower than at the machine's best is taken again.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench_common import argument_parser, require_quiet, where_measured
from bench_sides import GEOMETRIES, make_model, run_conj, run_reference, run_trl, steps_of, write_pairs

from conj.model.config import read_config
from conj.train.flops import training_flops
from conj.train.speed import matmul_ceiling

SHARES = ("prompt", "pair", "none")
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # after a few steps; more means that the work was not equal


def isolated(function, *arguments) -> dict:
    """`function(*arguments)` in a fresh process; {"error": …} where it fails, killed for its memory for one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}".splitlines()[0][:200]}


def best_settings(folder: Path, model: Path, logits: str, args: argparse.Namespace) -> dict:
    """TRL's fastest settings with stored reference logprobs, each tried on one step after a warm-up."""
    found = {}
    args = argparse.Namespace(**vars(args) | {"steps": 2})
    for batch in (b for b in args.batch_sizes if args.pairs_per_step % b == 0):
        for checkpointing in (False, True):
            peer = {"precompute_ref_log_probs": True, "per_device_train_batch_size": batch,
                    "gradient_checkpointing": checkpointing}  # fmt: skip
            result = isolated(run_trl, folder, model, logits, peer, args)
            how = f"logits {logits}, batch {batch}, checkpointing {checkpointing}"
            print(f"  trl, {how}: {in_short(result)}", flush=True)
            if "error" not in result:
                found[pairs_per_second(result)] = peer
    return found[max(found)] if found else {"precompute_ref_log_probs": True, "per_device_train_batch_size": 1}


Side = tuple[str, str, str]  # ("conj", share, "") or ("trl", its settings' name, which logits it scores)


def race(folder: Path, model: Path, peers: dict[Side, dict], args: argparse.Namespace) -> tuple[dict, list[float]]:
    """{side: its result of each round}, and the matmul ceiling of each round: the lower of before and after."""
    sides: list[Side] = [("conj", share, "") for share in args.share] + list(peers)

    def ceiling() -> float:
        found = isolated(matmul_ceiling, args.device, args.dtype)
        return found if isinstance(found, float) else sys.exit(f"error: matmuls cannot be timed: {found['error']}")

    ceilings, results = [ceiling()], []
    for _ in range(args.rounds * (1 if args.any_load else 3)):  # rounds of a busy machine are taken again
        found = {}
        for side in sides:
            run, *how = (run_trl, side[2], peers[side]) if side in peers else (run_conj, side[1])
            found[side] = isolated(run, folder, model, *how, args)
            print(f"  {' '.join(side)}: {in_short(found[side])}", flush=True)
        ceilings.append(ceiling())
        results.append((min(ceilings[-2:]), found))
        quiet = [r for r in results if r[0] >= 0.9 * max(ceilings) or args.any_load]
        print(f"  matmuls before and after: {ceilings[-2] / 1e9:.0f} and {ceilings[-1] / 1e9:.0f} GFLOP/s", flush=True)
        if len(quiet) == args.rounds:
            return {side: [found[side] for _, found in quiet] for side in sides}, [ceiling for ceiling, _ in quiet]
    require_quiet([ceiling for ceiling, _ in results], max(ceilings))
    raise AssertionError("unreachable: a round was not quiet")


def compare(folder: Path, geometry: str, args: argparse.Namespace) -> Iterator[dict]:
    """Rows of one model: each share of conj beside every setting of the peer."""
    model = folder / "model"
    reference = isolated(run_reference, folder / "run", model, args)
    if "error" in reference:
        yield {"geometry": geometry, "error": reference["error"]}
        return
    peers: dict[Side, dict] = {}
    for logits in (("as-is",) if args.device == "cuda" else args.logits) if args.peer == "trl" else ():
        for name in args.settings:
            peers["trl", name, logits] = best_settings(folder, model, logits, args) if name == "best" else {}
    results, ceilings = race(folder, model, peers, args)
    for share in args.share:
        ours = results["conj", share, ""]
        row = {
            "geometry": geometry, "vocab_size": GEOMETRIES[geometry]["V"], "share": share, "dtype": args.dtype,
            "pairs_per_step": args.pairs_per_step, "steps": args.steps, "rounds": args.rounds, "matmul_ceiling": min(ceilings),
            "any_load": args.any_load,
            "settings_conj": {name: getattr(args, name) for name in ("max_tokens_per_pack", "activation_checkpointing")},
        }  # fmt: skip
        if failed := next((r["error"] for r in ours if "error" in r), None):
            yield row | {"error": failed}
            continue
        pairs, _, plans = steps_of(folder / "run", model, share, args)
        how = {"recompute": args.activation_checkpointing, "device": args.device}
        flops = [training_flops(pairs, packs, read_config(model), **how) for packs in plans]  # executed, needed
        possible = [sum(r["step_seconds"][1:]) * ceiling for r, ceiling in zip(ours, ceilings)]
        executed, needed = (statistics.median(sum(of[1:]) / flop for flop in possible) for of in zip(*flops))
        row |= {
            "pairs_per_second_conj": statistics.median(map(pairs_per_second, ours)),
            "unique_tokens_per_second_conj": statistics.median(sum(r["tokens"][1:]) / sum(r["step_seconds"][1:]) for r in ours),
            "hardware_flops_utilisation_conj": executed, "model_flops_utilisation_conj": needed,
            "peak_memory_bytes_conj": max(r["peak_memory_bytes"] for r in ours),
            "reference_seconds_per_pair_conj": reference["seconds"] / (args.prompts * args.pairs_per_prompt),
            "loss_conj": ours[0]["losses"][-1], "losses_conj": ours[0]["losses"],
        }  # fmt: skip
        yield from (row | beside(ours, results[side], side, peers[side]) for side in peers)
        if not peers:
            yield row


def beside(ours: list[dict], theirs: list[dict], side: Side, settings: dict) -> dict:
    """What a row says of a peer: its figures, and ours divided by its, round by round."""
    start = {"peer": side[1], "logits": side[2], "peer_settings": settings}
    if failed := next((r["error"] for r in theirs if "error" in r), None):
        return start | {"peer_error": failed}
    ratios = [pairs_per_second(a) / pairs_per_second(b) for a, b in zip(ours, theirs)]
    peak, losses = max(r["peak_memory_bytes"] for r in theirs), theirs[0]["losses"]
    return start | {
        "pairs_per_second_peer": statistics.median(map(pairs_per_second, theirs)), "peak_memory_bytes_peer": peak,
        "ratio_pairs_per_second": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "ratio_peak_memory": max(r["peak_memory_bytes"] for r in ours) / peak, "loss_peer": losses[-1],
        "losses_peer": losses, "largest_loss_difference": max(abs(a - b) for a, b in zip(ours[0]["losses"], losses)),
    }  # fmt: skip


def pairs_per_second(result: dict) -> float:
    """After the first step, which is warm-up."""
    return result["pairs_per_step"] * (len(result["step_seconds"]) - 1) / sum(result["step_seconds"][1:])


def in_short(result: dict) -> str:
    if "error" in result:
        return result["error"]
    peak = result["peak_memory_bytes"] / 2**20
    return f"{pairs_per_second(result):.2f} pairs/s, {peak:.0f} MiB, loss {result['losses'][-1]:.5f}"


def print_table(rows: list[dict]) -> None:
    print("| model | dtype | share | TRL | its logits | its settings | conj pairs/s | TRL pairs/s | ratio | ", end="")
    print("peak memory | losses differ by |\n" + "|---" * 11 + "|")
    for row in rows:
        if "error" in row:
            print(f"| {row['geometry']} | | | | | | {row['error']} | | | | |")
            continue
        settings = ", ".join(f"{name} {value}" for name, value in row.get("peer_settings", {}).items())
        line = [row["geometry"], row["dtype"], row["share"], row.get("peer", "none"), row.get("logits", ""), settings]
        line.append(f"{row['pairs_per_second_conj']:.2f}")
        if "ratio_pairs_per_second" in row:
            ratio = f"{row['ratio_pairs_per_second']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
            line += [f"{row['pairs_per_second_peer']:.2f}", ratio, f"{row['ratio_peak_memory']:.2f}"]
            line.append(f"{row['largest_loss_difference']:.1e}")
        else:
            line += [row.get("peer_error", "–"), "", "", ""]
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argument_parser(__doc__)
    add, both = parser.add_argument, ("as-is", "judgment-only")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides")
    add("--peer", choices=("trl", "none"), default="trl", help="whom to time beside conj")
    add("--settings", nargs="+", choices=("default", "best"), default=["default", "best"], help="of TRL")
    add("--logits", nargs="+", choices=both, default=both,
        help="positions that TRL scores on a CPU: all, as it does, or those of judgments, as it does on a GPU")  # fmt: skip
    add("--batch-sizes", nargs="+", type=int, default=[1, 2], help="of TRL, to find its best among")
    add("--geometry", nargs="+", choices=GEOMETRIES, default=["20M"], help="models")
    add("--share", nargs="+", choices=SHARES, default=SHARES, help="of conj")
    add("--dtype", choices=LOSS_TOLERANCE, default="float32", help="of forward and backward, both sides")
    add("--prompts", type=int, default=64, help="prompts in pairs.jsonl")
    add("--pairs-per-prompt", type=int, default=4)
    add("--prompt-tokens", type=int, nargs=2, default=(270, 330), help="fewest and most")
    add("--judgment-tokens", type=int, nargs=2, default=(40, 120), help="fewest and most")
    add("--pairs-per-step", type=int, default=8, help="pairs an optimizer step takes, both sides")
    add("--max-tokens-per-pack", type=int, default=16384, help="of conj")
    add("--activation-checkpointing", choices=("none", "selective", "full"), default="none", help="of conj")
    add("--cpu-offload", action="store_true", help="of conj")
    add("--kernels", choices=("triton", "compile", "torch"), help="of conj; by default the device's")
    add("--steps", type=int, default=3, help="optimizer steps a run; the first is warm-up")
    add("--rounds", type=int, default=3, help="turns of each side")
    add("--any-load", action="store_true", help="for dry runs: also rows of a busy machine, which say that they are")
    add("--json", type=Path, help="file to write the rows to; rows of other models and dtypes stay")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: expected at least 2, the first is warm-up")
    rows, where = [], where_measured(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        for geometry in args.geometry:
            print(geometry, flush=True)
            folder = Path(scratch) / geometry
            dtype = "bfloat16" if geometry.startswith("qwen2") else "float32"
            made = isolated(make_model, folder / "model", dtype, geometry, args.device)
            if "error" in made:
                sys.exit(f"error: no model of {geometry}: {made['error']}")
            write_pairs(folder / "run", args)
            for row in compare(folder, geometry, args):
                rows.append(row | where)
                if args.json:
                    add_row(args.json, rows[-1])
    print_table(rows)
    unequal = [r for r in rows if r.get("largest_loss_difference", 0) > LOSS_TOLERANCE[args.dtype]]
    failed = any("error" in row for row in rows)
    if unequal or failed:
        sys.exit(f"error: {len(unequal)} comparisons with unequal losses; conj failed: {failed}")


def add_row(path: Path, row: dict) -> None:
    """Puts a row into a file of them, in place of the one of the same comparison."""
    what = ("geometry", "dtype", "share", "peer", "logits")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in rows if [r.get(k) for k in what] != [row.get(k) for k in what]]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
