"""What a model folder says, read once for everyone, without torch: sampling, reference, training, evaluation, audit, export.

Refused: what contradicts itself, weights that do not fit the config, remote code, weights other than safetensors, a
tokenizer with more ids than the vocabulary. What only training cannot use is refused there, and before a run begins.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conj import InputError
from conj.data.files import brief
from conj.data.model_files import StoredTensor, read_model_json, stored_tensors
from conj.data.options import require
from conj.data.tokenizer import JudgeTokenizer
from conj.model.config import STORED_DTYPES, ModelConfig, Untrainable, parameter_shapes, read_config

DEFAULT_MAX_LENGTH = 8192
TRAINING_MAX_LENGTH = 6400  # the published recipe's: longer pairs are not trained on, and not sampled either
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# An integer of the type's width, and the bits that are all 1 in NaN and infinity.
EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model folder that was checked: vLLM can be started with it."""

    folder: Path
    tokenizer: JudgeTokenizer
    max_length: int  # tokens, prompt + judgment
    end_ids: list[int]  # tokens that end a judgment
    num_heads: tuple[int, int] | None  # of queries, and of keys and values; None where the config does not say
    decoder: "DecoderFolder | None"  # what conj trains of it
    untrainable: str | None  # why it cannot


@dataclass(frozen=True, kw_only=True)
class DecoderFolder:
    """A model folder that can be trained: what the decoder is, and where each of its parameters lies."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @property
    def dtype(self) -> str:
        """That most of the weights are stored in, as torch calls it; what a config states is no more than a wish."""
        sizes = dict.fromkeys(STORED_DTYPES, 0)
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.stop - tensor.start
        if sizes["BF16"] and sizes["F16"]:  # neither holds the other's numbers
            return "float32"
        return STORED_DTYPES[max(sizes, key=sizes.get)]


def read_decoder(folder: Path) -> DecoderFolder:
    """Config and weights' headers of a model folder, once they are seen to fit together. Reads no weights, but for a head
    of its own that is said to be the embeddings.

    Raises InputError for a folder that is not whole or contradicts itself, Untrainable for what conj cannot train."""
    require(folder.is_dir(), f"{folder}: no such model folder")
    config = read_config(folder)
    expected = parameter_shapes(config)
    tensors = stored_tensors(folder, max_header_bytes=100_000 + 500 * len(expected))
    if config.tie_word_embeddings and TIED_HEAD in tensors and EMBEDDING in tensors:
        require(
            _same_content(tensors[TIED_HEAD], tensors[EMBEDDING]),
            f"{folder}: {TIED_HEAD}: expected the embeddings, as tie_word_embeddings of config.json says, found others",
        )
        del tensors[TIED_HEAD]
    # Frequencies that transformers before 4.32 stored beside the weights; every reader makes them from the config.
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    for name, tensor in tensors.items():
        if name not in expected:
            raise InputError(f"{tensor.file}: unexpected tensor {brief(name)}; the config asks for no such parameter")
        if tensor.shape != expected[name]:
            raise InputError(f"{tensor.file}: {name}: expected shape {expected[name]}, found {brief(tensor.shape)}")
        if tensor.dtype not in STORED_DTYPES:
            raise Untrainable(
                f"{tensor.file}: {name}: expected one of {', '.join(STORED_DTYPES)}, found {tensor.dtype}"
            )
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{folder}: missing {len(missing)} tensors, first {', '.join(missing[:10])}")
    return DecoderFolder(config=config, tensors=tensors)


def check_model(
    folder: Path, max_length: int | None, chat_template: str | None = None, most: int = DEFAULT_MAX_LENGTH
) -> JudgeModel:
    """Reads what there is to know about a model without its weights. `chat_template` takes the place of its own. Without
    a `max_length` it is the model's, up to `most`.

    Raises InputError for a folder without config, tokenizer, chat template or whole safetensors, one that contradicts
    itself or needs remote code, a tokenizer with more ids than the vocabulary, or a context longer than the model's."""
    decoder = untrainable = None
    try:
        decoder = read_decoder(folder)
    except Untrainable as e:
        untrainable = str(e)
        stored_tensors(folder)
    config = read_model_json(folder / "config.json")
    for name in ("vocab_size", "max_position_embeddings"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(
                f"{folder}/config.json: expected {name} to be a number from 1 up, found {brief(config.get(name))}"
            )
    context = config["max_position_embeddings"]
    tokenizer = JudgeTokenizer.load(folder, chat_template)
    check_vocabulary(folder, tokenizer, config["vocab_size"])
    max_length = min(context, most) if max_length is None else max_length
    require(0 < max_length <= context, f"--max-length: expected 1 to {context} (the model's), found {max_length}")
    heads = (config.get("num_attention_heads"), config.get("num_key_value_heads") or config.get("num_attention_heads"))
    return JudgeModel(
        folder=folder, tokenizer=tokenizer, max_length=max_length, end_ids=_end_ids(folder, config, tokenizer),
        num_heads=heads if all(type(n) is int and n > 0 for n in heads) else None,
        decoder=decoder, untrainable=untrainable,
    )  # fmt: skip


def check_vocabulary(folder: Path, tokenizer: JudgeTokenizer, vocab_size: int) -> None:
    """Raises InputError for a tokenizer with ids that the model has no row for."""
    require(
        tokenizer.last_id < vocab_size,
        f"{folder}: the tokenizer has ids up to {tokenizer.last_id}, the vocabulary {vocab_size} entries",
    )


def _end_ids(folder: Path, config: dict, tokenizer: JudgeTokenizer) -> list[int]:
    """Tokens that end a judgment: the tokenizer's, and those that the model's configuration names. Raises InputError for
    what is no id, here and where texts begin or are filled up: the export keeps those, and readers refuse them."""
    path = folder / "generation_config.json"
    generation = read_model_json(path) if path.exists() else {}
    found = set(tokenizer.end_ids)
    for file, stated in ((folder / "config.json", config), (path, generation)):
        for name in ("bos_token_id", "pad_token_id"):
            value = stated.get(name)
            fits = value is None or (type(value) is int and abs(value) < config["vocab_size"])  # some have -1 for none
            require(fits, f"{file}: {name}: expected an id of the vocabulary, found {brief(value)}")
        eos = stated.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        fits = all(type(i) is int for i in ids)
        require(fits, f"{file}: eos_token_id: expected an id or a list of ids, found {brief(eos)}")
        found |= set(ids)
    if outside := [i for i in sorted(found) if not 0 <= i < config["vocab_size"]]:
        raise InputError(f"{folder}: eos_token_id: expected ids of the vocabulary, found {brief(outside)}")
    return sorted(found)


def _chunks(tensor: StoredTensor, dtype: str) -> Iterator[np.ndarray]:
    """A tensor's numbers in pieces, as integers of their width; what was read is not kept in memory."""
    size = np.dtype(dtype).itemsize
    for start in range(tensor.start, tensor.stop, CHUNK_BYTES):
        length = min(CHUNK_BYTES, tensor.stop - start) // size
        yield np.fromfile(tensor.file, dtype=dtype, count=length, offset=start)


def _same_content(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(a, b) for a, b in zip(_chunks(one, "u1"), _chunks(other, "u1")))


def check_finite(tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Raises InputError, naming the tensor, for a weight that is NaN or infinite. Reads all weights."""
    for name, tensor in tensors:
        integer, exponent = EXPONENTS[tensor.dtype]
        for chunk in _chunks(tensor, integer):
            if count := int(np.count_nonzero((chunk & chunk.dtype.type(exponent)) == exponent)):
                raise InputError(
                    f"{tensor.file}: {name}: expected finite weights, found {count} that are NaN or infinite"
                )
