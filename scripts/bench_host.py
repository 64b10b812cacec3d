"""What the host does in a run beside the GPU's work: seconds and memory of stages 1 and 4, of tokens, and of training's start.

    python scripts/bench_host.py --tokenizer ../shared/data/qwen2-tokenizer --prompts-from ../shared/data/ultrafeedback/train_clean.jsonl \
        --judgments-from ../shared/data/llmbar_judge_outputs/*/*_CoT/result.json --num-prompts 80000 --out /tmp/host --json OUT

Prompts are UltraFeedback's, numbered so that no two are equal; each has 8 sampled judgments (4 right, 3 wrong, 1 unparsed)
and 2 hinted ones, of reasons that LLMBar's judges wrote: 5 pairs a prompt. Each stage is a process of its own; training's
starts (pairs as ids, plan of steps and packs, first batch) are under torchrun, with a base of one narrow layer and a
reference of zeros. On a busy machine the seconds of the CPU say more than the clock's. Memory is what a process has at
most, `peak` with mapped files and `anonymous` without; of both, some 260 MiB are this script's imports.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from bench_common import argument_parser, where_measured, write_rows
from make_random_model import write_random_model

from conj.data.files import dump_line
from conj.data.judges import judgment_text, load_judge
from conj.data.pairs import PairsOptions, build_pairs
from conj.data.preprocess import PreprocessOptions, load_prompts, preprocess
from conj.data.tokenizer import JudgeTokenizer
from conj.train import plan
from conj.train.batch import collate
from conj.train.options import DPOOptions
from conj.train.sharding import distributed
from conj.train.speed import resident_bytes

CARD = load_judge("con-j")
BASE = {"D": 16, "F": 32, "N": 2, "K": 1, "H": 8, "V": 151936, "L": 1, "tie": True}
VERDICTS = (1, 1, 1, 1, -1, -1, -1, 0)  # of the sampled judgments: right, wrong, unparsed


def write_data(path: Path, source: str, num_prompts: int) -> None:
    """Preference data of so many rows, no two of one question."""
    rows, _ = load_prompts([source])
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_prompts):
            row = rows[i % len(rows)]
            better, worse = (row[f"answer_{n}"] for n in (row["label"], 3 - row["label"]))
            question = [{"role": "user", "content": f"{i}: {row.get('question') or row['messages'][-1]['content']}"}]
            asked, other = ([*question, {"role": "assistant", "content": text}] for text in (better, worse))
            file.write(dump_line({"chosen": asked, "rejected": other}))


def write_judgments(run: Path, sources: list[Path], tokenizer_folder: Path, seed: int) -> None:
    """repeated.jsonl and hinted.jsonl, as stages 2 and 3 write them."""
    tokenizer, rng = JudgeTokenizer.load(tokenizer_folder), random.Random(seed)
    judged = [row["results"][0].values() for path in sources for row in json.loads(path.read_text("utf-8"))]
    reasons = sorted({side["completion"][0] for sides in judged for side in sides})
    made = {
        v: [(text, tokenizer.completion_ids(text)) for text in (judgment_text(CARD, r, v) for r in reasons)]
        for v in (1, 2)
    }
    made[None] = [(text[:-6], ids[:-4]) for text, ids in made[1]]  # cut off

    def row(id: str, kind: str, index: int, verdict: int | None) -> dict:
        text, ids = rng.choice(made[verdict])
        row = {"id": id, "kind": kind, "index": index, "text": text, "verdict": verdict, "rung": "strict"}
        return row | {"finish_reason": "stop", "token_ids": ids}

    with (
        open(run / "prompts.jsonl", encoding="utf-8") as prompts,
        open(run / "repeated.jsonl", "w", encoding="utf-8") as repeated,
        open(run / "hinted.jsonl", "w", encoding="utf-8") as hinted,
    ):
        for id, label in ((row["id"], row["label"]) for row in map(json.loads, prompts)):
            verdicts = {1: label, -1: 3 - label, 0: None}
            for index, verdict in enumerate(VERDICTS):
                repeated.write(dump_line(row(id, "repeated", index, verdicts[verdict])))
            hinted.write(dump_line(row(id, "hint", 0, label)))
            hinted.write(dump_line(row(id, "hint_reversed", 0, 3 - label)))


def start_training(options: DPOOptions) -> None:
    """Up to the first batch: what each rank does before it needs the model."""
    plan.load_reference = lambda path, key, num_pairs, **_: (torch.zeros(num_pairs, 2), [])
    with distributed("cpu") as world:
        made = plan.make_plan(options, world)
        collate(made.pairs, made.steps[0][0], made.reference)


def run_stage(stage: str, out: Path) -> None:
    """In this process, whose memory a thread looks at; writes `stage.rank.json`."""
    most, began, cpu = {"anonymous": 0}, time.perf_counter(), time.process_time()

    def watch() -> None:
        while True:
            most["anonymous"] = max(most["anonymous"], resident_bytes("RssAnon") or 0)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    run = out / "run"
    if stage == "preprocess":
        preprocess(PreprocessOptions(run_dir=run, data=(str(out / "data.jsonl"),)))
    elif stage == "pairs":
        build_pairs(PairsOptions(run_dir=run))
    else:
        start_training(DPOOptions(run_dir=run, model=out / "base", device="cpu", pack_multiple=8, report_to=()))
    found = most | {"peak": resident_bytes("VmHWM"), "seconds": time.perf_counter() - began}
    found["cpu_seconds"] = time.process_time() - cpu
    (out / f"{stage}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measure(stage: str, out: Path, ranks: int = 1) -> list[dict]:
    """What each rank of a stage took, imports of about 5 s aside."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    subprocess.run([sys.executable, *launch, __file__, "--stage", stage, "--out", str(out)], check=True)
    found = [json.loads((out / f"{stage}.{rank}.json").read_text()) for rank in range(ranks)]
    return [{"stage": stage, "ranks": ranks, "rank": rank, **row} for rank, row in enumerate(found)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for data and run; must be new")
    parser.add_argument("--tokenizer", type=Path, help="folder of Qwen2's tokenizer")
    parser.add_argument("--prompts-from", help="preference data")
    parser.add_argument("--judgments-from", type=Path, nargs="+", help="result.json of LLMBar's judges that reason")
    parser.add_argument("--num-prompts", type=int, default=80_000, help="prompts")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of training's starts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the judgments")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--stage", help="run one stage in this process: used by the script itself")
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage, args.out)
        return
    (args.out / "run").mkdir(parents=True)
    write_random_model(args.out / "base", args.tokenizer, BASE, dtype="bfloat16")
    write_data(args.out / "data.jsonl", args.prompts_from, args.num_prompts)
    rows = measure("preprocess", args.out)
    write_judgments(args.out / "run", args.judgments_from, args.tokenizer, args.seed)
    rows += measure("pairs", args.out)
    rows += measure("first_start", args.out, args.ranks)  # makes the tokens
    rows += measure("start", args.out, args.ranks)
    print("| stage | rank | seconds | of the CPU | anonymous, MiB | peak, MiB |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {stage} | {rank} of {ranks} | {seconds:.1f} | {cpu_seconds:.1f} | {anonymous} | {peak} |".format(
            **row | {name: row[name] // 2**20 for name in ("anonymous", "peak")}
        ))  # fmt: skip
    where = {"num_prompts": args.num_prompts, **where_measured("cpu")}
    write_rows(args.json, [row | where for row in rows])


if __name__ == "__main__":
    main()
