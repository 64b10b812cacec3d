"""Commands that are killed at a moment, and what two runs must agree on: for kill_test.py.

A kill freezes and then SIGKILLs every process below the command (torchrun gives its workers sessions of their own).
One folder is killed several times in succession, then run to its end and compared; then comes a fresh one.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from conj.data.files import read_jsonl, write_jsonl
from conj.data.judges import judge_prompt, judgment_text, load_judge
from conj.data.manifest import describe_code, hash_input
from conj.train.log import TIMES

CARD = load_judge("con-j")
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
ARTEFACTS = ("prompts.jsonl", "repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "reference.safetensors", "model")
ARTEFACTS += ("judgments_base.jsonl", "judgments_trained.jsonl", "report.json")
KILLS_PER_FOLDER = 8


# ---- Data ----


def pair_of(preference: dict, label: int, write: Callable[[str, int], str] = judgment_text) -> dict:
    """A row of pairs.jsonl, but for id and split; its judgments are `write(the better answer, verdict)`."""
    answers = [preference["chosen"], preference["rejected"]][:: 1 if label == 1 else -1]
    texts = [write(preference["chosen"], verdict) for verdict in (label, 3 - label)]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
    row = {"prompt": judge_prompt(CARD, preference["prompt"], *answers), "chosen": chosen, "rejected": rejected}
    return row | {"label": label, "pair_type": "repeated"}


def write_pairs(path: Path, num_prompts: int, rng: random.Random, each: int = 1, write=judgment_text) -> None:
    """`each` pairs of the demo's first preferences; one prompt in ten is held out."""
    rows = []
    for i, preference in enumerate(read_jsonl(ROOT / "demo" / "train.jsonl")[:num_prompts]):
        label, more = rng.choice((1, 2)), {"id": f"{i:04}", "split": "train" if i % 10 else "eval"}
        rows += [more | pair_of(preference, label, write) for _ in range(each)]
    write_jsonl(path, rows)


# ---- Processes ----


@dataclass(frozen=True, kw_only=True)
class Aim:
    """When to kill: `delay` seconds after `ready(seconds since the start)` first holds, looked at every `poll` seconds."""

    ready: Callable[[float], bool]
    delay: float = 0.0
    poll: float = 0.02


def descendants(root: int) -> list[int]:
    """Ids of the living processes below `root`, parents first."""
    children = defaultdict(list)
    for entry in os.listdir("/proc"):
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # not a process, or it has just ended
            continue
        if entry.isdigit() and state != "Z":
            children[int(parent)].append(int(entry))
    found = [root]
    for pid in found:
        found += children[pid]
    return found[1:]


def kill_tree(process: subprocess.Popen, known: list[int]) -> None:
    """Ends a command and all below it at one moment, `known` ones first, and waits until they are gone."""
    frozen: list[int] = []
    new = [*known, process.pid]
    while new:  # what is frozen starts no other process
        send(new, signal.SIGSTOP)
        frozen += new
        new = [pid for pid in descendants(process.pid) if pid not in frozen]
    send(frozen, signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in frozen):
        time.sleep(0.01)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def run_command(line: list, log: Path, aim: Aim | None = None) -> bool:
    """Runs a command until it ends, or until `aim`. Returns whether it was killed; leaves if it failed by itself."""
    with open(log, "a") as file:
        file.write(f"\n== {' '.join(map(str, line))}\n")
        file.flush()
        process = subprocess.Popen(
            list(map(str, line)), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    started, listed, known = time.monotonic(), 0.0, []
    while process.poll() is None:
        seconds = time.monotonic() - started
        if seconds - listed > 0.1:  # so that a kill need not look for its victims first
            listed, known = seconds, descendants(process.pid)
        if aim is not None and aim.ready(seconds):
            time.sleep(aim.delay)
            if process.poll() is None:
                kill_tree(process, known)
                return True
        time.sleep(aim.poll if aim else 0.1)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}, not by a kill: {' '.join(map(str, line))}; see {log}")
    return False


