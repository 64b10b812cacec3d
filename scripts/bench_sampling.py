"""What the process that writes judgments takes by itself, with engines that write at once: memory, judgments a second, resume.

    python scripts/bench_sampling.py --prompts 80000 --samples 10 --engines 2 --json benchmarks/results/cpu/sampling.json

Prompts are made up, of about 1,470 tokens of the demo's tokenizer; a judgment has 200 tokens. Everything but the engine is
real: prompts are read and tokenized, go to Ray actors and come back, rows are written. The first process is killed with half
of the rows there; a second one goes on and ends the file. The peak is that process's own, engines aside.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_common import ROOT, argument_parser, where_measured, write_rows

from conj.data.files import write_jsonl
from conj.data.judges import judge_prompt, judgment_text, load_judge
from conj.data.preprocess import stream_prompts
from conj.data.prompts import question_of
from conj.data.verdicts import parse_strict
from conj.sample.engines.completion import Completion, Completions, Decoding, Request
from conj.sample.engines.fleet import complete_by_fleet
from conj.sample.engines.ray_cluster import running_ray
from conj.sample.repeated import RepeatedOptions
from conj.sample.stage import Task, append_samples

CARD = load_judge("con-j")
NUM_SEQS = 256
TOKEN_IDS = list(range(1000, 1200))


def write_prompts(path: Path, num_prompts: int, length: int) -> None:
    """`length`: of each answer, in characters."""
    words = random.Random(0)
    text = "".join(words.choices("天空是蓝色的回答一二三四山川湖海日月", k=length + 1000))

    def row(i: int) -> dict:
        start = words.randrange(1000)
        answers = {"answer_1": text[start : start + length], "answer_2": text[-start - length :][:length]}
        return {
            "id": f"{i:016x}",
            "question": f"问题{i}",
            **answers,
            "label": 1 + i % 2,
            "source": "made",
            "subset": "",
        }

    write_jsonl(path, map(row, range(num_prompts)))


def write_at_once(requests) -> Completions:
    """An engine without a model."""
    for request in requests:
        if request is None:
            return
        text = judgment_text(CARD, "因为" * 60 + str(request.key["index"]), 1 + request.key["index"] % 2)
        yield request, Completion(text=text, token_ids=TOKEN_IDS, finish_reason="stop")


@contextlib.contextmanager
def started() -> Iterator:
    yield write_at_once, NUM_SEQS


def complete(requests, count: int, options: RepeatedOptions) -> Completions:
    if options.num_engines is None:
        yield from write_at_once(requests)
        return
    with running_ray(options) as cluster:
        launch = functools.partial(cluster.launch, started)
        yield from complete_by_fleet(requests, count, launch, cluster.num_engines, cluster.num_places)


def drive(folder: Path, num_samples: int, num_engines: int, stop_at: int) -> None:
    """Writes the file, or dies with `stop_at` new rows in it; prints what that took."""
    began, times, lengths = time.monotonic(), [], []
    options = RepeatedOptions(
        run_dir=folder, model=ROOT / "demo" / "base", num_samples=num_samples, num_engines=num_engines or None
    )
    model = dataclasses.replace(options.read_model(), max_length=8192)
    keys = [{"kind": "repeated", "index": index} for index in range(num_samples)]

    def make_requests(row: dict) -> list[Request]:
        prompt = options.prompt(model, judge_prompt(CARD, question_of(row), row["answer_1"], row["answer_2"]))
        lengths.append(len(prompt["prompt_ids"]))
        return [Request(key={"id": row["id"], **key}, **prompt) for key in keys]

    def judge(request: Request, completion: Completion) -> dict:
        if len(times) == stop_at:
            say()
            os._exit(0)
        times.append(time.monotonic())
        verdict = parse_strict(completion.text)
        return {"text": completion.text, "verdict": verdict.value, "rung": verdict.rung}

    def say() -> None:
        print(json.dumps({
            "judgments": len(times), "seconds_to_first": times[0] - began, "seconds": times[-1] - times[0],
            "seconds_after_last": time.monotonic() - times[-1], "tokens_per_prompt": sum(lengths) / len(lengths),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }), flush=True)  # fmt: skip

    task = Task(
        prompts=lambda: stream_prompts(folder / "prompts.jsonl"), keys=keys, make_requests=make_requests, judge=judge
    )
    by_engines = functools.partial(complete, options=options)
    append_samples(folder / "repeated.jsonl", task, by_engines, model, Decoding(max_new_tokens=512))
    say()


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """One row: a process that dies half-way, and one that goes on."""
    write_prompts(folder / "prompts.jsonl", args.prompts, args.characters)
    total, found = args.prompts * args.samples, []
    for stop_at in (total // 2, total):
        line = [sys.executable, __file__, "--drive", folder, "--stop-at", stop_at, "--samples", args.samples]
        line += ["--engines", args.engines]
        done = subprocess.run(list(map(str, line)), stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    fresh, resumed = found
    if fresh["judgments"] + resumed["judgments"] != total:
        sys.exit(f"error: expected {total} judgments, found {fresh['judgments']} and {resumed['judgments']}")
    return {
        "prompts": args.prompts, "samples": args.samples, "engines": args.engines,
        "tokens_per_prompt": round(fresh["tokens_per_prompt"]), "file_gb": (folder / "repeated.jsonl").stat().st_size / 1e9,
        "peak_gb": {"fresh": fresh["peak_gb"], "resumed": resumed["peak_gb"]},
        "judgments_per_second": {name: side["judgments"] / side["seconds"] for name, side in (("fresh", fresh), ("resumed", resumed))},
        "seconds_to_first_judgment": {"fresh": fresh["seconds_to_first"], "resumed": resumed["seconds_to_first"]},
        "seconds_to_put_in_order": resumed["seconds_after_last"],
    }  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=80000, help="number of prompts")
    parser.add_argument("--samples", type=int, default=10, help="judgments a prompt")
    parser.add_argument("--characters", type=int, default=400, help="of each answer")
    parser.add_argument("--engines", type=int, default=2, help="Ray actors; 0: an engine in the process itself")
    parser.add_argument("--json", type=Path, help="file to write the row to")
    parser.add_argument("--drive", type=Path, help="only the process that writes, in this folder: a side of the above")
    parser.add_argument("--stop-at", type=int, help="rows after which it dies")
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.samples, args.engines, args.stop_at)
        return
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(Path(scratch), args) | where_measured("cpu")
    print(json.dumps(row, indent=1))
    write_rows(args.json, [row])


if __name__ == "__main__":
    main()
