"""What can be configured of the stages that run the model by torch; without torch, so that `conj run` checks it in no time."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import conj
from conj import InputError
from conj.data.identity import describe_judge
from conj.data.judged import JudgedRunOptions
from conj.data.manifest import BASE_MODEL
from conj.data.options import option, require, require_each
from conj.model.folder import TRAINING_MAX_LENGTH

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bfloat16", "float32")
ATTENTION = ("flash_attn", "varlen", "sdpa")
KERNELS = ("triton", "compile", "torch")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
REPORT_TO = ("tensorboard", "wandb", "trackio")
FORWARD = [
    f"model/{name}"
    for name in ("config", "decoder", "attention", "logprob", "logprob_kernels", "ops", "kernels", "recompute")
]
FORWARD.append("train/batch")


def hash_forward() -> str:
    """sha256 of the code that logprobs depend on."""
    package = Path(conj.__file__).parent
    return hashlib.sha256(b"".join(package.joinpath(f"{name}.py").read_bytes() for name in FORWARD)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What decides the bits of a forward pass; stored reference and training must have the same."""

    device: Literal[DEVICES] = option("auto", help="auto: a GPU if one is visible", affects_result=False)
    dtype: Literal[DTYPES] = option("bfloat16", help="dtype of forward and backward; master weights are fp32")
    attention: Literal[ATTENTION] | None = option(
        None, help="attention kernel; by default flash_attn if installed, else varlen, and on a CPU or in fp32 sdpa"
    )
    kernels: Literal[KERNELS] | None = option(
        None, help="norm, RoPE, SwiGLU and logprob kernels; by default triton, and on a CPU torch, their reference"
    )


def check_machine(options: Iterable[tuple[str, ComputeOptions]], num_processes: int, num_ranks: int) -> None:
    """Raises InputError, naming the stage, for what cannot run on this machine, or does not fit its GPUs; other nodes are taken
    to be like it. Imports torch and may start CUDA: for a process of its own."""
    import torch

    from conj.model import backends
    from conj.train.advice import Machine
    from conj.train.fit import check_least

    for stage, asked in options:
        machine = dataclasses.replace(backends.this_machine(asked.device), num_local_ranks=num_processes)
        try:
            backends.choose(
                machine, device=asked.device, dtype=asked.dtype, attention=asked.attention, kernels=asked.kernels
            )
            if backends.choose_device(machine, asked.device) == "cuda":
                size = torch.cuda.get_device_properties(0).total_memory
                num_shards = choose_shard_size(asked.dp_shard_size, num_ranks, num_processes)
                of_all = {"num_ranks": num_ranks, "num_local": num_processes, "num_shards": num_shards}
                check_least(stage, asked, Machine(**of_all, gpu_bytes=size))
        except InputError as e:
            raise InputError(f"[{stage}] {e}") from None


def choose_shard_size(asked: int | None, num_ranks: int, num_local_ranks: int) -> int:
    """Ranks that hold one copy of the model together: as asked for, else those of a node, if all nodes have as many. Raises
    InputError for a number that does not divide the ranks'."""
    require(
        asked is None or num_ranks % asked == 0,
        f"--dp-shard-size: expected a divisor of {num_ranks} ranks, found {asked}",
    )
    return asked or (num_local_ranks if num_ranks % num_local_ranks == 0 else num_ranks)


DP_SHARD_SIZE = (
    "ranks that hold one copy of the model together; by default those of a node. More take less memory a rank, and more "
    "traffic between nodes"
)


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(JudgedRunOptions, ComputeOptions):
    model: Path = option(help=BASE_MODEL, affects_result=False)
    max_length: int = option(
        TRAINING_MAX_LENGTH, help="tokens of prompt and judgment; pairs over it are counted and left out"
    )
    max_tokens_per_pack: int = option(16384, help="tokens a forward pass takes on each rank", affects_result=False)
    dp_shard_size: int | None = option(None, help=DP_SHARD_SIZE, affects_result=False)
    save_every: int = option(256, help="forward passes between saves", affects_result=False)

    def makes(self) -> dict[Path, list]:
        by = f"forward pass {hash_forward()} of torch {version('torch')}"
        inputs = [self.find("pairs.jsonl"), by, describe_judge(self.read_judge()), self.model]
        return {self.run_dir / "reference.safetensors": inputs}

    def __post_init__(self):
        self.read_judge()
        above_0 = ("max_length", "max_tokens_per_pack", "dp_shard_size", "save_every")
        require_each(self, above_0, lambda value: value > 0, "at least 1")


