"""All that needs one NVIDIA GPU, the most telling first, in the minutes that it may have.

    scripts/gpu_suite.sh --minutes 8 --out results                     # tests, logprob, steps, resume, train
    scripts/gpu_suite.sh --minutes 3 --out results                     # tests, one shape of logprob, one row of steps
    scripts/gpu_suite.sh --out results tests smoke                     # some phases, by name
    scripts/gpu_suite.sh --device cpu --tiny --out /tmp/dry-run        # the same commands, tiny, where there is no GPU

A phase gets its share of the time that is left, what earlier ones did not use included; it is not started with less than
it needs to show anything, and is ended when its time is up. Nothing runs past --minutes. Results are written as they are
measured, so what is there when it ends, or is killed, is whole: suite.txt (all output), suite.jsonl (a row a phase),
logprob.json, steps.json, steps.trace.json.gz, resume.json, train.json. Exit code 0 if every phase passed.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 5.0  # of the whole: to end what runs, and for the last lines
# What a machine with torch, triton, transformers, accelerate, pandas, pyarrow and pytest still lacks: module -> wheel.
# Pure Python, 5 MB together, checked with --no-deps.
WHEELS = {
    "trl": "trl==1.16.0", "datasets": "datasets==5.2.0", "dill": "dill==0.4.1", "multiprocess": "multiprocess==0.70.19",
    "liger_kernel": "liger-kernel==0.8.5",
    "cut_cross_entropy": "cut-cross-entropy==25.1.1",
    "cyclopts": "cyclopts==5.5.2", "attr": "attrs==26.1.0", "docstring_parser": "docstring-parser==0.18.0", "rich": "rich==15.0.0",
    "rich_rst": "rich-rst==2.2.0", "pygments": "pygments==2.21.0", "markdown_it": "markdown-it-py==4.3.0", "mdurl": "mdurl==0.1.2",
    "tomli_w": "tomli-w==1.2.0",
}  # fmt: skip
CARRY = f"""what a machine without a network lacks travels as wheels in .wheels (git ignores it), made elsewhere:

  pip download -d .wheels --no-deps --only-binary=:all: --python-version 3.12 \\
      {" ".join(list(WHEELS.values())[:4])} \\
      {" ".join(list(WHEELS.values())[4:])}
  git describe --always --dirty --abbrev=7 > .wheels/commit

The second line is for rows that say of which commit they are, where no .git travels. Wheels are used from where they
lie, nothing is installed. A peer that is missing is named, and the others run."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the commands of the phases depend on."""

    device: str
    tiny: bool
    out: Path
    packages: frozenset[str]  # modules that are here, of those in OPTIONAL
    seconds: float = 0.0  # that this phase may take

    def script(self, name: str, *options: object) -> list:
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        return [sys.executable, f"scripts/{name}.py", "--device", self.device, "--dtype", dtype, *options]


OPTIONAL = (*WHEELS, "xdist", "pytest_timeout")


