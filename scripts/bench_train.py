"""Training speed of conj beside TRL's DPOTrainer: the same pairs.jsonl, model, dtype and pairs in each step.

    python scripts/bench_train.py --device cpu --peer trl --json out.json

Makes its own data (64 prompts of about 300 tokens, 4 pairs each, judgments of 40 to 120 tokens) and random models.
conj runs `conj.train.reference` and the steps of `conj.train.dpo`; TRL runs `trainer.train()`. Each run is a
process of its own, so that its peak memory is its own, and the two sides take turns, so that a slow minute of the
machine hits both. The first step of every run is warm-up. Both start at the base model and take the same pairs, step
by step, with the same optimizer: their losses after each step must agree, or the work was not equal.

TRL runs as `DPOConfig()` gives it (`default`: batch of 8, reference model beside the policy, activation checkpointing)
and in its best configuration (`best`: reference logprobs precomputed, the fastest batch size with and without
activation checkpointing, found here first). On two CPU cores all of this takes about 40 minutes, nearly all of it TRL's.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench_common import QWEN2, ROOT, matmul_ceiling, resident_bytes, where_measured
from make_random_model import write_random_model

SETTINGS = {"beta": 0.1, "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0}
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # after a few steps; more means that the work was not equal
GEOMETRIES = {
    "1M": dict(hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2, vocab_size=1_536, tie=True),
    "20M": dict(hidden_size=384, intermediate_size=1024, layers=5, heads=6, kv_heads=2, vocab_size=32_000, tie=True),
    "large-vocabulary": dict(
        hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2, vocab_size=151_936, tie=True
    ),
} | {
    f"qwen2-{name.lower()}": dict(
        hidden_size=size["D"], intermediate_size=size["F"], layers=size["L"], heads=size["N"], kv_heads=size["K"],
        vocab_size=size["V"], tie=size["tie"],
    )
    for name, size in QWEN2.items()
}  # fmt: skip


def make_model(folder: Path, dtype: str, geometry: str, device: str) -> dict:
    """In a process of its own: random numbers for 7 B parameters are drawn on the GPU, which gives their memory back."""
    write_random_model(folder, ROOT / "demo" / "base", dtype=dtype, device=device, **GEOMETRIES[geometry])
    return {}


def write_pairs(run: Path, args: argparse.Namespace) -> None:
    """pairs.jsonl of random words; lengths in tokens are drawn evenly from the two ranges, end token counted."""
    from conj.data.files import write_jsonl
    from conj.data.prompts import JudgeTokenizer, judge_messages, judgment_text

    rng = random.Random(0)
    tokenizer = JudgeTokenizer.load(ROOT / "demo" / "base")
    words = ["red", "blue", "seven", "town", "river", "天空", "蓝色", "回答", "更好", "特产", "准确"]

    def grown(render, ids_of, fewest: int, most: int):
        """`render(words)` with as many words as its target length in tokens asks for."""
        target, chosen = rng.randint(fewest, most), []
        while len(ids_of(render(chosen))) < target:
            chosen.append(rng.choice(words))
        return render(chosen)

    rows = []
    for i in range(args.prompts):
        prompt = grown(lambda w: judge_messages(" ".join(w[::3]), " ".join(w[1::3]), " ".join(w[2::3])),
                       tokenizer.prompt_ids, *args.prompt_tokens)  # fmt: skip
        for _ in range(args.pairs_per_prompt):
            chosen, rejected = (
                grown(lambda w, v=v: judgment_text(" ".join(w), v), tokenizer.completion_ids, *args.judgment_tokens)
                for v in (1, 2)
            )
            rows.append(
                {"id": f"prompt-{i}", "prompt": prompt, "chosen": [{"role": "assistant", "content": chosen}]}
                | {"rejected": [{"role": "assistant", "content": rejected}], "label": 1, "pair_type": "repeated"}
            )
    write_jsonl(run / "pairs.jsonl", rows)


def peak_memory_bytes(device: str) -> int:
    """Of this process: allocated on the GPU, or resident on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def run_conj(folder: Path, model: Path, share: str, args: argparse.Namespace) -> dict:
    """`train_step` of `conj.train.dpo` on the first steps of its plan, without checkpoints and logs."""
    from safetensors.torch import load_file

    from conj.model import backends
    from conj.train import dpo
    from conj.train.sharding import build_sharded_model, distributed

    options = dpo.DPOOptions(
        run=folder / "run", model=model, share=share, dtype=args.dtype, pairs_per_step=args.pairs_per_step,
        warmup_ratio=0.0, max_tokens_per_pack=args.max_tokens_per_pack, kernels=args.kernels,
        activation_checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload, **SETTINGS,
    )  # fmt: skip
    pairs, _, plans = steps_of(options.run, model, share, args)
    with distributed() as world:
        backends.select(world.device, kernels=args.kernels)
        logps = load_file(options.run / "reference.safetensors")["logps"]
        sharded = build_sharded_model(
            model, world, args.dtype, recompute=args.activation_checkpointing, cpu_offload=args.cpu_offload
        )
        optimizer = dpo.build_optimizer(sharded, options)
        rates = [dpo.learning_rate_at(step, args.steps, options) for step in range(args.steps)]
        rows = [
            dpo.train_step(sharded, optimizer, pairs, logps, packs, lr, options, world)
            for packs, lr in zip(plans, rates)
        ]
    return {
        "pairs_per_step": args.pairs_per_step,
        "losses": [row["loss"] for row in rows],
        "step_seconds": [row["step_seconds"] for row in rows],
        "tokens": [row["num_tokens"] for row in rows],
        "peak_memory_bytes": peak_memory_bytes(args.device),
    }


