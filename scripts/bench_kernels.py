"""The kernels beside their peers: checked against fp64 first, then time, memory and share of the device's ceiling.

    python scripts/bench_kernels.py --device cuda --dtype bfloat16 --json kernels.json
    python scripts/bench_kernels.py --device cuda --only linear_logprob --models 7B --tokens 4096 --modes both
    python scripts/bench_kernels.py --device cpu --dtype float32 --tiny
    python scripts/bench_kernels.py --device cpu --dtype float32 --memory 1024 64

Gate: on 64 tokens, outputs and gradients against an fp64 oracle, half of the targets likely, upstream gradients signed
and different for each token. A candidate whose relative error is above 4 times that of torch eager in the same dtype
is reported and not timed; the script exits 1 if conj is that one.

Time: candidates take turns (A, B, C, A, B, C, ...). `forward` runs without a graph; `backward` alone, after a forward
that is not timed; `both` as in training. On a GPU each call follows a flushed cache and half a millisecond of waiting,
in which launches queue up as they do in training, and its own events take its time.

Ceiling: the best of many square matmuls. Of linear_logprob's FLOPs, `minimal` counts one forward and two backward
matmuls and shows how well the time is spent; `executed` adds those that make the logits again, and shows how well the
matmuls run. The least bytes of each operation: kernel_problems.py.

Peak memory is beyond the inputs: on a GPU the allocator's. `--memory T D` takes linear_logprob alone, over V, beyond the
inputs and their gradients; on a CPU each call has a process of its own, and the kernel's high-water mark is read.
"""

import argparse
import importlib.metadata
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_common import QWEN2, where_measured, write_rows
from kernel_problems import OPERATIONS, PEERS, SIZES, Candidate, Problem, linear_logprob, linear_logprob_candidates
from kernel_problems import skipped as skipped_peers
from torch import Tensor

from conj.model import backends
from conj.model.decoder import DTYPES
from conj.train.speed import matmul_ceiling, resident_bytes, synchronize

MODES = ("forward", "backward", "both")
VOCABULARIES = (32768, 65536, 131072, 262144)
HEADER = ("mode", "candidate", "error", "p50 ms", "p20 to p80", "peak MiB", "% of ceiling", "GB/s")
CANDIDATES = ("conj", "torch eager", "torch.compile", "torch chunked", "blockwise", "liger", "liger sum", "cce",
              "cce exact")  # fmt: skip
GATE_TOKENS, GATE_FACTOR, GATE_FLOOR = 64, 4, 1e-6  # the floor: where torch eager is exact, as a gather is


def _outputs(function: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    found = function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _gradients(outputs: tuple, inputs: tuple, upstream: tuple) -> tuple[Tensor, ...]:
    leaves = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs)])


def _upstream(problem: Problem, scalar: bool) -> tuple[Tensor, ...]:
    # -1 is +1 to the negated loss, at which Liger skips a pass over its gradients.
    some = next(iter(problem.upstream.values()))
    return (some.new_tensor(-1.0),) if scalar else tuple(problem.upstream.values())