def tests(s: Setup) -> list:
    line = [sys.executable, "-m", "pytest", "-vv", "-rfE", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    line += ["tests/test_logprob.py"]
    if s.tiny:
        return line
    # slow ones too: offsets past 2^31. Most of the time is compilation, which other processes share.
    line += ["tests/test_kernels.py", "-m", ""]
    line += ["-n", 4] if "xdist" in s.packages else []
    return line + (["--timeout", 90] if "pytest_timeout" in s.packages else [])


def kernels(s: Setup, name: str, operations: list[str], models: list[str], tokens: int) -> list:
    size = ["--tiny"] if s.tiny else ["--models", *models, "--tokens", tokens, "--seconds", 0.3]
    return s.script("bench_kernels", "--only", *operations, "--modes", "both", *size, "--json", s.out / name)


def steps(s: Setup, *options: object) -> list:
    files = ["--json", s.out / "steps.json", "--trace", s.out / "steps.trace.json.gz"]
    return s.script("bench_steps", *options, *files, "--budget", int(s.seconds), *(["--tiny"] if s.tiny else []))


def resume(s: Setup) -> list:
    size = ["--prompts", 60, "--max-steps", 4] if s.tiny else []
    return s.script("train_killed", *size, "--json", s.out / "resume.json")


def train(s: Setup, name: str, geometry: str, shares: list[str]) -> list:
    """conj beside TRL on the same pairs, prompts and judgments as long as Con-J's."""
    size = ["--geometry", geometry, "--prompts", 18, "--prompt-tokens", 600, 2400, "--judgment-tokens", 100, 400]
    size += ["--pairs-per-step", 24, "--steps", 3, "--rounds", 1, "--batch-sizes", 4]
    if s.tiny:
        size = ["--geometry", "1M", "--prompts", 4, "--pairs-per-prompt", 2, "--pairs-per-step", 4, "--steps", 2]
        size += ["--rounds", 1, "--batch-sizes", 4, "--any-load", "--logits", "as-is"]
        shares = shares[:1]
    peer = "trl" if {"trl", "datasets"} <= s.packages else "none"
    return s.script("bench_train", *size, "--share", *shares, "--peer", peer, "--json", s.out / name)


@dataclass(frozen=True)
class Phase:
    about: str
    share: float  # of the time, beside the shares of the others
    least: float  # seconds that show something
    line: Callable[[Setup], list]


BLOCK = ["selected_logprob", "add_rms_norm", "rope", "swiglu", "gather_rows"]
PHASES = {
    "tests": Phase("what only a GPU can show; the kernels on the real compiler; offsets past 2^31", 120, 25, tests),
    "logprob": Phase(
        "linear_logprob, forward + backward, at the widths of 7B, 0.5B and 72B beside its peers, with fp64 errors",
        100, 25, lambda s: kernels(s, "logprob.json", ["linear_logprob"], ["7B", "0.5B", "72B"], 8192)),
    "logprob7b": Phase("the same at the width of 7B alone",
        50, 20, lambda s: kernels(s, "logprob.json", ["linear_logprob"], ["7B"], 8192)),
    "steps": Phase("training steps of 7B's width, with each kind of activation checkpointing, and a profile of one",
        110, 30, steps),
    "steps-full": Phase("the same with full activation checkpointing alone",
        75, 30, lambda s: steps(s, "--recompute", "full")),
    "resume": Phase("train, kill, start anew, audit, compare", 70, 35, resume),
    "train": Phase("conj, --share prompt and pair, beside TRL's default and best settings, at 0.5B",
        140, 50, lambda s: train(s, "train.json", "qwen2-0.5b", ["prompt", "pair"])),
    "train-1.5b": Phase("the same at 1.5B, --share prompt",
        140, 90, lambda s: train(s, "train-1.5b.json", "qwen2-1.5b", ["prompt"])),
    "block": Phase("norm, RoPE, SwiGLU, gathers and logprobs of given logits beside torch",
        60, 20, lambda s: kernels(s, "block.json", BLOCK, ["7B"], 16384)),
}  # fmt: skip
ALIASES = {"smoke": "resume"}


def default_phases(minutes: float) -> list[str]:
    """The most telling first; training beside the peer last, which can use all that is left."""
    if minutes < 6:
        return ["tests", "logprob7b", "steps-full"]
    return ["tests", "logprob", "steps", "resume", "train", *(["train-1.5b", "block"] if minutes >= 12 else [])]


def seconds_for(phase: str, later: list[str], seconds_left: float) -> float | None:
    """What a phase may take of the time left, before the `later` ones; None if that is too little to start it."""
    seconds = seconds_left * (PHASES[phase].share / sum(PHASES[name].share for name in (phase, *later)))
    return seconds if seconds >= PHASES[phase].least else None


def run_phase(line: list, environment: dict, seconds: float, log) -> str:
    """Runs a command, its output to stdout and `log`; says whether it passed, failed or was cut off."""
    process = subprocess.Popen(
        list(map(str, line)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip

    def copy_output() -> None:
        while piece := process.stdout.read1():
            log.write(piece)
            log.flush()
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()

    copier = Thread(target=copy_output, daemon=True)
    copier.start()
    state = "cut off"
    try:
        state = "failed" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what failed so far
            process.wait(SECONDS_TO_END / 2)
    finally:
        with suppress(ProcessLookupError):  # whatever a phase leaves behind would use the next one's device
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copier.join(1)
    return state


def environment_of(device: str, site: str) -> dict:
    """For every phase. Wheels before what is installed; one process of Inductor's, as few kernels are compiled."""
    environment = os.environ | {
        "PYTHONPATH": f"{site}:{ROOT}", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "10",
        "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def name_of_device(device: str) -> str:
    """With memory and driver, and without torch, whose import takes seconds. Leaves if there is no GPU."""
    if device == "cpu":
        return "cpu"
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    sys.exit("error: --device: expected cuda with an NVIDIA GPU, found none (nvidia-smi); --device cpu --tiny dry-runs")


def parse() -> argparse.Namespace:
    phases = "\n".join(f"  {name:11} {phase.about}" for name, phase in PHASES.items())
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"phases ({aliases}):\n{phases}\n\n{CARRY}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("phases", nargs="*", metavar="phase", help="by default those that fit --minutes, in order")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few seconds, to try the commands")
    args = parser.parse_args()
    args.phases = [ALIASES.get(name, name) for name in args.phases] or default_phases(args.minutes)
    if unknown := [name for name in args.phases if name not in PHASES]:
        parser.error(f"phase: expected some of {', '.join((*PHASES, *ALIASES))}, found {unknown[0]}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: expected --tiny beside it: 7B's width is for a GPU")
    return args


def main() -> int:
    args, deadline = parse(), time.monotonic()
    deadline += args.minutes * 60 - SECONDS_TO_END
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and with it what runs
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-") as site, open(args.out / "suite.txt", "ab") as log:
        for wheel in sorted((ROOT / ".wheels").glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(site)  # pure Python: nothing to install
        sys.path[:0] = [site, str(ROOT)]
        from conj.data.manifest import describe_code

        packages = frozenset(name for name in OPTIONAL if importlib.util.find_spec(name))
        setup = {"device": args.device, "tiny": args.tiny, "out": args.out.resolve(), "packages": packages}
        missing = [wheel for name, wheel in WHEELS.items() if name not in packages]
        where = {"device": name_of_device(args.device), **describe_code(), "missing": missing}

        def say(line: str) -> None:
            log.write(f"{line}\n".encode())
            log.flush()
            print(line, flush=True)

        say(f"{where['device']}; missing: {', '.join(missing) or 'nothing'}")
        states: dict[str, str] = {}
        for i, name in enumerate(args.phases):
            seconds_left = deadline - time.monotonic()
            seconds = seconds_for(name, args.phases[i + 1 :], seconds_left)
            row = {"phase": name, "minutes": args.minutes, "tiny": args.tiny, "seconds_allowed": seconds}
            if seconds is None:
                states[name] = "no time"
            else:
                line = PHASES[name].line(Setup(**setup, seconds=seconds))
                say(f"\n== {name}: up to {seconds:.0f} of the {seconds_left:.0f} s left\n{shlex.join(map(str, line))}")
                started = time.monotonic()
                states[name] = run_phase(line, environment_of(args.device, site), seconds, log)
                row |= {"seconds": round(time.monotonic() - started, 1), "command": shlex.join(map(str, line))}
                say(f"== {name}: {states[name]} after {row['seconds']} s")
            with open(args.out / "suite.jsonl", "a") as rows:
                rows.write(json.dumps(row | {"state": states[name]} | where, default=str) + "\n")
        say("")
        for state in ("passed", "failed", "cut off", "no time"):
            if names := [name for name in states if states[name] == state]:
                say(f"{state}: {', '.join(names)}")
    return int(set(states.values()) != {"passed"})


if __name__ == "__main__":
    sys.exit(main())
