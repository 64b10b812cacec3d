"""`scripts/gpu_suite.sh`: it keeps to its minutes, names what to carry, and what it starts can be imported there."""

import ast
import io
import json
import os
import subprocess
import sys
import time

import gpu_suite as suite
import kernel_problems
import pytest
from conftest import ROOT
from kill_common import descendants, is_alive

SUITE = ROOT / "scripts" / "gpu_suite.sh"
# On a machine made for PyTorch that has none of conj's requirements: what of its packages the suite's code imports.
MACHINE = {
    "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "tensorboard", "tqdm", "pytest", "jinja2",
    "huggingface_hub", "yaml",
}  # fmt: skip
OPTIONAL = {"flash_attn", "pyarrow", "sentencepiece"}  # looked for, or used for inputs that the suite has not


def run_suite(*options, **settings) -> subprocess.CompletedProcess:
    settings |= {"capture_output": True, "text": True, "env": os.environ | {"PYTHON": sys.executable}}
    return subprocess.run(["bash", SUITE, *map(str, options)], **settings)


# What travels


def test_help_names_every_phase_and_the_command_that_fetches_every_wheel():
    done = run_suite("--help")
    words = done.stdout.split()
    assert done.returncode == 0 and "pip download -d .wheels --no-deps" in done.stdout
    for name in (*suite.PHASES, *suite.ALIASES, *suite.WHEELS.values()):
        assert name in words or f"{name}," in words, name
    assert {"tests", "smoke", "logprob7b"} <= {*suite.PHASES, *suite.ALIASES}  # names that people were told


