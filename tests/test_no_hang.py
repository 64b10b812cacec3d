"""A rank that fails takes the others with it, soon and with one cause; SIGTERM saves; torchrun's restart goes on."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ENV, ROOT, num_lines, random_pairs
from safetensors.torch import load_file
from test_dpo import ARGUMENTS, make_reference, metrics_of

from conj.data.files import write_jsonl
from conj.train.checkpoint import list_checkpoints

MOST_SECONDS = 30
TRAIN = [*ARGUMENTS, "--num-train-epochs", "2", "--max-steps", "8"]
FAULTS = [("exception", "step", 1), ("kill", "step", 0), ("disk", "save", 1)]
MORE_FAULTS = [
    (fault, phase, rank)
    for fault in ("exception", "kill", "disk")
    for phase in ("load", "step", "save", "export")
    for rank in (0, 1)
    if (fault, phase, rank) not in FAULTS
]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tied_model):
    """A run folder that is ready for training, and its base."""
    run = tmp_path_factory.mktemp("start") / "run"
    write_jsonl(run / "pairs.jsonl", random_pairs(30))
    make_reference(run, tied_model)
    return run, tied_model


def torchrun(run, base, *script, restarts: int = 0, save_every: int = 2) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*launch, f"--max-restarts={restarts}", *script, *TRAIN, "--run-dir", run, "--model", base]
    line += ["--save-every", save_every]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, line)], env=ENV, cwd=ROOT, text=True, **pipes)


def faulty(run, base, fault: str, phase: str, rank: int, restarts: int = 0) -> tuple[subprocess.Popen, str, float]:
    """Runs until all ranks are gone. Returns the process, what it wrote to stderr, and seconds since the fault."""
    script = [ROOT / "tests" / "faulty_train.py", fault, phase, rank, run / "struck"]
    process = torchrun(run, base, *script, restarts=restarts)
    _, errors = process.communicate(timeout=300)
    return process, errors, time.time() - float((run / "struck").read_text())


@pytest.mark.parametrize("fault, phase, rank", FAULTS + [pytest.param(*f, marks=pytest.mark.slow) for f in MORE_FAULTS])
def test_when_a_rank_fails_all_leave_within_30_s_with_one_cause(fault, phase, rank, start, tmp_path):
    run = shutil.copytree(start[0], tmp_path / "run")
    process, errors, seconds = faulty(run, start[1], fault, phase, rank)
    assert process.returncode != 0 and seconds < MOST_SECONDS, errors
    cause = {"exception": "RuntimeError: boom", "kill": "Signal 9 (SIGKILL)", "disk": "No space left on device"}[fault]
    assert errors.count(cause) == 1, errors
    assert errors.count("Traceback") - 1 == (fault == "exception"), errors  # the one is torchrun's own
    assert not (run / "model").exists()


def test_torchruns_restart_goes_on_from_the_last_good_checkpoint(start, tmp_path):
    """A rank is killed while it saves; torchrun starts all again; the weights are those of an undisturbed run."""
    undisturbed, run = (shutil.copytree(start[0], tmp_path / name) for name in ("undisturbed", "run"))
    process = torchrun(undisturbed, start[1], "-m", "conj.train.dpo")
    assert process.communicate(timeout=300) and process.returncode == 0
    process, errors, _ = faulty(run, start[1], "kill", "save", 1, restarts=1)
    assert process.returncode == 0, errors
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, undisturbed)]
    assert weights[0] == weights[1] and metrics_of(run) == metrics_of(undisturbed)


def test_sigterm_saves_and_leaves_and_the_run_goes_on(start, tmp_path):
    """As a cluster ends a job: torchrun is asked to leave, and hands that on to its ranks. Steps between the regular
    saves are not lost."""
    undisturbed, run = (shutil.copytree(start[0], tmp_path / name) for name in ("undisturbed", "run"))
    process = torchrun(undisturbed, start[1], "-m", "conj.train.dpo", save_every=1000)
    assert process.communicate(timeout=300) and process.returncode == 0
    process = torchrun(run, start[1], ROOT / "tests" / "slow_train.py", save_every=1000)
    while num_lines(run / "metrics.jsonl") < 3:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    asked = time.time()
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - asked < MOST_SECONDS
    assert out.count("left on SIGTERM after step") == 2, errors
    (saved,) = list_checkpoints(run / "checkpoints")
    assert num_lines(run / "metrics.jsonl") == int(saved.name[5:]) >= 3  # nothing that was done is lost
    process = torchrun(run, start[1], "-m", "conj.train.dpo", save_every=1000)
    assert process.communicate(timeout=300) and process.returncode == 0
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (undisturbed, run))
    assert all((found[name] == expected[name]).all() for name in expected)
    assert metrics_of(run) == metrics_of(undisturbed)


@pytest.mark.parametrize("leave, code", [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("sys.exit('why')", 1)])
def test_a_rank_ends_with_its_exit_code_and_does_not_finalize(leave, code):
    """gloo's threads outlive their group; one that wakes while the interpreter finalizes aborts a rank that is done."""
    lines = ["import atexit, os, sys", "from conj.train.sharding import ending_process", "atexit.register(os.abort)"]
    lines += ["print('done', end='')", "with ending_process():", f"    {leave}"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (code, "done", "why\n" if code == 1 else "")