@dataclass(frozen=True, kw_only=True)
class DPOOptions(JudgedRunOptions, ComputeOptions):
    model: Path = option(help=BASE_MODEL, affects_result=False)
    beta: float = option(0.1, help="DPO's temperature: how dear it is to leave the base model")
    nll_alpha: float = option(0.0, help="weight of the added mean negative logprob of the chosen judgment's tokens")
    learning_rate: float = option(5e-7, help="AdamW's highest learning rate")
    adam_beta1: float = option(0.9, help="AdamW's decay of the first moment")
    adam_beta2: float = option(0.95, help="AdamW's decay of the second moment")
    weight_decay: float = option(1e-4, help="AdamW's weight decay, on matrices only")
    warmup_ratio: float = option(
        0.03, help="share of the steps in which the learning rate rises; it then falls as a cosine"
    )
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm")
    num_train_epochs: int = option(1, help="passes over the training pairs")
    max_steps: int | None = option(
        None, help="stop after this many optimizer steps; the schedule is that of this length"
    )
    pairs_per_step: int = option(24, help="pairs an optimizer step takes, over all ranks")
    max_length: int = option(
        TRAINING_MAX_LENGTH, help="tokens of prompt and judgment; pairs over it are counted and left out"
    )
    max_tokens_per_pack: int | None = option(
        None,
        help="tokens a forward pass takes on each rank, at most; by default as many as fit, up to 16384",
        automatic=True,
    )
    pack_multiple: int | None = option(
        None,
        help="the packs of a step are a multiple of this, so that as many ranks have work; by default the number of ranks",
        automatic=True,
    )
    balanced_packs: int = option(
        8, help="prompts that share a step are chosen so that this many packs of it can be even, where it has few of them; "
        "1: by chance alone"
    )  # fmt: skip
    share: Literal["prompt", "pair", "none"] = option(
        "prompt",
        help="who shares one encoding of a prompt: all its pairs (they then share a step), the two judgments of a pair, none",
    )
    activation_checkpointing: Literal[ACTIVATION_CHECKPOINTING] | None = option(
        None,
        help="what backward computes again: nothing; selective: results of elementwise steps (a third of a block's "
        "memory, for a few percent of a step); full: all but each block's input; by default as little as memory allows",
        automatic=True,
    )
    dp_shard_size: int | None = option(None, help=DP_SHARD_SIZE, affects_result=False)
    reshard_after_forward: bool | None = option(
        None, help="give gathered weights back between forward and backward; by default where they do not fit beside a pack",
        affects_result=False, automatic=True,
    )  # fmt: skip
    cpu_offload: bool = option(False, help="keep master weights, gradients and optimizer state in host memory")
    deterministic: bool = option(False, help="a backward of attention that sums in a fixed order; slower on a GPU")
    audit_mode: bool = option(
        False,
        help="the same bits on any number of ranks: gradients of a step summed in float64 (8 bytes a parameter on each "
        "rank), deterministic, one thread on a CPU",
    )
    eval_steps: float = option(
        0.1,
        help="evaluate a sample of the held-out pairs every so many steps, and all of them at the end; below 1: every such share "
        "of the run, with fewer evaluations and pairs where they would take over 3 % of it",
    )
    eval_pairs: int = option(256, help="held-out pairs in the sample, at most")
    save_every: int = option(200, help="optimizer steps between checkpoints", affects_result=False)
    keep_checkpoints: int = option(2, help="newest checkpoints to keep", affects_result=False)
    report_to: tuple[Literal[REPORT_TO], ...] = option(
        ("tensorboard",), help="who gets the rows of metrics.jsonl too", affects_result=False
    )
    seed: int = option(2021, help="seed of the order of pairs")

    def makes(self) -> dict[Path, list]:
        files = [self.find("pairs.jsonl"), self.find("reference.safetensors")]
        return {self.run_dir / "model": [*files, describe_judge(self.read_judge()), self.model]}

    def __post_init__(self):
        self.read_judge()
        above_0 = ("beta", "learning_rate", "max_grad_norm", "num_train_epochs", "max_steps", "pairs_per_step")
        above_0 += ("max_length", "max_tokens_per_pack", "pack_multiple", "balanced_packs", "dp_shard_size")
        above_0 += ("eval_steps", "eval_pairs", "save_every", "keep_checkpoints")
        require_each(self, above_0, lambda value: value > 0, "more than 0")
        require_each(
            self, ("eval_steps",), lambda value: value < 1 or value % 1 == 0, "a share below 1, or whole steps"
        )
        require_each(self, ("nll_alpha", "weight_decay"), lambda value: value >= 0, "0 or more")
        require(
            self.kernels != "compile" or self.activation_checkpointing != "selective",
            "--activation-checkpointing: expected none or full with --kernels compile, which chooses by itself what it "
            "makes again, found selective",
        )
        require_each(self, ("warmup_ratio", "adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "0 to below 1")
        for name in self.report_to:
            # A folder of that name, which wandb leaves where it ran, is a package without an origin.
            is_installed = getattr(find_spec(name), "origin", None) is not None
            require(is_installed, f"--report-to {name}: not installed; pip install {name}")


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    run_dir: Path = option(help="run folder; audit.json is written there", affects_result=False)
    model: Path | None = option(
        None, help="base model, a folder or ORG/NAME on the hub; by default what the run's manifest names"
    )
    device: Literal[DEVICES] = option("auto", help="auto: a GPU if one is visible")
    num_pairs: int = option(64, help="pairs whose logprobs are computed again for step 0 and --reference")
    replay: int | None = option(None, help="optimizer steps to take again and compare")
    reference: bool = option(False, help="have transformers compute logprobs and losses of the pairs, more precisely")
    against: Path | None = option(None, help="another run folder; find where the two part")
    seed: int = option(0, help="seed of the choice of pairs")

    def __post_init__(self):
        require_each(self, ("num_pairs", "replay"), lambda value: value >= 1, "1 or more")
        require_each(self, ("against",), Path.is_dir, "a run folder")
