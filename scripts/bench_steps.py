"""Training steps at the width of Qwen2-7B on one device: seconds, share of the matmul ceiling, memory, where time goes.

    python scripts/bench_steps.py --json steps.json --trace steps.trace.json.gz
    python scripts/bench_steps.py --device cpu --dtype float32 --tiny --json steps.json

All 28 layers where they fit, else as many as do: counted beforehand from the config (`bytes_needed`), and an eighth fewer
each time the device runs out of memory all the same. Weights are drawn on the device, nothing is written or hashed.
Pairs are as long as Con-J's: 4 on each prompt of 600 to 2,400 tokens, judgments of 100 to 400. Their reference logprobs
are computed first, by the model itself, so the first step's loss is ln 2; another one is an error.

Steps are `train_step` of `conj.train.dpo`: 2 for warm-up, 5 timed, and one more under torch.profiler, which gives the
seconds of each kind of kernel, launches, waits of the host, and, with `--trace`, a trace for chrome://tracing or Perfetto.
`model_flops_utilisation` counts three forwards a step, over the best of many square matmuls in the same process.
A row for each kind of activation checkpointing, written as soon as it is measured and again with its profile.
"""

import argparse
import gc
import gzip
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import QWEN2, argument_parser, config_of, where_measured, write_rows
from torch.profiler import ProfilerActivity, profile

from conj import InputError
from conj.data.files import write_atomic
from conj.data.packs import group_tokens, pairs_of, plan_packs, plan_steps
from conj.data.tokens import TokenizedPairs
from conj.model import backends
from conj.model.config import ModelConfig, parameter_shapes
from conj.model.weights import local_tensor
from conj.train.dpo import DPOOptions, batches_of, build_optimizer, select_arithmetic, train_step
from conj.train.flops import training_flops
from conj.train.options import ACTIVATION_CHECKPOINTING
from conj.train.reference import compute_logps
from conj.train.sharding import World, distributed, ending_process, shard_model
from conj.train.speed import matmul_ceiling, peak_memory_bytes, synchronize

TINY = {"D": 64, "F": 160, "N": 4, "K": 2, "H": 16, "V": 5000, "L": 2, "tie": False}
KERNEL_KINDS = {  # the first pattern that a kernel's name matches
    "attention": r"flash|fmha|attention",
    "matmul": r"gemm|nvjet|cutlass|cublas|xmma|splitK",
    "conj's kernels": r"_logprob|_rms_norm|_rope|_swiglu|_sum_rows",
    "AdamW": r"adam",
    "copies and casts": r"memcpy|memset|copy|chunk_cat|CatArray|fill",
    "sums and norms": r"reduce|norm|cumsum|scan",
    "between processes": r"nccl",
    "elementwise": r"elementwise|multi_tensor",
}


def bytes_needed(config: ModelConfig, num_tokens: int, recompute: str) -> int:
    """Device memory of training with packs of `num_tokens` in bf16, one rank.

    16 bytes a parameter: master weight, gradient and AdamW's two moments, in fp32. What a layer keeps of a token until
    the backward, in elements: input, sum after attention, two norms (4 D), queries and attention's output (2 N H), keys
    and values, gathered for half of the segments (3 K H), the MLP's gate, up and product (3 F); `selective` remakes the
    norms and the product, `full` all but the input. Beside that, one layer's worth twice (remade, and its gradients),
    bf16 weight and gradient and the fp32 gradient of the head and of two layers, and 2 GB of contexts and blocks."""
    c = config
    D, F, q, kv = c.hidden_size, c.intermediate_size, *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))  # fmt: skip
    all_kept = 4 * D + 2 * q + 3 * kv + 3 * F
    kept = {"none": all_kept, "selective": all_kept - 2 * D - F, "full": D}[recompute]
    parameters = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    layer = sum(n for name, n in parameters.items() if ".layers.0." in name)
    fixed = 8 * c.vocab_size * D + 16 * layer + 2 * 10**9
    return 16 * sum(parameters.values()) + 2 * num_tokens * (c.num_hidden_layers * kept + 2 * all_kept) + fixed


