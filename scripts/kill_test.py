"""Kills stages at random moments and checks that each, started again, ends as one that was left alone.

    python scripts/kill_test.py train --kills 50 --inside-save 20 --out /tmp/kills    # training on 2 ranks, 15 minutes
    python scripts/kill_test.py sample --kills 20 --out /tmp/kills                    # stages 2, 3 and 7, 15 minutes
    python scripts/kill_test.py pipeline --minutes 60 --out /tmp/kills                # all seven stages by `conj run`

In which phase a kill landed is read off what it left on disk, beside a listing made before the command was started.
Writes train.json, sample.json or pipeline.json, prints a table, exits 1 if anything differs.
"""

import argparse
import contextlib
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from kill_common import ROOT, Aim, kill_often, listing, mark, num_lines, report, run_command, step_folders, write_pairs

from conj.data.files import read_jsonl
from conj.data.judges import judgment_text, load_judge

CARD = load_judge("con-j")
KEEP_CHECKPOINTS = 2
INSIDE_SAVE = ("shards", "manifest and rename", "deletion")


# ---- Training ----


def training_phase(before: dict[str, tuple], run: Path) -> str:
    """What training was doing when it was killed."""
    after = listing(run)
    new = {name for name, mark in after.items() if before.get(name) != mark}
    if any(re.match(r"model(\.part)?(/|$)", name) for name in new):
        return "export"
    if parts := [name for name in new if re.match(r"checkpoints/.*\.part", name)]:
        return "manifest and rename" if any("/manifest.json" in name for name in parts) else "shards"
    steps = sorted(p.name for p in step_folders(run))
    if len(steps) > KEEP_CHECKPOINTS and f"checkpoints/{steps[-1]}" in new:
        return "deletion"
    return "step" if "metrics.jsonl" in new else "loading"


