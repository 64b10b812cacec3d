"""Stage 5: the base model's logprobs of every judgment, computed once and stored with a key.

    python -m conj.train.reference --run-dir runs/demo --model demo/base
    torchrun --nproc_per_node 8 -m conj.train.reference --run-dir … --model …

DPO needs the reference model only for these numbers, so training never loads it. The tokens of the pairs are made here too
(`tokens.safetensors`), once for all ranks and later stages. The key names everything they depend
on; `conj.train.dpo` refuses a file whose key differs and says which part. NaN means not computed: a killed run is
taken up where its last save stands, and pairs over `--max-length` stay NaN.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from conj import InputError
from conj.data.files import listed, sha256_file, stream_jsonl, write_atomic
from conj.data.identity import hash_judge
from conj.data.judges import Judge, load_judge
from conj.data.manifest import RunOptions, begin, finish
from conj.data.model_files import weight_files
from conj.data.options import require, run_command
from conj.data.packs import Group, deal, pairs_of, plan_packs
from conj.data.progress import progress
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import PAIR_COLUMNS, TOKENS, TokenizedPairs, find_tokens, map_tokens, tokenize_pairs
from conj.model import backends
from conj.model.config import ModelConfig, read_config
from conj.model.folder import check_finite, check_vocabulary, read_decoder
from conj.train.batch import batches_ahead
from conj.train.fit import check_reference_fits
from conj.train.options import ReferenceOptions, hash_forward
from conj.train.sharding import World, build_sharded_model, distributed, ending_process, reshard

WHERE = {"code", "backends", "torch", "device"}  # fields of the key that say where it was made, not from what
ROUNDING = {"bfloat16": 2**-9, "float32": 2**-22}  # relative error of a result; in fp32 that of a long sum
NUM_ROUNDINGS = 16  # see rounding_bound


def load_pairs(path: Path, model: Path, max_length: int) -> tuple[TokenizedPairs, str, list[int]]:
    """The pairs of pairs.jsonl as token ids of the model's tokenizer, that tokenizer's fingerprint, and the numbers of the pairs
    that are within `max_length` tokens and the model's context. For one process; ranks share a file, see `map_pairs`."""
    config, tokenizer = read_config_and_tokenizer(model)
    pairs = tokenize_pairs((row for _, row in stream_jsonl(path, PAIR_COLUMNS)), tokenizer, config.vocab_size)
    return pairs, tokenizer.fingerprint, pairs.within(min(max_length, config.max_position_embeddings))


def read_config_and_tokenizer(model: Path) -> tuple[ModelConfig, JudgeTokenizer]:
    config, tokenizer = read_decoder(model).config, JudgeTokenizer.load(model)
    check_vocabulary(model, tokenizer, config.vocab_size)
    return config, tokenizer


def map_pairs(
    options: RunOptions, world: World, folders: Sequence[Path] | None = None
) -> tuple[TokenizedPairs, str, list[int]]:
    """What `load_pairs` gives, from a file that all ranks map: the main rank finds one in `folders` that holds just these
    tokens, or makes it in the first of them. By default they are the run's, that of its pairs, and those it builds on."""

    def find() -> tuple[Path, str, int]:
        path = options.find("pairs.jsonl")
        require(path.exists(), f"{path}: no such file; make it by its stage first")
        config, tokenizer = read_config_and_tokenizer(options.model)
        places = [folder / TOKENS for folder in folders or (options.run_dir, path.parent, *options.from_runs)]
        file = find_tokens(places, path, tokenizer, config.vocab_size)
        return file, tokenizer.fingerprint, min(options.max_length, config.max_position_embeddings)

    path, fingerprint, longest = world.on_main(find)
    pairs = map_tokens(path)
    return pairs, fingerprint, pairs.within(longest)