def _results(function: Callable, problem: Problem, scalar: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; with `dtype`, of the inputs in that dtype."""
    inputs, upstream = tuple(problem.inputs.values()), _upstream(problem, scalar)
    if dtype is not None:
        wide = [x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        inputs, upstream = tuple(wide), tuple(u.to(dtype) for u in upstream)
    outputs = _outputs(function, inputs)
    names = [*problem.upstream, *(f"grad_{name}" for name, x in problem.inputs.items() if x.requires_grad)]
    return {k: v.detach() for k, v in zip(names, (*outputs, *_gradients(outputs, inputs, upstream)))}


def gate(problem: Problem) -> dict[str, dict]:
    """By candidate: `errors`, norm of the difference from the oracle over the oracle's, and `error`, why it fails."""
    eager, verdicts = next(c.function for c in problem.candidates if c.name == "torch eager"), {}
    for scalar in sorted({c.scalar for c in problem.candidates}):
        summed = (lambda f: lambda *x: f(*x).sum()) if scalar else (lambda f: f)
        expected = _results(summed(problem.oracle), problem, scalar, torch.float64)

        def errors(function: Callable, scalar=scalar, expected=expected) -> dict[str, float]:
            found = _results(function, problem, scalar)
            return {k: float((found[k].double() - v).norm() / v.norm()) for k, v in expected.items()}

        allowed = {k: GATE_FACTOR * v + GATE_FLOOR for k, v in errors(summed(eager)).items()}
        for candidate in (c for c in problem.candidates if c.scalar == scalar):
            try:
                found = errors(candidate.function)
            except Exception as e:  # other people's kernels and compilers: whatever they raise is their row
                verdicts[candidate.name] = {"errors": {}, "error": _short(e)}
                continue
            wrong = [f"{k} {v:.1e} > {allowed[k]:.1e}" for k, v in found.items() if not v <= allowed[k]]
            verdicts[candidate.name] = {"errors": found, "error": f"gate: {', '.join(wrong)}" if wrong else None}
    return verdicts


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:200]


def _steps(candidate: Candidate, problem: Problem, mode: str) -> tuple[Callable, Callable]:
    """What to do before the clock starts, and what to time, which takes what the first returned."""
    inputs, upstream = tuple(problem.inputs.values()), _upstream(problem, candidate.scalar)
    detached = tuple(x.detach() for x in inputs)

    def forward(_=None):
        return _outputs(candidate.function, inputs)

    def backward(outputs):
        return _gradients(outputs, inputs, upstream)

    if mode == "forward":
        return lambda: None, lambda _: candidate.function(*detached)
    return (forward, backward) if mode == "backward" else (lambda: None, lambda _: backward(forward()))


def _sample(prepare: Callable, timed: Callable, device: str, flush: Tensor | None) -> float:
    """Seconds of one call."""
    prepared = prepare()
    synchronize(device)
    if flush is None:
        started = time.perf_counter()
        timed(prepared)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(1_000_000)
    start.record()
    timed(prepared)
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3


def _peak(prepare: Callable, timed: Callable, device: str) -> int | None:
    """Bytes beyond what was there before; None on a CPU. Calls once more first: a first call compiles."""
    timed(prepare())
    if device == "cpu":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(prepare())
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def measure(problem: Problem, mode: str, names: set[str], device: str, seconds: float) -> dict[str, dict]:
    """By candidate: seconds of its calls, taken in turns, and its peak memory, or the error that ended it."""
    found, steps = {}, {c.name: _steps(c, problem, mode) for c in problem.candidates if c.name in names}
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def attempt(name: str, call: Callable):
        try:
            return call()
        except Exception as e:  # as in `gate`; most of all, out of memory
            found[name] = {"error": _short(e)}
            del steps[name]
        if device == "cuda":  # not within the handler, whose traceback holds what is to be freed
            torch.cuda.empty_cache()

    for name, (prepare, timed) in list(steps.items()):
        peak = attempt(name, lambda p=prepare, t=timed: _peak(p, t, device))
        if name in steps:
            found[name] = {"peak_bytes": peak, "times": []}
    rounds, started = 0, time.perf_counter()
    while steps and (rounds < 5 or time.perf_counter() - started < seconds * len(steps)):
        for name, (prepare, timed) in list(steps.items()):
            taken = attempt(name, lambda p=prepare, t=timed: _sample(p, t, device, flush))
            if name in steps:
                found[name]["times"].append(taken)
        rounds += 1
    return found


