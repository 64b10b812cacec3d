"""Stage 5: the base model's logprobs of every judgment, computed once and stored with a key.

    python -m conj.train.reference --run runs/demo --model Qwen/Qwen2-7B-Instruct
    torchrun --nproc_per_node 8 -m conj.train.reference --run-dir … --model …

DPO needs the reference model only for these numbers, so training never loads it. The key names everything they depend
on; `conj.train.dpo` refuses a file whose key differs and says which part. NaN means not computed: a killed run is
taken up where its last save stands, and pairs over `--max-length` stay NaN.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import conj.model
from conj import InputError
from conj.data.files import read_jsonl, sha256_file, write_atomic
from conj.data.manifest import begin, finish
from conj.data.options import option, require, run_command
from conj.data.packs import TokenizedPairs, deal, plan_packs, tokenize_pairs
from conj.data.prompts import JudgeTokenizer
from conj.model.weights import check_model_folder, weight_files
from conj.train.batch import collate
from conj.train.sharding import World, build_sharded_model, distributed

PAIR_COLUMNS = ("id", "prompt", "chosen", "rejected", "label", "pair_type")


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    run: Path = option(help="run folder; reads pairs.jsonl, writes reference.safetensors", affects_result=False)
    model: Path = option(help="base model, a Hugging Face folder", affects_result=False)
    dtype: Literal["bf16", "fp32"] = option("bf16", help="dtype of the forward pass; must be the training run's")
    max_length: int = option(6400, help="tokens of prompt and judgment; pairs over it are counted and left out")
    max_tokens_per_pack: int = option(16384, help="tokens a forward pass takes on each rank", affects_result=False)
    save_every: int = option(256, help="forward passes between saves", affects_result=False)

    def __post_init__(self):
        for name in ("max_length", "max_tokens_per_pack", "save_every"):
            require(
                getattr(self, name) > 0, f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}"
            )


def load_pairs(run: Path, model: Path) -> tuple[TokenizedPairs, str]:
    """The run's pairs as token ids of the model's tokenizer, and that tokenizer's fingerprint."""
    config = check_model_folder(model)
    tokenizer = JudgeTokenizer.load(model)
    rows = read_jsonl(run / "pairs.jsonl", PAIR_COLUMNS)
    return tokenize_pairs(rows, tokenizer, config.vocab_size), tokenizer.fingerprint


def reference_key(model: Path, tokenizer: str, pairs: TokenizedPairs, *, dtype: str, device: str) -> dict[str, str]:
    """Everything the reference logprobs depend on, field by field."""
    kernels = hashlib.sha256()
    for path in sorted(Path(conj.model.__file__).parent.glob("*.py")):
        kernels.update(path.read_bytes())
    return {
        "weights": json.dumps({path.name: sha256_file(path) for path in weight_files(model)}),
        "config": sha256_file(model / "config.json"),
        "tokenizer": tokenizer,
        "tokens": pairs.fingerprint(),
        "dtype": dtype,
        "kernels": kernels.hexdigest(),
        "torch": torch.__version__,
        "device": device,
    }


def load_reference(path: Path, key: dict[str, str]) -> Tensor:  # (N, 2) fp32
    """Stored logprobs, chosen and rejected. Raises InputError unless the file is whole and its key is `key`."""
    if not path.exists():
        raise InputError(f"{path}: no such file; make it with python -m conj.train.reference")
    try:
        with safe_open(path, framework="pt") as file:
            found, logps = json.loads(file.metadata()["key"]), file.get_tensor("logps")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a whole reference file: {e}") from None
    stale = [name for name in key if found.get(name) != key[name]]
    if stale:
        what = "; ".join(f"{n}: expected {key[n][:80]}, found {str(found.get(n))[:80]}" for n in stale[:3])
        raise InputError(
            f"{path}: stale reference, made with another {', '.join(stale)} ({what}); delete it and make it again"
        )
    return logps


def within_length(pairs: TokenizedPairs, max_length: int) -> list[int]:
    """Numbers of the pairs within the length limit."""
    return [i for i in range(len(pairs)) if pairs.num_tokens(i) <= max_length]


@torch.no_grad()
def compute_reference(options: ReferenceOptions, pairs: TokenizedPairs, key: dict, world: World) -> Tensor:
    """Fills in the logprobs that are not there yet, saving as it goes."""
    path = options.run / "reference.safetensors"
    logps = load_reference(path, key) if path.exists() else torch.full((len(pairs), 2), torch.nan)
    todo = [i for i in within_length(pairs, options.max_length) if logps[i].isnan().any()]
    packs = plan_packs(pairs, todo, max_tokens=options.max_tokens_per_pack, share="prompt")
    model = build_sharded_model(options.model, world, options.dtype)
    rounds = range(0, len(packs), world.size * options.save_every)
    with tqdm(total=len(todo), desc="reference", unit="pair", disable=not world.is_main) as bar:
        for start in rounds:
            now = packs[start : start + world.size * options.save_every]
            found = torch.zeros_like(logps)
            for pack in deal(now, world.rank, world.size):
                batch = collate(pairs, pack, world.device)
                pair_logps = batch.pair_logps(model(*batch.inputs))
                found[batch.pair_numbers] = pair_logps.cpu()
            done = [pair for pack in now for group in pack for pair in group.pairs]
            logps[done] = world.sum(found)[done]  # one rank has each value, the others add zero
            if world.is_main:
                write_atomic(path, save({"logps": logps}, metadata={"key": json.dumps(key)}))
            bar.update(len(done))
    return logps


def main(options: ReferenceOptions) -> None:
    started = time.perf_counter()
    pairs, tokenizer = load_pairs(options.run, options.model)
    artefact = options.run / "reference.safetensors"
    with distributed() as world:
        inputs = [options.run / "pairs.jsonl", options.model]
        if not world.from_main(world.is_main and begin(artefact, inputs=inputs, options=options)):
            return
        key = reference_key(options.model, tokenizer, pairs, dtype=options.dtype, device=world.device.type)
        logps = compute_reference(options, pairs, key, world)
        if world.is_main:
            counts = {"over_max_length": int(logps.isnan().any(dim=1).sum())}
            finish(artefact, num_rows=len(pairs), counts=counts, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    run_command(main, ReferenceOptions, __doc__)