def run_reference(folder: Path, model: Path, args: argparse.Namespace) -> dict:
    """Stage 5, once a model; what it costs is reported beside the steps that it saves."""
    from conj.train import reference

    started = time.perf_counter()
    reference.main(
        reference.ReferenceOptions(
            run=folder,
            model=model,
            dtype=args.dtype,
            kernels=args.kernels,
            max_tokens_per_pack=args.max_tokens_per_pack,
        )
    )
    return {"seconds": time.perf_counter() - started}


def steps_of(run: Path, model: Path, share: str, args: argparse.Namespace) -> tuple:
    """The pairs, and the plan of `conj.train.dpo`: which pairs are in each step, and in which packs."""
    from conj.data.packs import plan_packs, plan_steps
    from conj.train.reference import load_pairs

    pairs, _, usable = load_pairs(run, model, 6400)
    steps = plan_steps(pairs, usable, pairs_per_step=args.pairs_per_step, share=share, seed="2021:0")[: args.steps]
    return pairs, steps, [plan_packs(pairs, s, max_tokens=args.max_tokens_per_pack, share=share) for s in steps]


def trl_tokenizer(folder: Path):
    """The folder's tokenizer with a template that ends at the judgment's end token.

    conj trains a judgment up to that token, which is what a sampler writes; the line break that the template puts after
    it is never sampled. TRL takes the completion from the template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>' + '\n'}}", "'<|im_end|>'}}{% if message['role'] != 'assistant' %}{{'\n'}}{% endif %}"
    )
    return tokenizer


def run_trl(folder: Path, model: Path, share: str, peer: dict, args: argparse.Namespace) -> dict:
    """`DPOTrainer.train()` on the same pairs in the same order, timed step by step.

    `peer` holds what differs from `DPOConfig()`'s defaults for speed; everything else here is output, the optimizer's
    numbers, which are conj's so that losses can be compared, and no max_length, or TRL would cut off judgments."""
    batch = peer.get("per_device_train_batch_size", min(8, args.pairs_per_step))
    assert args.pairs_per_step % batch == 0
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from conj.data.files import read_jsonl

    rows = read_jsonl(folder / "run" / "pairs.jsonl")
    _, steps, _ = steps_of(folder / "run", model, share, args)
    tokenizer = trl_tokenizer(model)
    times = []

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[-1] = time.perf_counter() - times[-1]

    config = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=args.steps, gradient_accumulation_steps=args.pairs_per_step // batch,
        per_device_train_batch_size=batch, max_length=None, use_cpu=args.device == "cpu", bf16=args.dtype == "bf16",
        train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        beta=SETTINGS["beta"], learning_rate=SETTINGS["learning_rate"], adam_beta1=SETTINGS["adam_beta1"],
        adam_beta2=SETTINGS["adam_beta2"], weight_decay=SETTINGS["weight_decay"], lr_scheduler_type="cosine",
        **{k: v for k, v in peer.items() if k != "per_device_train_batch_size"},
    )  # fmt: skip
    data = Dataset.from_list(
        [{k: rows[i][k] for k in ("prompt", "chosen", "rejected")} for step in steps for i in step]
    )
    trainer = DPOTrainer(
        model=str(model), args=config, train_dataset=data, processing_class=tokenizer, callbacks=[StepTimer()]
    )
    trainer.train()
    return {
        "pairs_per_step": args.pairs_per_step,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "step_seconds": times,
        "peak_memory_bytes": peak_memory_bytes(args.device),
    }