def most_layers(size: dict, num_tokens: int, recompute: str, free_bytes: int) -> int:
    """As many of the model's layers as `free_bytes` hold; 0 if not one."""
    fits = [n for n in range(1, size["L"] + 1) if bytes_needed(config_of(size, n), num_tokens, recompute) <= free_bytes]
    return max(fits, default=0)


def random_pairs(args: argparse.Namespace, vocab_size: int) -> TokenizedPairs:
    """Enough pairs for every step, 4 on each prompt, of random tokens; lengths drawn evenly from the two ranges."""
    rng = random.Random(0)

    def tokens(lengths: tuple[int, int]) -> array:
        return array("i", rng.choices(range(vocab_size), k=rng.randint(*lengths)))

    num_prompts = -(-args.pairs_per_step * (args.warmup + args.steps + 1) // 4)
    prompt_of = [i for i in range(num_prompts) for _ in range(4)]
    return TokenizedPairs(
        ids=[f"prompt-{i}" for i in prompt_of], is_eval=[False] * len(prompt_of),
        prompts=[tokens(args.prompt_tokens) for _ in range(num_prompts)], prompt_of=prompt_of,
        judgments=[(tokens(args.judgment_tokens), tokens(args.judgment_tokens)) for _ in prompt_of],
    )  # fmt: skip


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        local = local_tensor(parameter)
        local.normal_(0, 0.02) if parameter.ndim > 1 else local.fill_(float("norm" in name))


def run(config: ModelConfig, recompute: str, pairs: TokenizedPairs, plans: list, args, world: World) -> tuple:
    """Figures of the timed steps, and the function that takes one more."""
    options = DPOOptions(run_dir=Path(), model=Path(), dtype=args.dtype)
    model = shard_model(config, world, args.dtype, activation_checkpointing=recompute)
    draw_weights(model)
    optimizer, largest = build_optimizer(model, options), largest_pack(pairs, plans)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def seconds_of(function: Callable) -> tuple[float, object]:
        synchronize(args.device)
        started = time.perf_counter()
        found = function()
        synchronize(args.device)
        return time.perf_counter() - started, found

    # In the packs of the steps, where a GPU rounds as it will round then. The first step's compile kernels.
    first, rest = plans[0], [pack for packs in plans[1:] for pack in packs]
    reference = compute_logps(model, pairs, first, world)
    scoring_seconds, others = seconds_of(lambda: compute_logps(model, pairs, rest, world))
    reference += others

    batches = batches_of(pairs, reference, plans, world)

    def step(packs: list) -> dict:  # of `plans` in their order: the next batch is made ahead
        return train_step(model, optimizer, pairs, packs, batches, options.learning_rate, options, world)

    timed = [seconds_of(lambda packs=packs: step(packs)) for packs in plans[:-1]]
    assert not any("skipped" in metrics for _, metrics in timed), "a step's loss or gradient was not finite"
    seconds, metrics = zip(*timed[args.warmup :])
    timed_plans, how = plans[args.warmup : -1], {"recompute": recompute, "device": args.device}
    flops = [training_flops(pairs, packs, config, **how) for packs in timed_plans]
    executed, needed = (sum(column) for column in zip(*flops))
    row = {
        "layers": config.num_hidden_layers, "recompute": recompute, "dtype": args.dtype,
        "parameters": sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        "pairs_per_step": args.pairs_per_step, "packs_per_step": [len(packs) for packs in timed_plans],
        "tokens_per_step": [m["num_tokens"] for m in metrics], "largest_pack_tokens": largest,
        "step_seconds": list(seconds), "step_seconds_median": statistics.median(seconds),
        "pairs_per_second": args.pairs_per_step * len(seconds) / sum(seconds),
        "tokens_per_second": sum(m["num_tokens"] for m in metrics) / sum(seconds),
        "model_flops": needed, "executed_flops": executed, "peak_memory_bytes": peak_memory_bytes(args.device),
        "counted_memory_bytes": bytes_needed(config, largest, recompute), "first_loss": timed[0][1]["loss"],
        "scoring_pairs_per_second": len(pairs_of(rest)) / scoring_seconds, "losses": [m["loss"] for m in metrics],
    }  # fmt: skip
    return row, lambda: step(plans[-1])


def profile_step(step: Callable, device: str, trace: Path | None) -> dict:
    """What one step consists of, by torch's profiler; its trace is kept in `trace`, compressed."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        data = path.read_bytes()
    if trace is not None:
        write_atomic(trace, gzip.compress(data, compresslevel=5))
    return {"step_seconds": seconds} | by_kind(json.loads(data)["traceEvents"])


def by_kind(events: list[dict]) -> dict:
    """Seconds and calls of each kind of kernel in a trace, how long any ran, and what the host launched and waited for.

    Without kernels (a CPU), of the operators; one inside another is counted in both."""
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds, names = {}, {}
    for event in kernels or [event for event in timed if event.get("cat") == "cpu_op"]:
        kind = next((k for k, pattern in KERNEL_KINDS.items() if re.search(pattern, event["name"], re.I)), "other")
        for table, key in ((kinds, kind), (names, event["name"][:120])):
            entry = table.setdefault(key, {"seconds": 0.0, "calls": 0})
            entry["seconds"] += event["dur"] / 1e6
            entry["calls"] += 1
    busy, until = 0.0, -math.inf
    for start, duration in sorted((event["ts"], event["dur"]) for event in kernels):
        busy += max(0.0, start + duration - max(start, until))
        until = max(until, start + duration)
    calls = [event for event in timed if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    # cudaDeviceSynchronize is the benchmark's own, after the step.
    waits = [e for e in calls if "Synchronize" in e["name"] and e["name"] != "cudaDeviceSynchronize"]

    def largest(table: dict, most: int) -> dict:
        return dict(sorted(table.items(), key=lambda item: -item[1]["seconds"])[:most])

    return {
        "gpu_busy_seconds": busy / 1e6, "kinds": largest(kinds, 99), "largest_kernels": largest(names, 12),
        "kernel_launches": sum("Launch" in event["name"] for event in calls),
        "host_waits": dict(Counter(event["name"] for event in waits)),
        "host_waits_seconds": sum(event["dur"] for event in waits) / 1e6,
    }  # fmt: skip


def largest_pack(pairs: TokenizedPairs, plans: list) -> int:  # tokens
    return max(sum(group_tokens(pairs, group) for group in pack) for packs in plans for pack in packs)


def print_row(row: dict) -> None:
    print(
        f"{row['layers']} layers, {row['recompute']}: {row['step_seconds_median']:.3f} s a step (median of "
        f"{len(row['step_seconds'])}), {row['pairs_per_second']:.2f} pairs/s, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['model_flops_utilisation']:.1%} of the matmul ceiling, {row['peak_memory_bytes'] / 2**30:.1f} GiB "
        f"({row['counted_memory_bytes'] / 2**30:.1f} counted)",
        flush=True,
    )
    profiled = row.get("profile", {"kinds": {}})
    total = sum(entry["seconds"] for entry in profiled["kinds"].values())
    for kind, entry in profiled["kinds"].items():
        seconds, calls = entry["seconds"], entry["calls"]
        print(f"    {kind:18} {seconds * 1e3:9.1f} ms {seconds / total:6.1%} {calls:7} calls")
    if profiled["kinds"]:
        print(f"    kernels ran {profiled['gpu_busy_seconds']:.3f} of {profiled['step_seconds']:.3f} s, "
              f"{profiled['kernel_launches']} launches, waits {profiled['host_waits']}", flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of forward and backward")
    parser.add_argument("--model", choices=QWEN2, default="7B", help="whose width, and whose layers as far as they fit")
    kinds = ACTIVATION_CHECKPOINTING[::-1]  # the one that keeps least, and so fits most layers, first
    parser.add_argument("--recompute", nargs="+", choices=kinds, default=kinds, help="activation checkpointing")
    parser.add_argument("--max-tokens-per-pack", type=int, default=16384, help="tokens of a forward pass")
    parser.add_argument("--pairs-per-step", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(600, 2400), help="fewest and most")
    parser.add_argument("--judgment-tokens", type=int, nargs=2, default=(100, 400), help="fewest and most")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; rows that may not fit them are left out")
    parser.add_argument("--tiny", action="store_true", help="a model and pairs of a few tokens")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--trace", type=Path, help="file for the trace of the first row's profiled step, .json.gz")
    args = parser.parse_args()
    try:
        backends.choose_device(backends.this_machine(args.device), args.device)
    except InputError as e:
        parser.error(str(e))
    if args.tiny:
        args.prompt_tokens, args.judgment_tokens, args.pairs_per_step = (20, 60), (5, 20), 8
        args.max_tokens_per_pack = 400
    return args


def run_what_fits(size: dict, recompute: str, pairs: TokenizedPairs, plans: list, args, world: World) -> tuple:
    """`run` with as many layers as the device holds."""
    free_memory(args.device)
    free_bytes = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 2**40
    layers = most_layers(size, largest_pack(pairs, plans), recompute, free_bytes)
    while layers:
        try:
            return run(config_of(size, layers), recompute, pairs, plans, args, world)
        except torch.OutOfMemoryError as e:
            print(f"{layers} layers, {recompute}: {str(e).splitlines()[0][:200]}", flush=True)
        layers -= -(-layers // 8)
        free_memory(args.device)  # not within the handler, whose traceback holds what is to be freed
    sys.exit(f"error: not one layer of {args.model} fits {free_bytes / 2**30:.0f} GiB with --recompute {recompute}")


def free_memory(device: str) -> None:
    gc.collect()  # a sharded model holds itself
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    started, args, rows, longest = time.perf_counter(), parse(), [], 0.0
    where, size = where_measured(args.device), TINY if args.tiny else QWEN2[args.model]
    pairs = random_pairs(args, size["V"])
    members = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=args.pairs_per_step, share="prompt", seed="0")
    plans = [plan_packs(pairs, step, max_tokens=args.max_tokens_per_pack, share="prompt") for step in members]

    def write() -> None:
        print_row(rows[-1])
        write_rows(args.json, rows)

    with distributed(args.device) as world:
        select_arithmetic(DPOOptions(run_dir=Path(), model=Path(), dtype=args.dtype), world.device)
        ceiling = matmul_ceiling(args.device, args.dtype, 1.0)
        print(f"matmul ceiling: {ceiling / 1e12:.3g} TFLOP/s", flush=True)
        for recompute in args.recompute:
            began = time.perf_counter()
            if began - started + longest > args.budget:
                print(f"no time left for --recompute {recompute}")
                continue
            row, step = run_what_fits(size, recompute, pairs, plans, args, world)
            row = {"model": "tiny" if args.tiny else args.model, "layers_of_model": size["L"], **row, **where}
            row |= {"ceiling_flops_per_second": ceiling}
            for kind in ("model", "executed"):
                row[f"{kind}_flops_utilisation"] = row[f"{kind}_flops"] / sum(row["step_seconds"]) / ceiling
            rows.append(row)
            write()
            rows[-1]["profile"] = profile_step(step, args.device, args.trace if len(rows) == 1 else None)
            write()
            del step  # it holds the model
            longest = max(longest, time.perf_counter() - began)
    wrong = [row["recompute"] for row in rows if abs(row["first_loss"] - math.log(2)) > 1e-3]
    if wrong:
        sys.exit(f"error: the first loss is not ln 2 with {', '.join(wrong)}: policy and reference differ")


if __name__ == "__main__":
    with ending_process():
        main()