def save_aim(run: Path, number: int, file: str, delay: float) -> Aim:
    """The `number`-th save from now on, once it holds a file whose name starts with `file`."""
    before, seen = listing(run), set()

    def ready(_: float) -> bool:
        writing = False
        for path in run.glob("checkpoints/*.part"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if before.get(f"checkpoints/{path.name}") != mark(path):  # else an earlier kill left it
                    writing = any(p.name.startswith(file) for p in path.iterdir()) or not file
                    seen.update([path.name] if writing else [])
        return writing and len(seen) >= number

    return Aim(ready=ready, delay=delay, poll=0.0003)


def kill_training(args: argparse.Namespace, out: Path) -> list[dict]:
    rng, base, undisturbed = random.Random(args.seed), ROOT / "demo" / "base", out / "undisturbed-run"

    def random_words(_: str, verdict: int) -> str:
        return judgment_text(CARD, "".join(rng.choices("天空是蓝色的回答一二三", k=rng.randint(4, 30))), verdict)

    write_pairs(out / "start" / "pairs.jsonl", 60, rng, each=4, write=random_words)
    shared = ["--model", base, "--device", args.device, "--dtype", "float32", "--max-tokens-per-pack", "2000"]
    run_command([sys.executable, "-m", "conj.train.reference", "--run-dir", out / "start", *shared], out / "log")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    options = [*shared, "--learning-rate", "1e-3", "--pairs-per-step", "6", "--eval-steps", "10"]
    options += ["--save-every", "2", "--keep-checkpoints", KEEP_CHECKPOINTS]

    def line(run: Path) -> list:
        return [*launch, "-m", "conj.train.dpo", "--run-dir", run, *options]

    shutil.copytree(out / "start", undisturbed)
    loading = []  # when the log of metrics was there
    watch = Aim(ready=lambda s: (undisturbed / "metrics.jsonl").exists() and loading.append(s))  # never kills
    run_command(line(undisturbed), out / "log", watch)
    num_steps = num_lines(undisturbed / "metrics.jsonl")
    print(f"undisturbed: {num_steps} steps, first one after {loading[0]:.1f} s", flush=True)

    def next_aim(run: Path, kills: Counter) -> Aim | None:
        left, inside = args.kills - kills.total(), sum(kills[phase] for phase in INSIDE_SAVE)
        if left <= 0 and inside >= args.inside_save:
            return None
        kinds = ["save", "commit"] + ["loading", "step", "export"] * (args.inside_save - inside < left)
        match kind := rng.choice(kinds):
            case "save" | "commit":  # files are written for about 20 ms; the rest, renaming and deleting, takes 3
                file, longest = ("", 0.03) if kind == "save" else ("manifest.json", 0.004)
                return save_aim(run, rng.randint(1, 4), file, rng.uniform(0, longest))
            case "loading":
                moment = rng.uniform(0, loading[0])
                return Aim(ready=lambda seconds: seconds >= moment)
            case "export":
                return Aim(ready=lambda _: (run / "model.part").exists(), delay=rng.uniform(0, 0.05), poll=0.001)
        path, steps = run / "metrics.jsonl", num_lines(run / "metrics.jsonl") + rng.randint(1, 12)
        return Aim(ready=lambda _: num_lines(path) >= steps, delay=rng.uniform(0, 0.2))

    return kill_often("run", out, line, training_phase, next_aim)


# ---- Sampling ----


def kill_sampling(args: argparse.Namespace, out: Path) -> list[dict]:
    train, test = (ROOT / "demo" / f"{name}.jsonl" for name in ("train", "test"))
    few = ["--limit", args.limit]
    prepare = [sys.executable, "-m", "conj.data.preprocess", "--run-dir", out / "start", "--data", train, *few]
    run_command(prepare, out / "log")
    stages = {"repeated": ("repeated.jsonl", 8, []), "hinted": ("hinted.jsonl", 2, [])}
    stages["evaluate"] = ("judgments_base.jsonl", 2, ["--data", test, *few])
    rows = []
    for number, (stage, (artefact, per_prompt, options)) in enumerate(stages.items()):
        kills, seed = len(range(number, args.kills, 3)), f"{args.seed} {stage}"
        rows += kill_stage(stage, artefact, per_prompt * args.limit, kills, options, seed, out)
    return rows


def kill_stage(stage: str, artefact: str, total: int, kills: int, options: list, seed: str, out: Path) -> list[dict]:
    """Kills a stage that writes `total` rows to `artefact`; see kill_often."""
    began, rng, undisturbed = time.monotonic(), random.Random(seed), out / f"undisturbed-{stage}"
    few = ["--max-new-tokens", "64", "--max-num-seqs", "8"]  # at the same time: rows come one by one

    def line(run: Path) -> list:
        model = ["--model", ROOT / "demo" / "base"]
        return [sys.executable, "-m", "conj", stage, "--run-dir", run, *model, *few, *options]

    shutil.copytree(out / "start", undisturbed)
    run_command(line(undisturbed), out / "log")
    names = ("id", "kind", "index", "order")
    keys = {tuple(map(row.get, names)) for row in read_jsonl(undisturbed / artefact)}
    if not len(keys) == num_lines(undisturbed / artefact) == total:
        sys.exit(f"{undisturbed / artefact}: {len(keys)} different keys, expected one a row and {total} rows")
    print(f"{stage}: undisturbed {time.monotonic() - began:.0f} s, {total} rows", flush=True)

    def phase(before: dict, run: Path) -> str:
        is_touched = listing(run).get(artefact) != before.get(artefact)
        return f"{stage}: {'end' if num_lines(run / artefact) == total else 'rows' if is_touched else 'start-up'}"

    def next_aim(run: Path, killed: Counter) -> Aim | None:
        left, have = kills - killed.total(), num_lines(run / artefact)
        if left <= 0:
            return None
        if left == 1:  # all rows are there; they are put in order, the manifest is closed
            return Aim(ready=lambda _: num_lines(run / artefact) == total, delay=rng.uniform(0, 0.5), poll=0.002)
        if rng.random() < 0.25:
            moment = rng.uniform(0, 15)
            return Aim(ready=lambda seconds: seconds >= moment)
        wanted = have + rng.randint(1, max(1, (total - have) // 2))
        return Aim(ready=lambda _: num_lines(run / artefact) >= wanted, poll=0.005)

    return kill_often(stage, out, line, phase, next_aim)


# ---- All stages ----


def kill_pipeline(args: argparse.Namespace, out: Path) -> list[dict]:
    """The demo, small, killed after a random number of seconds again and again until the minutes are over."""
    rng, settings, log = random.Random(args.seed), out / "small.toml", out / "log"
    settings.write_text(
        "[preprocess]\nlimit = 48\n[reference]\nsave_every = 1\n[evaluate]\nlimit = 24\nnum_resamples = 100\n"
        "[dpo]\nnum_train_epochs = 4\npairs_per_step = 6\nsave_every = 2\n"
    )
    (out / "start").mkdir()

    def line(run: Path) -> list:
        options = ["--run-dir", run, "--nproc-per-node", args.ranks, "--device", args.device]
        return [sys.executable, "-m", "conj", "run", ROOT / "demo" / "demo.toml", settings, *options]

    run_command(line(out / "undisturbed-pipeline"), log)
    end = time.monotonic() + 60 * args.minutes

    def phase(before: dict, run: Path) -> str:
        return re.findall(r"^== (\w+):|^== .*", log.read_text("utf-8"), re.MULTILINE)[-1] or "start"

    def next_aim(run: Path, kills: Counter) -> Aim | None:
        moment = rng.uniform(1, args.longest)
        return Aim(ready=lambda seconds: seconds >= moment) if time.monotonic() < end else None

    return kill_often("pipeline", out, line, phase, next_aim)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="what", required=True)
    for name, kills in ("train", 50), ("sample", 20), ("pipeline", None):
        sub = parsers.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if kills:
            sub.add_argument("--kills", type=int, default=kills, help="number of kills")
        else:
            sub.add_argument("--minutes", type=float, required=True, help="when to stop; a run folder is then finished")
            sub.add_argument("--longest", type=float, default=90, help="most seconds until a kill")
        sub.add_argument("--out", type=Path, required=True, help="folder for the runs, their log and the figures")
        sub.add_argument("--seed", type=int, default=0, help="seed of the moments")
        if name == "train":
            sub.add_argument("--inside-save", type=int, default=20, help="kills that must land inside a save")
        if name != "sample":
            sub.add_argument("--ranks", type=int, default=2, help="number of processes")
            sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each process")
        else:
            sub.add_argument("--limit", type=int, default=40, help="number of prompts")
    args = parser.parse_args()
    began, out = time.monotonic(), args.out.resolve() / args.what
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = {"train": kill_training, "sample": kill_sampling, "pipeline": kill_pipeline}[args.what](args, out)
    return report(out, rows, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