def describe(candidate: Candidate, problem: Problem, mode: str, measured: dict, ceiling: float) -> dict:
    """The figures of one row."""
    row = {"note": candidate.note, "upstream": "scalar" if candidate.scalar else "per token"}
    if measured.get("error"):
        return row | {"error": measured["error"]}
    place, tenths = MODES.index(mode), statistics.quantiles(measured["times"], n=10, method="inclusive")
    row |= {"p20_ms": tenths[1] * 1e3, "p50_ms": tenths[4] * 1e3, "p80_ms": tenths[7] * 1e3}
    peak, num_bytes = measured["peak_bytes"], (*problem.num_bytes, sum(problem.num_bytes))[place]
    row |= {"samples": len(measured["times"]), "peak_mib": None if peak is None else peak / 2**20}
    row |= {"bytes": num_bytes, "gb_per_s": num_bytes / tenths[4] / 1e9}
    if candidate.matmuls is not None and candidate.matmuls[place]:
        for kind, matmuls in (("minimal", (1, 2, 3)[place]), ("executed", candidate.matmuls[place])):
            row[f"flops_{kind}"] = matmuls * problem.matmul_flops
            row[f"ceiling_{kind}"] = row[f"flops_{kind}"] / tenths[4] / ceiling
    return row


def run(op: str, model: str, T: int, args: argparse.Namespace, ceiling: float) -> list[dict]:
    """Gate and timing of one operation at one shape: a row for each candidate and mode."""
    size, compiled = SIZES[model], args.compile or args.device == "cuda"
    like = (args.device, DTYPES[args.dtype])
    torch.compiler.reset()  # else the shapes of earlier problems count against its limit of recompilations
    torch.manual_seed(0)
    verdicts = gate(OPERATIONS[op](size, min(T, GATE_TOKENS), like, compiled))
    problem = OPERATIONS[op](size, T, like, compiled)
    chosen, rows = [c for c in problem.candidates if args.candidates is None or c.name in args.candidates], []
    passed = {c.name for c in chosen if not verdicts[c.name]["error"]}
    for mode in args.modes:
        measured = measure(problem, mode, passed, args.device, args.seconds)
        for candidate in chosen:
            row = {"op": op, "model": model, "tokens": T, "mode": mode, "candidate": candidate.name}
            row |= {"dtype": args.dtype, "ceiling_tflops": ceiling / 1e12, "errors": verdicts[candidate.name]["errors"]}
            figures = measured.get(candidate.name, verdicts[candidate.name])
            rows.append(row | describe(candidate, problem, mode, figures, ceiling))
    return rows


def peak_beyond_gradients(name: str, T: int, D: int, V: int, device: str, dtype: str) -> int:
    """Peak bytes of linear_logprob, forward and backward, beyond its inputs and their gradients."""
    backends.select(torch.device(device))
    like = (device, DTYPES[dtype])
    for tokens, columns in ((16, 64), (T, V)):  # the first is warm-up
        problem = linear_logprob({"D": D, "V": columns}, tokens, like, False)
        prepare, timed = _steps(next(c for c in problem.candidates if c.name == name), problem, "both")
        if device == "cuda":
            peak = _peak(prepare, timed, device)
            continue
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        timed(prepare())
        peak = resident_bytes("VmHWM") - before
    return peak - sum(x.numel() * x.element_size() for x in problem.inputs.values() if x.requires_grad)


