"""Whose fault a failure is: the rank that has the cause says it, with what helps; the others say that it is gone."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import ENV

from conj.train.sharding import PeerFailed, agree_on_start, distributed, explain_failure

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
VERSION = " (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
CUDA = NCCL + "unhandled cuda error" + VERSION + "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
SYSTEM = NCCL + "unhandled system error" + VERSION + "ncclSystemError: System call (e.g. socket, malloc) or external "
SYSTEM += "library call failed or device error. \nLast error:\n"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
STACK = (
    "\nException raised from create at NCCLUtils.cpp:77 (most recent call first):\nframe #0: Connection closed by peer"
)
# As torch, NCCL and gloo write them (torch's NCCLUtils.cpp, and reports of users); what must be in the line.
OWN = {
    "shared memory": (
        SYSTEM + "Error while creating shared memory segment "
        "/dev/shm/nccl-YrFC5V (size 33030528), error: No space left on device (28)" + STACK,
        ("/dev/shm/nccl-YrFC5V (size 33030528), error: No space left on device (28)", "--shm-size"),
    ),
    "driver": (
        CUDA + "Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'",
        ("Cuda failure 35 'CUDA driver version is insufficient", "update it"),
    ),
    "aborted, with its reason": (
        "NCCL communicator was aborted on rank 1.  Original reason for failure was: " + CUDA
        + "Cuda failure 2 'out of memory'",
        ("Cuda failure 2 'out of memory'", "NCCL_DEBUG=WARN"),
    ),
    "invalid argument": (
        CUDA + "Cuda failure 1 'invalid argument'", ("Cuda failure 1 'invalid argument'", "NCCL_DEBUG=WARN"),
    ),
    "two ranks on one card": (
        NCCL + "invalid usage" + VERSION + "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        ("Duplicate GPU detected : rank 1 and rank 0", "--nproc_per_node"),
    ),
    "no route": (
        SYSTEM + "socketStartConnect: Connect to 10.0.0.2<45763> failed : No route to host",
        ("Connect to 10.0.0.2<45763> failed : No route to host", "NCCL_SOCKET_IFNAME"),
    ),
    "gloo's mesh": (
        "Gloo connectFullMesh failed with " + GLOO + "pair.cc:144] no error",
        ("pair.cc:144] no error", "GLOO_SOCKET_IFNAME"),
    ),
    "gloo's interface": (
        "[enforce fail at " + GLOO[1:] + "device.cc:83] ifa != nullptr. Unable to find address for: eth9",
        ("Unable to find address for: eth9",),
    ),
    "too old a build": (
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously "
        "reported at some other API call",
        ("no kernel image is available", "take another build"),
    ),
    "memory": (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free.",
        ("Tried to allocate 2.00 GiB", "--max-tokens-per-pack"),
    ),
}  # fmt: skip
PEER = {
    "gloo, closed": GLOO + "pair.cc:547] Connection closed by peer [127.0.0.1]:30353",
    "gloo, reset": GLOO + "pair.cc:374] writev [::1]:54172: Connection reset by peer",
    "gloo, pipe": GLOO + "pair.cc:366] write [127.0.0.1]:1234: Broken pipe",
    "gloo, timeout": GLOO + "unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "NCCL, remote": NCCL + "remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: A "
    "call failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\nsocketProgress: "
    "Connection closed by remote peer node2<42830>",
    "NCCL, remote inside": NCCL + "internal error" + VERSION + "ncclInternalError: Internal check failed.\nLast error:\n"
    "Net : Connection closed by remote peer node2<47861>",
    "watchdog": "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST, NumelIn=112, "
    "NumelOut=112, Timeout(ms)=1800000) ran for 1800010 milliseconds before timing out.",
    "aborted": "NCCL communicator was aborted on rank 1.",
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_cause_of_this_ranks_own_is_shown_whole_and_with_what_helps(name):
    """NCCL's stands in lines 2 to 4 of its text; every rank once said that another one was gone."""
    text, parts = OWN[name]
    peer_is_gone, line = explain_failure(RuntimeError(text))
    assert not peer_is_gone and "\n" not in line and "frame #0" not in line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("name", PEER)
def test_the_end_of_another_rank_is_no_cause(name):
    assert explain_failure(RuntimeError(PEER[name]))[0]


def test_other_errors_keep_their_traceback():
    """A fault of the program, and CUDA's faults that only a traceback places."""
    for text in ("boom", "CUDA error: an illegal memory access was encountered", "shapes (3, 4) and (5,)"):
        assert explain_failure(RuntimeError(text)) is None
    assert explain_failure(PeerFailed("rank 1 could not save")) == (True, "rank 1 could not save")


def test_one_process_ends_with_the_line_and_its_error(monkeypatch):
    """It leaves no group behind, and does not end a process that called it."""
    out = "rank 0: failed: CUDA out of memory.* takes less"
    with pytest.raises(SystemExit, match=out) as raised, distributed("cpu"):
        raise torch.OutOfMemoryError(OWN["memory"][0])
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError) and not torch.distributed.is_initialized()


def test_the_rank_that_has_the_cause_names_it_and_the_other_that_it_is_gone():
    """Rank 1 fails as NCCL does at its first collective; rank 0 waits in gloo for it."""
    lines = ["import os, torch", "from conj.train.sharding import distributed", "with distributed('cpu') as world:"]
    lines += [f"    if world.rank == 1: raise torch.distributed.DistBackendError({OWN['shared memory'][0]!r})"]
    lines += ["    world.any(True)"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    line = [*launch, sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 1 and done.stderr.count("rank 1: failed: NCCL error in") == 1, done.stderr
    assert done.stderr.count("No space left on device (28); NCCL needs more shared memory") == 1
    assert "rank 0: failed" not in done.stderr and "rank 1: left" not in done.stderr


def test_ranks_agree_on_a_name_for_each_start_whatever_an_earlier_one_left_behind():
    """Nodes count restarts on their own: by torchrun's count, a node that joined again waited for the others for ever."""
    store = dist.HashStore()

    def start(delays: list[float]) -> set[str]:
        def join(rank: int) -> str:
            time.sleep(delays[rank])
            return agree_on_start(store, rank, len(delays))

        with ThreadPoolExecutor(len(delays)) as threads:
            return set(threads.map(join, range(len(delays))))

    names = [start(delays) for delays in ([0, 0, 0], [0, 0.2, 0.1], [0.2, 0, 0], [0, 0, 0.3])]
    assert all(len(found) == 1 for found in names) and len(set.union(*names)) == 4
