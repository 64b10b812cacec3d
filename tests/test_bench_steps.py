"""`scripts/bench_steps.py`: what is counted before a step runs, and what is read off its trace."""

import bench_steps as bench
import pytest
import torch
from conftest import kernel_names

GIB = 2**30


def test_all_layers_fit_a_large_card_and_fewer_a_small_one():
    """State alone, 16 bytes of each of 7.6 billion parameters, is 113 GiB."""
    size = bench.QWEN2["7B"]
    full = bench.bytes_needed(bench.config_of(size, 28), 12000, "full")
    assert 113 * GIB < full < 139 * GIB
    assert bench.most_layers(size, 12000, "full", 139 * GIB) == 28
    layers = [bench.most_layers(size, 12000, kind, 78 * GIB) for kind in ("full", "selective", "none")]
    assert 28 > layers[0] > layers[1] > layers[2] > 4
    assert bench.most_layers(size, 12000, "full", 10 * GIB) == 0


def test_out_of_memory_takes_an_eighth_of_the_layers_and_tries_again(monkeypatch):
    """What is counted may be short of what is taken: the phase must still give a row."""
    tried = []

    def run(config, *_):
        tried.append(config.num_hidden_layers)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("none left")
        return {"layers": config.num_hidden_layers}, None

    monkeypatch.setattr("run", run)
    monkeypatch.setattr("largest_pack", lambda *_: 12000)
    monkeypatch.setattr("sys.argv", ["bench_steps.py", "--device", "cpu"])
    row, _ = bench.run_what_fits(bench.QWEN2["7B"], "full", None, [], bench.parse(), None)
    assert tried == [28, 24, 21] and row == {"layers": 21}


def kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_a_trace_gives_seconds_by_kind_and_overlapping_kernels_are_busy_once():
    events = [
        kernel("nvjet_tst_128x256_64x4_NT", 0, 100), kernel("void cutlass::flash_fwd_kernel<Flash_fwd>", 50, 100),
        kernel("_rms_norm_of_ours_add_rms_norm", 400, 50),
        kernel("at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 500, 25),
        kernel("Memcpy HtoD (Pinned -> Device)", 600, 5, "gpu_memcpy"),
        kernel("cudaLaunchKernel", 0, 3, "cuda_runtime"), kernel("cuLaunchKernelEx", 10, 3, "cuda_driver"),
        kernel("cudaStreamSynchronize", 20, 200, "cuda_runtime"), kernel("aten::mm", 0, 900, "cpu_op"),
        {"ph": "i", "cat": "kernel", "name": "an instant", "ts": 0},
    ]  # fmt: skip
    found = bench.by_kind(events)
    seconds = {kind: round(entry["seconds"] * 1e6) for kind, entry in found["kinds"].items()}
    assert seconds == {"matmul": 100, "attention": 100, "conj's kernels": 50, "AdamW": 25, "copies and casts": 5}
    assert found["gpu_busy_seconds"] == pytest.approx((150 + 50 + 25 + 5) / 1e6)
    assert found["kernel_launches"] == 2 and found["host_waits"] == {"cudaStreamSynchronize": 1}
    assert found["host_waits_seconds"] == pytest.approx(200 / 1e6)


def test_each_kernel_of_ours_is_counted_as_ours():
    names = kernel_names()
    assert len(names) >= 8
    events = [kernel(name, i, 1) for i, name in enumerate(names)]
    assert set(bench.by_kind(events)["kinds"]) == {"conj's kernels"}