def reference_key(
    model: Path, tokenizer: str, pairs: TokenizedPairs, *, judge: Judge, dtype: str, device: torch.device
) -> dict[str, str]:
    """Everything the reference logprobs depend on, field by field."""
    return {
        "weights": json.dumps({path.name: sha256_file(path) for path in weight_files(model)}),
        "config": sha256_file(model / "config.json"), "tokenizer": tokenizer, "tokens": pairs.fingerprint(),
        "judge": hash_judge(judge), "dtype": dtype, "code": hash_forward(), "backends": backends.describe(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip


def read_reference(path: Path) -> tuple[dict[str, str], Tensor]:
    """A stored file's key, and its logprobs (N, 2) fp32. Raises InputError unless the file is whole."""
    if not path.exists():
        raise InputError(f"{path}: no such file; make it with python -m conj.train.reference")
    try:
        with safe_open(path, framework="pt") as file:
            # Versions that knew the card's judge alone named none.
            key = {"judge": hash_judge(load_judge("con-j"))} | dict(json.loads(file.metadata()["key"]))
            return key, file.get_tensor("logps")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a whole reference file: {e}") from None


def load_reference(
    path: Path, key: dict[str, str], num_pairs: int, *, elsewhere: bool = False
) -> tuple[Tensor, list[str]]:
    """Stored logprobs, (N, 2) fp32, chosen and rejected, and the fields of its key that differ from `key`.

    Raises InputError unless the file is whole and its key is `key`; `elsewhere` lets those fields differ that say where
    it was made."""
    found, logps = read_reference(path)
    stale = [name for name in key if found.get(name) != key[name]]
    if stale and not (elsewhere and WHERE.issuperset(stale)):
        what = "; ".join(_difference(n, key[n], str(found.get(n))) for n in stale[:3])
        raise InputError(
            f"{path}: stale reference, made with another {', '.join(stale)} ({what}); delete it and its manifest, and "
            "make it again"
        )
    if logps.shape != (num_pairs, 2) or logps.dtype != torch.float32:
        found = f"{logps.dtype} {tuple(logps.shape)}"
        raise InputError(f"{path}: expected float32 logprobs ({num_pairs}, 2), found {found}")
    return logps, stale


def _difference(field: str, expected: str, found: str) -> str:
    """How a field of a key differs; of the weights, in which files."""
    if field == "weights":
        with suppress(ValueError, AttributeError):  # what is no table of hashes is shown as it is
            files = sorted(json.loads(expected).items() ^ json.loads(found).items())
            return f"weights: {listed(list(dict.fromkeys(name for name, _ in files)))}"
    return f"{field}: expected {expected[:80]}, found {found[:80]}"


@torch.no_grad()
def compute_logps(model: nn.Module, pairs: TokenizedPairs, packs: list, world: World) -> Tensor:  # (N, 2) fp32
    """Logprobs of the pairs of `packs`, chosen and rejected, from all ranks; 0 for other pairs."""
    found = torch.zeros(len(pairs), 2)
    for batch in batches_ahead(pairs, deal(packs, world.rank, world.size), world.device):
        found[batch.pair_numbers] = batch.pair_logps(model(*batch.inputs)).cpu()
    reshard(model)
    return world.sum(found)  # one rank has each value, the others add zero


def compute_reference(
    artefact: Path,
    options: ReferenceOptions,
    pairs: TokenizedPairs,
    logps: Tensor,
    packs: list,
    key: dict,
    world: World,
) -> None:
    """Fills in `logps` (N, 2) for the pairs of `packs`, saving to `artefact` as it goes."""
    model = build_sharded_model(options.model, world, options.dtype)
    per_save = world.size * options.save_every
    with progress(total=len(pairs_of(packs)), desc="reference", unit="pair", disable=not world.is_main) as bar:
        for start in range(0, len(packs), per_save):
            now = packs[start : start + per_save]
            done = pairs_of(now)
            logps[done] = compute_logps(model, pairs, now, world)[done]
            check_computed(logps, done, options.model)
            if world.is_main:
                save_reference(artefact, logps, key)
            bar.update(len(done))


def check_computed(logps: Tensor, done: list[int], model: Path) -> None:
    """Raises InputError for a logprob that is NaN or infinite, naming the weight that is so, if one is."""
    if not logps[done].isfinite().all():
        pair = next(pair for pair in done if not logps[pair].isfinite().all())
        check_finite(read_decoder(model).tensors.items())
        raise InputError(f"{model}: expected finite logprobs, found {logps[pair].tolist()} of pair {pair + 1}")


def rounding_bound(logps: Tensor, lengths: Tensor, logit_size: float, dtype: str) -> Tensor:
    """How far two computations of the logprobs of judgments may part, nats, for judgments of `lengths` tokens.

    A logit errs by some roundings of its own size. A token's logprob errs by that times 1 - p, and (1 - p)^2 is at most 1
    and at most -log p; errors of tokens have no common sign, and add as squares. Seen on the demo's base in bf16, whose
    logits are the largest tried: 0.9 roundings a token (rms), and 4 at most in 340 judgments."""
    return NUM_ROUNDINGS * ROUNDING[dtype] * logit_size * torch.minimum(lengths, -logps).clamp(min=0).sqrt()


@torch.no_grad()
def measure_logits(model: nn.Module, pairs: TokenizedPairs, packs: list, world: World) -> float:
    """The size of logits, nats: the rms logprob, over the judgments' tokens, of another token of the text."""
    total = torch.zeros(2)
    for batch in batches_ahead(pairs, deal(packs, world.rank, world.size), world.device):
        *inputs, targets = batch.inputs
        logprobs = model(*inputs, targets.roll(1))
        total += torch.tensor([logprobs.square().sum().item(), len(logprobs)])
    reshard(model)
    squares, count = world.sum(total).tolist()
    return (squares / count) ** 0.5


def is_exact(world: World) -> bool:
    """Whether a pair's logprobs have the same bits in any pack, on every rank."""
    return not world.any(not backends.rounds_rows_alike(world.device))


def check_reference(
    model: nn.Module,
    pairs: TokenizedPairs,
    reference: Tensor,
    packs: list[list[Group]],
    world: World,
    dtype: str,
    *,
    exact: bool,
) -> None:
    """Computes the pairs of `packs` again, with the base model. Raises InputError where a stored value is another: in
    any bit if `exact`, else by more than kernels of other shapes round; see `rounding_bound`."""
    found = compute_logps(model, pairs, packs, world)
    logit_size = 0.0 if exact else measure_logits(model, pairs, packs, world)
    for pair in pairs_of(packs):
        lengths = torch.tensor([len(ids) for ids in pairs.judgments[pair]])
        bound = rounding_bound(found[pair], lengths, logit_size, dtype)
        if not ((found[pair] - reference[pair]).abs() <= bound).all():
            allowed, advice = "", ""
            if not exact:
                allowed = f", within {' and '.join(f'{nats:.3f}' for nats in bound.tolist())} nats"
                advice = "; if that is refused too, a kernel is at fault: take --attention sdpa --kernels torch in both"
            raise InputError(
                f"reference.safetensors: pair {pair + 1} (prompt {pairs.ids[pair]}): expected the logprobs "
                f"{found[pair].tolist()} that the model gives{allowed}, found {reference[pair].tolist()}; delete it and its "
                f"manifest, and make it again{advice}"
            )


def save_reference(path: Path, logps: Tensor, key: dict[str, str]) -> None:
    write_atomic(path, save({"logps": logps}, metadata={"key": json.dumps(key)}))


def main(options: ReferenceOptions) -> None:
    started = time.perf_counter()
    [(artefact, inputs)] = options.makes().items()
    with distributed(options.device, options.dp_shard_size) as world:
        backends.select(world.device, dtype=options.dtype, attention=options.attention, kernels=options.kernels)
        pairs, tokenizer, usable = map_pairs(options, world)
        key = world.on_main(
            lambda: reference_key(
                options.model, tokenizer, pairs, judge=options.read_judge(), dtype=options.dtype, device=world.device
            )
        )
        # First what it is made of: a finished file that another model made is refused with the name of what changed.
        if not world.on_main(lambda: begin(artefact, inputs=inputs, options=options)):
            return
        logps = torch.full((len(pairs), 2), torch.nan)
        if artefact.exists():
            logps, _ = load_reference(artefact, key, len(pairs))
        todo = [i for i in usable if logps[i].isnan().any()]
        packs = plan_packs(pairs, todo, max_tokens=options.max_tokens_per_pack, share="prompt")
        check_reference_fits(options, pairs, packs, read_config(options.model), world.machine())
        compute_reference(artefact, options, pairs, logps, packs, key, world)
        if world.is_main:
            if not artefact.exists():  # no pair was within the length
                save_reference(artefact, logps, key)
            counts = {"over_max_length": len(pairs) - len(usable)}
            seconds = time.perf_counter() - started
            finish(artefact, num_rows=len(pairs), counts=counts, seconds=seconds, machine=world.describe())


if __name__ == "__main__":
    with ending_process():
        run_command(main, ReferenceOptions, __doc__)