def memory_rows(T: int, D: int, device: str, dtype: str, names=None, vocabularies: tuple = VOCABULARIES) -> list[dict]:
    """A row for each V and each candidate of linear_logprob (or those named). On a CPU each is a fresh process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for those processes: what is freed goes back to the kernel
    rows, found = [], [c.name for c in linear_logprob_candidates(device, False)]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])  # seconds of import, once
    with ProcessPoolExecutor(1, mp_context=server, max_tasks_per_child=1) as pool:
        for V in vocabularies:
            for name in (name for name in found if names is None or name in names):
                row = {"op": "linear_logprob", "mode": "memory", "candidate": name, "dtype": dtype, "tokens": T}
                row |= {"D": D, "V": V, "logits_mib": T * V * DTYPES[dtype].itemsize / 2**20}
                call = (peak_beyond_gradients, name, T, D, V, device, dtype)
                try:
                    peak = call[0](*call[1:]) if device == "cuda" else pool.submit(*call).result()
                    rows.append(row | {"peak_mib": peak / 2**20})
                except torch.OutOfMemoryError as e:
                    rows.append(row | {"error": _short(e)})
    return rows


def print_memory(rows: list[dict]) -> None:
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    print(f"\nPeak MiB of linear_logprob forward + backward beyond inputs and gradients, T {rows[0]['tokens']}", end="")
    print(f", D {rows[0]['D']}, {rows[0]['dtype']}:\n\n| V | logits |", " | ".join(names), "|")
    print("|" + "---|" * (2 + len(names)))
    for V in dict.fromkeys(row["V"] for row in rows):
        found = {row["candidate"]: row for row in rows if row["V"] == V}
        cells = [f"{found[name]['peak_mib']:.1f}" if "peak_mib" in found[name] else "error" for name in names]
        print(f"| {V} | {found[names[0]]['logits_mib']:.0f} |", " | ".join(cells), "|")


def print_rows(rows: list[dict]) -> None:
    """Markdown, a table for each problem; percent of the ceiling as executed / minimal FLOPs."""
    for (op, model, T), group in itertools.groupby(rows, key=lambda row: (row["op"], row["model"], row["tokens"])):
        print(f"\n{op}, {model}, T {T}, {rows[0]['dtype']}\n\n|", " | ".join(HEADER), "|\n|" + "---|" * len(HEADER))
        for row in group:
            print("|", " | ".join(_cells(row)), "|", flush=True)


def _cells(row: dict) -> list[str]:
    errors = row["errors"].values()
    cells = [row["mode"], row["candidate"], f"{max(errors):.1e}" if errors else ""]
    if row.get("error"):
        return [*cells, row["error"], "", "", "", ""]
    shares = f"{row['ceiling_executed']:.0%} / {row['ceiling_minimal']:.0%}" if "ceiling_executed" in row else ""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return [*cells, f"{row['p50_ms']:.3g}", f"{row['p20_ms']:.3g} to {row['p80_ms']:.3g}", peak, shares,
            f"{row['gb_per_s']:.3g}"]  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="operations")
    parser.add_argument("--models", nargs="+", choices=QWEN2, default=list(QWEN2), help="whose shapes")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384], help="T")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what is timed")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, help="only these")
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too; on a GPU it always runs")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each candidate, shape and mode")
    parser.add_argument("--memory", nargs=2, type=int, metavar=("T", "D"), help="only the memory table")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    if args.tiny:
        args.models, args.tokens, args.seconds = ["tiny"], [128], min(args.seconds, 0.02)
    return args


def benchmark(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows as they are measured, a problem at a time."""
    backends.select(torch.device(args.device))
    where = where_measured(args.device)
    where |= {name: importlib.metadata.version(name) for module, name in PEERS.items() if find_spec(module)}
    print(*(f"{k}: {v}." for k, v in where.items()), *(f"\nskipped: {line}" for line in skipped_peers(args.device)))
    if args.memory:
        yield [row | where for row in memory_rows(*args.memory, args.device, args.dtype, args.candidates)]
        return
    ceiling = matmul_ceiling(args.device, args.dtype, 0.1 if args.tiny else 2.0)
    print(f"matmul ceiling: {ceiling / 1e12:.3g} TFLOP/s")
    for op, model, T in itertools.product(args.only, args.models, args.tokens):
        yield [row | where for row in run(op, model, T, args, ceiling)]


def main() -> None:
    args, rows = parse(), []
    for found in benchmark(args):
        if not found:
            sys.exit("error: none of --candidates runs here")
        (print_memory if found[0]["mode"] == "memory" else print_rows)(found)
        rows += found
        write_rows(args.json, rows)
    failed = {row["op"] for row in rows if row["candidate"] == "conj" and row.get("error")}
    if failed:
        sys.exit(f"error: conj fails in {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