# ---- What two runs must agree on ----


def contents(run: Path) -> dict[str, object]:
    """What a finished run must hold: hashes of its artefacts, tensors of its last checkpoint, metrics, names of files."""
    found = {name: hash_input(run / name) for name in ARTEFACTS if (run / name).exists()}
    if (run / "metrics.jsonl").exists():
        rows = read_jsonl(run / "metrics.jsonl")
        found["metrics.jsonl"] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    for file in sorted(max(step_folders(run), default=run).glob("rank-*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.parent.name}/{file.name}: {name}"] = (tensor.shape, tensor.tobytes())
    names = (p.relative_to(run).as_posix() for p in run.rglob("*"))
    found["names of files"] = sorted(n for n in names if not re.match(r"tensorboard/|.*\.log$", n))
    return found


def step_folders(run: Path) -> list[Path]:
    return [p for p in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d{8}", p.name)]


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What is not equal in two runs, one line each."""
    found, expected = contents(run), contents(undisturbed)
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    lines = [f"{run}: {name} differs" for name in names]
    if "names of files" in names:
        extra = sorted(set(found["names of files"]) ^ set(expected["names of files"]))
        lines.append(f"{run}: only in one of the two: {', '.join(extra[:10])}")
    return lines


# ---- Killing in succession ----


def mark(path: Path) -> tuple[int, int]:
    """Changes when a file is written anew, or a folder's entries."""
    return path.stat().st_ino, path.stat().st_ctime_ns


def listing(run: Path) -> dict[str, tuple[int, int]]:
    return {p.relative_to(run).as_posix(): mark(p) for p in run.rglob("*")}


def kill_often(
    name: str, out: Path, line: Callable[[Path], list], phase: Callable[[dict, Path], str],
    next_aim: Callable[[Path, Counter], Aim | None],
) -> list[dict]:  # fmt: skip
    """Kills the command `line(run folder)` until `next_aim(run folder, kills by phase)` is None, in copies of
    `out/start` that must end as `out/undisturbed-NAME`. `phase` says what a kill hit, from a listing made before the
    command and the folder after. Returns a row for each run folder."""
    rows, totals, aim = [], Counter(), None
    while True:
        run = out / f"{name}-{len(rows)}"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(out / "start", run)
        kills, began = [], time.monotonic()
        while (aim := next_aim(run, totals)) is not None and len(kills) < KILLS_PER_FOLDER:
            before = listing(run)
            if not run_command(line(run), out / "log", aim):
                break  # it ended first
            kills.append(phase(before, run))
            totals[kills[-1]] += 1
            print(f"{run.name}: kill {totals.total()}: {kills[-1]}", flush=True)
        run_command(line(run), out / "log")
        different = differences(run, out / f"undisturbed-{name}")
        seconds = round(time.monotonic() - began, 1)
        rows.append({"run": run.name, "kills": kills, "differences": different, "seconds": seconds})
        print(f"{run.name}: {len(kills)} kills, {seconds} s: {'; '.join(different) or 'equal'}", flush=True)
        if aim is None or len(rows) > 100:
            return rows
        if not different:
            shutil.rmtree(run)


def report(out: Path, rows: list[dict], seconds: float) -> int:
    """Writes the JSON, prints the table; 1 if a run ended otherwise than the undisturbed one."""
    kills, equal = Counter(), Counter()
    for row in rows:
        kills.update(row["kills"])
        equal.update([] if row["differences"] else row["kills"])
    result = {"kills": dict(kills), "equal": dict(equal), "runs": rows, "seconds": round(seconds, 1), **describe_code()}
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n| killed in | kills | ended equal |\n|---|---|---|")
    for phase, count in [*sorted(kills.items()), ("all", kills.total())]:
        print(f"| {phase} | {count} | {equal[phase] if phase != 'all' else equal.total()} |")
    print(f"\n{len(rows)} run folders, {seconds:.0f} s")
    return int(any(row["differences"] for row in rows))


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
