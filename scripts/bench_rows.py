"""Seconds and memory of stage 1 over many rows: reading, normalising, duplicates, and the questions of benchmarks.

    python scripts/bench_rows.py --rows-from ../shared/data/ultrafeedback/train_clean.jsonl \
        --benchmarks-from ../shared/data/llmbar/*.json ../shared/data/pandalm/testset-v1.json --json OUT

The rows are real ones repeated, each time with a seventh of the question's words changed; so are the benchmarks' questions.
Some rows come twice, some once more with the other answer preferred, and some ask a benchmark's question with one word
changed: how many of each must be left out is known, and compared. Each stage is a process of its own.
"""

import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import argument_parser, where_measured, write_rows

from conj.data.files import dump_line
from conj.data.manifest import read_manifest
from conj.data.overlap import SHORTEST
from conj.data.preprocess import load_prompts

PLANTED = {"excluded": 500, "duplicate": 1000, "contradiction": 1000}


def changed(text: str, rng: random.Random, share: float, number: int) -> str:
    """The text with a share of its words, one at least, replaced by words that stand nowhere else."""
    words = text.split(" ")
    for at in rng.sample(range(len(words)), max(1, int(share * len(words)))):
        words[at] = f"x{number}y{at}"
    return " ".join(words)


def texts_of(sources: list[str]) -> list[tuple[str, str, str]]:
    """Question, better and worse answer of each row."""
    rows, _ = load_prompts(sources)
    asked = [row.get("question") or row["messages"][-1]["content"] for row in rows]
    return [(text, row[f"answer_{row['label']}"], row[f"answer_{3 - row['label']}"]) for text, row in zip(asked, rows)]


def write_data(folder: Path, given, rng: random.Random) -> tuple[Path, Path]:
    """Training rows, and a benchmark of about as many questions as asked for."""
    asked = texts_of(given.benchmarks_from)
    turns = zip(range(given.num_questions), itertools.cycle(asked))
    asked = [(changed(text, rng, 1 / 3, number), better, worse) for number, (text, better, worse) in turns]
    number_made = given.num_rows - sum(PLANTED.values()) + PLANTED["contradiction"] // 2
    turns = zip(range(number_made), itertools.cycle(texts_of(given.rows_from)))
    rows = [(changed(text, rng, 1 / 7, number), better, worse) for number, (text, better, worse) in turns]
    again = rng.sample(rows, PLANTED["duplicate"] + PLANTED["contradiction"] // 2)
    other = [(text, worse, better) for text, better, worse in again[PLANTED["duplicate"] :]]
    usual = [row for row in asked if len(row[0].split(" ")) > SHORTEST]
    copies = [
        (changed(text, rng, 0, 0), better, worse) for text, better, worse in rng.sample(usual, PLANTED["excluded"])
    ]
    rows += (
        [
            (f"\n{text.upper() if text.isascii() else text} ", better, worse)
            for text, better, worse in again[: PLANTED["duplicate"]]
        ]
        + other
        + copies
    )
    rng.shuffle(rows)
    for name, made in ("rows.jsonl", rows), ("benchmark.jsonl", asked):
        with open(folder / name, "w", encoding="utf-8") as file:
            file.writelines(dump_line({"prompt": text, "chosen": a, "rejected": b}) for text, a, b in made)
    return folder / "rows.jsonl", folder / "benchmark.jsonl"


def measure(run: Path, *options) -> dict:
    """The stage in a process of its own: wall and CPU seconds, and the memory it has at most."""
    code = (  # what Linux says of a child by rusage may be of the process that started it
        "import re, sys; from conj.data.preprocess import *; run_command(preprocess, PreprocessOptions, None); "
        "print(*re.findall(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()), file=sys.stderr)"
    )
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-c", code, "--run-dir", run, *options]
    said = subprocess.run(line, check=True, stderr=subprocess.PIPE, text=True).stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    made, seconds = read_manifest(run / "prompts.jsonl"), time.monotonic() - began
    peak_bytes = int(said.splitlines()[-1]) * 1024
    used = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}
    return used | {"num_rows": made["num_rows"], **made["counts"]}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows-from", nargs="+", required=True, help="preference data")
    parser.add_argument("--benchmarks-from", nargs="+", required=True, help="preference data to leave out")
    parser.add_argument("--num-rows", type=int, default=80_000)
    parser.add_argument("--num-questions", type=int, default=3_000, help="of the benchmark")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        rows, benchmark = write_data(Path(folder), given, random.Random(given.seed))
        sizes = {"characters": len(rows.read_text("utf-8")), "num_questions": given.num_questions}
        for name, options in ("without", ()), ("with", ("--exclude", benchmark)):
            found = measure(Path(folder, name), "--data", rows, *options)
            measured.append({"exclude": bool(options), **sizes, **found, **where_measured("cpu")})
            print(json.dumps(measured[-1]))
    write_rows(given.json, measured)
    left_out = {name: measured[-1].get(f"left_out_{name}", 0) for name in PLANTED}
    if any(left_out[name] < number for name, number in PLANTED.items()):
        sys.exit(f"expected to be left out at least {PLANTED}, found {left_out}")


if __name__ == "__main__":
    main()