def isolated(function, *arguments) -> dict:
    """`function(*arguments)` in a fresh process; {"error": …} where it fails, killed for its memory for one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}".splitlines()[0][:200]}


def step_flops(pairs, packs: list, config) -> tuple[int, int]:
    """FLOPs of one forward through the blocks, and through the head, elementwise work left out.

    A token takes 2 x (parameters of the blocks' matrices); a query takes 4 x N x H for every key it sees; a predicted
    token takes 2 x D x V."""
    from conj.data.packs import group_tokens

    c = config
    heads_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads_size + 2 * kv_size + 3 * c.intermediate_size)
    blocks = head = 0
    for group in (g for pack in packs for g in pack):
        prompt = len(pairs.prompts[group.prompt])
        judgments = [len(ids) for pair in group.pairs for ids in pairs.judgments[pair]]
        copies = len(judgments) if group.split else 1
        keys_seen = copies * prompt * (prompt + 1) // 2
        keys_seen += sum((n - 1) * prompt + (n - 1) * n // 2 for n in judgments)
        blocks += c.num_hidden_layers * (2 * block * group_tokens(pairs, group) + 4 * heads_size * keys_seen)
        head += 2 * c.hidden_size * c.vocab_size * sum(judgments)
    return blocks, head


def conj_step_flops(folder: Path, model: Path, share: str, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(executed, needed) FLOPs of each step. Needed is three times the forward; executed adds what is computed again:
    the head's forward always, the blocks' with activation checkpointing."""
    from conj.model.qwen2 import read_config

    pairs, _, plans = steps_of(folder / "run", model, share, args)
    forwards = [step_flops(pairs, packs, read_config(model)) for packs in plans]
    recomputed = 4 if args.activation_checkpointing else 3
    return [(recomputed * blocks + 4 * head, 3 * (blocks + head)) for blocks, head in forwards]


def best_settings(folder: Path, model: Path, args: argparse.Namespace) -> dict:
    """TRL's fastest settings with stored reference logprobs, each tried on one step after a warm-up."""
    found = {}
    args = argparse.Namespace(**vars(args) | {"steps": 2})
    for batch in (b for b in args.batch_sizes if args.pairs_per_step % b == 0):
        for checkpointing in (False, True):
            peer = {"precompute_ref_log_probs": True, "per_device_train_batch_size": batch}
            peer["gradient_checkpointing"] = checkpointing
            result = isolated(run_trl, folder, model, "prompt", peer, args)
            print(f"  trl, batch {batch}, checkpointing {checkpointing}:", end=" ")
            print(in_short(result), flush=True)
            if "error" not in result:
                found[pairs_per_second(result)] = peer
    return found[max(found)] if found else {"precompute_ref_log_probs": True, "per_device_train_batch_size": 1}


def compare(folder: Path, geometry: str, args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows for one model, share by share: conj and every setting of the peer, in turns."""
    model = folder / "model"
    reference = isolated(run_reference, folder / "run", model, args)
    ceiling = isolated(matmul_ceiling, args.device, args.dtype)
    peers = {"default": {}} if args.peer == "trl" else {}
    if peers and "best" in args.settings:
        peers["best"] = best_settings(folder, model, args)
    for share in args.share:
        results: dict[str, list[dict]] = {name: [] for name in ("conj", *peers)}
        for _ in range(args.rounds):
            for name in results:
                extra = () if name == "conj" else (peers[name],)
                results[name].append(isolated(run_trl if extra else run_conj, folder, model, share, *extra, args))
                print(f"  share {share}, {name}: {in_short(results[name][-1])}", flush=True)
        ours = results["conj"]
        row = {
            "geometry": geometry, "vocab_size": GEOMETRIES[geometry]["vocab_size"], "share": share,
            "dtype": args.dtype, "pairs_per_step": args.pairs_per_step, "steps": args.steps, "rounds": args.rounds,
        }  # fmt: skip
        if failed := next((r["error"] for r in [reference, *ours] if "error" in r), None):
            yield [row | {"error": failed}]
            continue
        seconds = [sum(result["step_seconds"][1:]) for result in ours]
        flops = conj_step_flops(folder, model, share, args)
        executed, needed = (statistics.median(sum(f[i] for f in flops[1:]) / s for s in seconds) for i in (0, 1))
        row |= {
            "pairs_per_second_conj": statistics.median(map(pairs_per_second, ours)),
            "unique_tokens_per_second_conj": statistics.median(sum(r["tokens"][1:]) / s for r, s in zip(ours, seconds)),
            "matmul_ceiling_flops_per_second": ceiling,
            "hardware_flops_utilisation_conj": executed / ceiling,
            "model_flops_utilisation_conj": needed / ceiling,
            "peak_memory_bytes_conj": max(r["peak_memory_bytes"] for r in ours),
            "reference_seconds_per_pair_conj": reference["seconds"] / (args.prompts * args.pairs_per_prompt),
            "loss_conj": ours[0]["losses"][-1], "losses_conj": ours[0]["losses"],
        }  # fmt: skip
        yield [row | beside(ours, results[name], name, peers[name]) for name in peers] or [row]


def beside(ours: list[dict], theirs: list[dict], name: str, settings: dict) -> dict:
    """What a row says of a peer: its figures, and ours divided by its, round by round."""
    if failed := next((r["error"] for r in theirs if "error" in r), None):
        return {"peer": name, "peer_settings": settings, "peer_error": failed}
    ratios = [pairs_per_second(a) / pairs_per_second(b) for a, b in zip(ours, theirs)]
    peak = max(r["peak_memory_bytes"] for r in theirs)
    return {
        "peer": name,
        "peer_settings": settings,
        "pairs_per_second_peer": statistics.median(map(pairs_per_second, theirs)),
        "peak_memory_bytes_peer": peak,
        "ratio_pairs_per_second": statistics.median(ratios),
        "ratios_pairs_per_second": ratios,
        "ratio_peak_memory": max(r["peak_memory_bytes"] for r in ours) / peak,
        "loss_peer": theirs[0]["losses"][-1],
        "losses_peer": theirs[0]["losses"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"])),
    }


def pairs_per_second(result: dict) -> float:
    """After the first step, which is warm-up."""
    return result["pairs_per_step"] * (len(result["step_seconds"]) - 1) / sum(result["step_seconds"][1:])


def in_short(result: dict) -> str:
    if "error" in result:
        return result["error"]
    peak = result["peak_memory_bytes"] / 2**20
    return f"{pairs_per_second(result):.2f} pairs/s, {peak:.0f} MiB, loss {result['losses'][-1]:.5f}"


def print_table(rows: list[dict]) -> None:
    print("| model | share | TRL | conj pairs/s | TRL pairs/s | ratio | peak memory, conj / TRL | losses differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            print(f"| {row['geometry']} | {row['share']} | | {row['error']} | | | | |")
            continue
        start = (
            f"| {row['geometry']} | {row['share']} | {row.get('peer', 'none')} | {row['pairs_per_second_conj']:.2f} | "
        )
        if "ratio_pairs_per_second" in row:
            print(f"{start}{row['pairs_per_second_peer']:.2f} | {row['ratio_pairs_per_second']:.1f} | "
                  f"{row['ratio_peak_memory']:.2f} | {row['largest_loss_difference']:.1e} |")  # fmt: skip
        else:
            print(f"{start}{row.get('peer_error', '–')} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="must be what torch finds here")
    parser.add_argument("--peer", choices=("trl", "none"), default="trl", help="whom to time beside conj")
    parser.add_argument(
        "--settings", nargs="+", choices=("default", "best"), default=["default", "best"], help="of TRL"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2], help="of TRL, to find its best among")
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["20M", "large-vocabulary"], help="models")
    parser.add_argument("--share", nargs="+", choices=("prompt", "pair", "none"), default=["prompt", "pair"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of forward and backward, both sides")
    parser.add_argument("--prompts", type=int, default=64, help="prompts in pairs.jsonl")
    parser.add_argument("--pairs-per-prompt", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(270, 330), help="fewest and most")
    parser.add_argument("--judgment-tokens", type=int, nargs=2, default=(40, 120), help="fewest and most")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs an optimizer step takes, both sides")
    parser.add_argument("--max-tokens-per-pack", type=int, default=16384, help="of conj")
    parser.add_argument("--activation-checkpointing", action="store_true", help="of conj")
    parser.add_argument("--cpu-offload", action="store_true", help="of conj")
    parser.add_argument("--kernels", choices=("triton", "compile", "torch"), help="of conj; by default the device's")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a run; the first is warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
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
            for found in compare(folder, geometry, args):
                rows += [row | where for row in found]
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    unequal = [r for r in rows if r.get("largest_loss_difference", 0) > LOSS_TOLERANCE[args.dtype]]
    if unequal or any("error" in row for row in rows):
        sys.exit(
            f"error: {len(unequal)} comparisons with unequal losses; conj failed: {any('error' in r for r in rows)}"
        )


if __name__ == "__main__":
    main()
