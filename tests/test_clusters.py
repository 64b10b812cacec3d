"""More nodes: `conj run` starts training on all of them, the Slurm script runs the whole, and a lost node comes back."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ENV, ROOT, assert_one_line_error, command, num_lines
from test_audit_mode import base, equal, state_of  # noqa: F401 (a fixture)
from test_hsdp import TRAIN, copies, start, train  # noqa: F401 (a fixture)
from test_run import resolved, sampled, write_settings  # noqa: F401 (a fixture)

from conj.data.files import read_jsonl
from conj.run import ENVIRONMENT, command_line, torchrun

SHIMS = {
    # As many copies of the command as there are tasks, each with its number; the worst exit code of them.
    "srun": """#!{python}
import os, signal, subprocess, sys
line, names = sys.argv[1:], {{}}
while line[0].startswith("-"):
    name, _, value = line[0].partition("=")
    names[name], line = value, line[1:]
print("srun", *sys.argv[1:], file=open(os.environ["SHIM_LOG"], "a"), flush=True)
tasks = [subprocess.Popen(line, env=os.environ | {{"SLURM_PROCID": str(i)}}) for i in range(int(names["--ntasks"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
""",
    "scontrol": """#!/bin/sh
echo scontrol "$@" >> "$SHIM_LOG"
[ "$1" != show ] || printf 'localhost\\nlocalhost2\\n'
""",
    "ray": """#!/bin/sh
[ "$1" != status ] || exec printf 'Active:\\n 1 node_a\\n 1 node_b\\n'
[ "$1" != start ] || exec sleep 600
""",
    "conj": """#!/bin/sh
exec {python} -m conj "$@"
""",
}


@pytest.fixture
def slurm(tmp_path) -> dict:
    """The environment of a job on two nodes, which are this machine, with two processes each."""
    (tmp_path / "bin").mkdir()
    for name, text in SHIMS.items():
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost[,2]", "SLURM_GPUS_ON_NODE": "2"}
    job |= {"SLURM_JOB_ID": "7", "SHIM_LOG": str(tmp_path / "log"), "HOME": str(tmp_path)}
    return ENV | job | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_stages_5_and_6_start_on_every_node_and_the_others_on_one(tmp_path):
    nodes = ["--nnodes", "8", "--nproc-per-node", "4", "--launcher", "srun --ntasks=8", "--max-restarts", "2"]
    (run,) = resolved(write_settings(tmp_path), *nodes, "--rdzv-endpoint", "node-1:29500")
    assert run.num_ranks == 32
    for stage, options in run.options.items():
        line = command_line(stage, options, run.num_processes, run.nodes)
        if stage in ("reference", "dpo"):
            assert line[:5] == ["srun", "--ntasks=8", sys.executable, "-m", "torch.distributed.run"]
            assert {"--nnodes=8", "--nproc_per_node=4", "--rdzv_endpoint=node-1:29500", "--max_restarts=2"} < set(line)
        else:
            assert line[0] == sys.executable and "torch.distributed.run" not in line


def test_two_runs_that_meet_at_one_endpoint_do_not_meet_each_other(tmp_path):
    """Both were called conj: nodes of the one could join the other."""
    nodes = {"nnodes": 2, "launcher": "srun"}
    names = [next(x for x in torchrun(1, nodes, tmp_path / run) if "rdzv_id" in x) for run in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--nnodes", "2"], "--nnodes 2: expected a --launcher that starts a command on each node, found none"),
        (["--nnodes", "2", "--launcher", " "], "--launcher: expected a command"),
        (
            ["--nnodes", "2", "--launcher", "srun 'x"],
            "--launcher: expected a command whose quotes are closed, found srun 'x",
        ),
        (["--rdzv-endpoint", "here"], "--rdzv-endpoint: expected HOST:PORT, found here"),
        (["--nproc-per-node", "4", "--dpo.dp-shard-size", "3"], "[dpo] --dp-shard-size: expected a divisor of 4 ranks"),
    ],
)
def test_a_mistake_about_nodes_is_one_line_before_anything_starts(tmp_path, options, part):
    assert_one_line_error(command("conj", "run", write_settings(tmp_path), *options), part)


@pytest.mark.slow
def test_the_slurm_script_runs_a_pipeline_on_two_nodes(sampled, slurm, tmp_path):  # noqa: F811
    """With shims for Slurm's commands and Ray's; conj, torchrun and the ranks of both nodes are real."""
    run = shutil.copytree(sampled[0].parent / "run", tmp_path / "run")
    line = [ROOT / "scripts" / "run_conj.sbatch", *sampled, "--run-dir", run, "--stages", "pairs", "reference", "dpo"]
    line += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(list(map(str, line)), env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "model" / "model.safetensors").exists()
    assert {row["num_ranks"] for row in read_jsonl(run / "metrics.jsonl")} == {4}
    (newest,) = (run / "checkpoints").iterdir()
    assert len(list(newest.glob("*.safetensors"))) == 2  # a copy a node: that of the first is saved
    said = (tmp_path / "log").read_text().splitlines()
    assert [("ray start" in call, "torch.distributed.run" in call) for call in said if call.startswith("srun")] == [
        (True, False), (True, False), (False, True), (False, True),
    ]  # fmt: skip
    assert not [call for call in said if "requeue" in call]


@pytest.mark.slow
def test_at_the_end_of_its_time_the_slurm_script_saves_and_queues_again(sampled, slurm, tmp_path):  # noqa: F811
    run = shutil.copytree(sampled[0].parent / "run", tmp_path / "run")
    line = [ROOT / "scripts" / "run_conj.sbatch", *sampled, "--run-dir", run, "--stages", "pairs", "reference", "dpo"]
    line += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--dpo.max-steps", "400", "--dpo.num-train-epochs", "400"]
    job = subprocess.Popen(list(map(str, line)), env=slurm, cwd=ROOT)
    while num_lines(run / "metrics.jsonl") < 3:
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=120) != 0
    assert list((run / "checkpoints").glob("step-????????")) and not (run / "model").exists()
    assert "scontrol requeue 7" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_node_that_is_lost_and_comes_back_ends_in_the_bits_of_one_rank(start, base, tmp_path):  # noqa: F811
    """All processes of the second node are killed (SIGKILL) in a step. The first one's ranks fail and wait; the second
    starts again by the same line; the run goes on from its checkpoint."""
    one, run = copies(start, tmp_path, "one", "run")
    train(one, base, 1, 1, "--audit-mode")
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max_restarts=3", "--rdzv_id=conj"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", ROOT / "tests" / "slow_train.py"]
    line = [sys.executable, *launch, *TRAIN, "--audit-mode", "--model", base, "--run-dir", run]

    def node() -> subprocess.Popen:
        return subprocess.Popen(list(map(str, line)), env=ENV | ENVIRONMENT, cwd=ROOT, start_new_session=True)

    first = node()
    time.sleep(2)  # it keeps the store
    second = node()
    while num_lines(run / "metrics.jsonl") < 3:
        assert first.poll() is None and second.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
    for pid in (second.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    time.sleep(5)
    assert first.poll() is None
    second = node()
    assert (first.wait(timeout=240), second.wait(timeout=60)) == (0, 0)
    assert equal(state_of(run), state_of(one))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, one)]
    assert weights[0] == weights[1]
