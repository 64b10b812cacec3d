"""What a model folder says, read without its weights and without torch: for whoever starts an engine on it.

Refused: remote code, weights other than safetensors, a tokenizer with more ids than the vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data.files import brief
from conj.data.model_files import INDEX, indexed_files, open_weights, read_model_json
from conj.data.options import require
from conj.data.tokenizer import JudgeTokenizer

DEFAULT_MAX_LENGTH = 8192
TRAINING_MAX_LENGTH = 6400  # the published recipe's: longer pairs are not trained on, and not sampled either


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model folder that was checked: vLLM can be started with it."""

    folder: Path
    tokenizer: JudgeTokenizer
    max_length: int  # tokens, prompt + judgment
    end_ids: list[int]  # tokens that end a judgment


def check_model(
    folder: Path, max_length: int | None, chat_template: str | None = None, most: int = DEFAULT_MAX_LENGTH
) -> JudgeModel:
    """Reads what there is to know about a model without its weights. `chat_template` takes the place of its own. Without
    a `max_length` it is the model's, up to `most`.

    Raises InputError for a folder without config, tokenizer, chat template or whole safetensors, a model that needs
    remote code, a tokenizer with more ids than the vocabulary, or a context longer than the model's."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    config = _read_config(folder / "config.json")
    require("auto_map" not in config, f"{folder}/config.json: asks for remote code (auto_map), which is never run")
    tokenizer = JudgeTokenizer.load(folder, chat_template)
    vocab_size, context = config["vocab_size"], config["max_position_embeddings"]
    size = f"the vocabulary {vocab_size} entries"
    require(tokenizer.last_id < vocab_size, f"{folder}: the tokenizer has ids up to {tokenizer.last_id}, {size}")
    _check_weights(folder)
    max_length = min(context, most) if max_length is None else max_length
    require(0 < max_length <= context, f"--max-length: expected 1 to {context} (the model's), found {max_length}")
    end_ids = _end_ids(folder, config, tokenizer)
    return JudgeModel(folder=folder, tokenizer=tokenizer, max_length=max_length, end_ids=end_ids)


def _read_config(path: Path) -> dict:
    config = read_model_json(path)
    for name in ("vocab_size", "max_position_embeddings"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{path}: expected {name} to be a number from 1 up, found {brief(config.get(name))}")
    return config


def _end_ids(folder: Path, config: dict, tokenizer: JudgeTokenizer) -> list[int]:
    """Tokens that end a judgment: the tokenizer's, and those that the model's configuration names."""
    path = folder / "generation_config.json"
    generation = read_model_json(path) if path.exists() else {}
    found = set(tokenizer.end_ids)
    for eos in (config.get("eos_token_id"), generation.get("eos_token_id")):
        found |= {i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int}
    if outside := [i for i in sorted(found) if not 0 <= i < config["vocab_size"]]:
        raise InputError(f"{folder}: eos_token_id: expected ids of the vocabulary, found {brief(outside)}")
    return sorted(found)


def _check_weights(folder: Path) -> None:
    """vLLM reads every file that ends in .safetensors, or those that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    require(bool(files), f"{folder}: not a model folder: no *.safetensors")
    if (folder / INDEX).exists():
        indexed_files(folder / INDEX)
    for file in files:
        with open_weights(file, "numpy"):
            pass  # the header, and that the file is as long as the header says