def imported_roots(path) -> set[str]:
    """Packages that a file imports at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        found.update(name.split(".")[0] for name in names)
    return found


def test_all_that_the_suite_imports_is_there_or_travels():
    """An import that fails in the second minute on a lent GPU costs the phase."""
    scripts = [
        "bench_common", "bench_kernels", "bench_steps", "bench_train", "bench_sides", "kernel_problems", "kill_common",
    ]  # fmt: skip
    files = [ROOT / "scripts" / f"{name}.py" for name in (*scripts, "train_killed", "make_random_model", "gpu_suite")]
    files += [ROOT / "tests" / f"{name}.py" for name in ("conftest", "test_gpu", "test_kernels", "test_logprob")]
    files += [path for part in ("data", "model", "train") for path in (ROOT / "conj" / part).glob("*.py")]
    local = {path.stem for path in (*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py"))}
    roots = set.union(*map(imported_roots, files)) - local - {"conj", "benchmarks"} - sys.stdlib_module_names
    assert {"torch", "trl", "datasets"} <= roots  # the walk sees what stands inside functions
    assert roots <= MACHINE | OPTIONAL | set(suite.WHEELS), roots - MACHINE - OPTIONAL - set(suite.WHEELS)
    assert {name: wheel.split("==")[0] for name, wheel in suite.WHEELS.items()}.items() >= kernel_problems.PEERS.items()
    for module, _ in (kernel_problems.LIGER, kernel_problems.CUT):
        assert module.split(".")[0] in suite.WHEELS


# Time


@pytest.mark.parametrize("minutes", [3, 8, 12, 30])
def test_phases_that_use_all_they_may_end_within_the_minutes(minutes):
    """And none of the default ones is left without time: of 3 and 8 minutes, each gets at least what it needs."""
    names, left = suite.default_phases(minutes), minutes * 60 - suite.SECONDS_TO_END
    for i, name in enumerate(names):
        seconds = suite.seconds_for(name, names[i + 1 :], left)
        assert suite.PHASES[name].least <= seconds <= left
        left -= seconds
    assert left == pytest.approx(0, abs=1e-6)


def test_time_that_a_phase_leaves_goes_to_the_later_ones_and_too_little_starts_none():
    names = suite.default_phases(8)
    slow, quick = (suite.seconds_for("logprob", names[2:], 475 - used) for used in (106, 20))
    assert quick > slow
    assert suite.seconds_for("train", [], suite.PHASES["train"].least - 1) is None
    assert suite.seconds_for("train", ["train-1.5b"], suite.PHASES["train"].least + 1) is None
    assert suite.seconds_for("train", [], 300) == 300  # alone, all there is


def test_a_phase_is_ended_with_all_below_it_when_its_time_is_up(tmp_path):
    """A process that stays would use the device of the next phase. What was printed is kept."""
    marker = tmp_path / "alive"
    below = f"while true; do touch {marker}; sleep 0.1; done"
    command = f"trap '' INT; echo started; ({below}) & wait"
    log, began = io.BytesIO(), time.monotonic()
    assert suite.run_phase(["bash", "-c", command], dict(os.environ), 1.0, log) == "cut off"
    assert time.monotonic() - began < 1 + suite.SECONDS_TO_END and log.getvalue() == b"started\n"
    marker.unlink()
    time.sleep(0.4)
    assert not marker.exists()


def test_asked_to_leave_it_takes_its_phase_along(tmp_path):
    """A suite that is stopped must not go on using the device from below."""
    line = [sys.executable, ROOT / "scripts" / "gpu_suite.py", "--device", "cpu", "--tiny", "--out", tmp_path, "resume"]
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.DEVNULL)
    log, below = tmp_path / "suite.txt", []
    while process.poll() is None and not (below and b"== resume" in log.read_bytes()):
        time.sleep(0.05)
        below = descendants(process.pid) if log.exists() else []
    process.terminate()
    assert below and process.wait(20) == 128 + 15
    deadline = time.monotonic() + 10  # what is killed takes a moment to be gone
    while any(is_alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in below)


@pytest.mark.parametrize("code, state", [(0, "passed"), (3, "failed")])
def test_a_phase_passes_by_its_exit_code(code, state):
    log = io.BytesIO()
    assert suite.run_phase(["bash", "-c", f"echo words; exit {code}"], dict(os.environ), 20, log) == state
    assert log.getvalue() == b"words\n"


def test_without_time_nothing_is_started_and_the_rows_say_so(tmp_path):
    done = run_suite("--minutes", 0.1, "--device", "cpu", "--tiny", "--out", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "suite.jsonl").read_text().splitlines()]
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "no time: tests, logprob7b, steps-full"
    assert [row["state"] for row in rows] == ["no time"] * 3 and "command" not in rows[0]


@pytest.mark.parametrize("options, named", [(["nosuch"], "nosuch"), (["--device", "cpu"], "--tiny")])
def test_what_cannot_run_is_refused_at_once(tmp_path, options, named):
    done = run_suite("--out", tmp_path, *options, cwd=tmp_path)
    assert done.returncode == 2 and named in done.stderr.splitlines()[-1]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi there
    with pytest.raises(SystemExit, match="error: --device: expected cuda with an NVIDIA GPU"):
        suite.name_of_device("cuda")


@pytest.mark.slow
def test_the_dry_run_of_eight_minutes_passes_every_phase_and_fits_what_comes_back(tmp_path):
    """Every command of the default phases, with its options, on a CPU. 8 files are what a lent machine sends back."""
    pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[dev]')")
    out, began = tmp_path / "out", time.monotonic()
    done = run_suite("--minutes", 8, "--device", "cpu", "--tiny", "--out", out, timeout=500)
    assert done.returncode == 0 and time.monotonic() - began < 480, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == "passed: tests, logprob, steps, resume, train"
    assert len(list(out.iterdir())) <= 8
    for name in ("logprob", "steps", "train"):
        for row in json.loads((out / f"{name}.json").read_text()):
            assert row["device"] and row["torch"] and row["commit"] and "error" not in row
    resumed = json.loads((out / "resume.json").read_text())
    assert resumed["audit"]["holds"] and resumed["metrics"][-1]["step"] == 4
