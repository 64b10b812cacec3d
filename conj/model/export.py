"""A trained model as a Hugging Face folder that every reader opens as the same model.

Readers are many: transformers 4 and 5, vLLM, what is built on them. So config.json is written in both dialects, with every
value that a reader would otherwise fill in; the generation defaults are what was evaluated, greedy, and not what the base
came with, but for a judge that is to be sampled; what the base held for others (quantization, remote code) stays behind.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor

from conj.data.files import replace_surrogates, write_atomic
from conj.data.model_files import INDEX, LICENCE_FILES, SENTENCEPIECE, SINGLE, TOKENIZER, read_model_json
from conj.model.config import ARCHITECTURES, rope_of
from conj.model.decoder import DTYPES
from conj.model.folder import DecoderFolder, JudgeModel, check_model, read_decoder

# Copied from the base as they are. So `transformers_version` of its config.json stays, too: by that transformers tells
# tokenizers that an early version wrote, and without it warns of every large vocabulary, with advice that would change it.
TOKENIZER_FILES = (*TOKENIZER, *SENTENCEPIECE, "vocab.json", "merges.txt")
LEFT_BEHIND = (
    "quantization_config", "auto_map", "_name_or_path", "layer_types", "max_window_layers",
    "_attn_implementation", "attn_implementation",
)  # fmt: skip


def export_model(
    model: nn.Module, folder: Path, base: Path, *, is_writer: bool, max_shard_bytes: int = 5 << 30,
    sampling: Mapping[str, object] | None = None, also: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes a (sharded) model, trained from `base`, in the dtype that the base's weights are stored in. `sampling`: of a
    judge that is not greedy, for generation_config.json; `also`: texts of more files, by name.

    Collective: every rank calls it, one writes. Tensors are gathered one at a time, so the writer holds one shard file
    at most. The folder appears whole, by a rename."""
    beside, read = folder.with_name(folder.name + ".part"), read_decoder(base)
    if is_writer:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    shards = []
    for shard in _gather_shards(model, DTYPES[read.dtype], max_shard_bytes, is_writer):
        shards.append((list(shard), sum(t.nbytes for t in shard.values())))
        if is_writer:
            write_atomic(beside / f"{len(shards)}.safetensors", save(shard, metadata={"format": "pt"}))
    if not is_writer:
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for i, name in enumerate(names, 1):
        os.replace(beside / f"{i}.safetensors", beside / name)
    if len(shards) > 1:
        weight_map = {key: name for name, (keys, _) in zip(names, shards) for key in keys}
        _write_json(
            beside / INDEX, {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
        )
    judge = check_model(base, None)
    _write_json(beside / "config.json", trained_config(read, judge))
    _write_json(beside / "generation_config.json", generation_config(base, judge, sampling))
    write_tokenizer(beside, base, judge)
    for path in (path for pattern in LICENCE_FILES for path in base.glob(pattern) if path.is_file()):
        write_atomic(beside / path.name, path.read_bytes())
    for name, text in (also or {}).items():
        write_atomic(beside / name, text.encode())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def _write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if replace_surrogates(text) != text:  # which no encoding holds, but JSON's own escapes do
        text = json.dumps(content, indent=2)
    write_atomic(path, (text + "\n").encode())


def trained_config(base: DecoderFolder, judge: JudgeModel) -> dict:
    """The base's config.json for all readers."""
    config = base.config
    written = {name: value for name, value in config.raw.items() if name not in LEFT_BEHIND}
    rope = rope_of(config.rope)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    written |= {
        "dtype": base.dtype, "torch_dtype": base.dtype,
        "rope_parameters": rope, "rope_theta": config.rope.theta,
        "rope_scaling": scaling if config.rope.kind != "default" else None,
        "head_dim": config.head_dim, "num_key_value_heads": config.num_key_value_heads,
        "tie_word_embeddings": config.tie_word_embeddings, "eos_token_id": _one_or_all(judge.end_ids),
    }  # fmt: skip
    if config.rope.kind == "yarn":  # transformers 4.51 takes the ratio of this to the original length for the factor
        written["max_position_embeddings"] = round(config.rope.factor * config.rope.original_context)
    # Where it is missing, readers take the default.
    if "sliding_window" in config.raw or ARCHITECTURES[config.model_type].default_window:
        written["sliding_window"] = None
    return dict(sorted(written.items()))


def generation_config(base: Path, judge: JudgeModel, sampling: Mapping[str, object] | None = None) -> dict:
    """generation_config.json: how the judge was evaluated, and no more. The base's penalty or temperature was not."""
    path, stated = base / "generation_config.json", {}
    for file in (base / "config.json", *([path] if path.exists() else [])):
        read = read_model_json(file)
        stated |= {name: read[name] for name in ("bos_token_id", "pad_token_id") if read.get(name) is not None}
    return {"do_sample": bool(sampling), **(sampling or {}), "eos_token_id": _one_or_all(judge.end_ids), **stated}


def _one_or_all(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids


def write_tokenizer(folder: Path, base: Path, judge: JudgeModel) -> None:
    """The base's tokenizer files; its chat template in both places where readers look for it."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            write_atomic(folder / name, (base / name).read_bytes())
    config = read_model_json(base / "tokenizer_config.json")
    config["chat_template"] = judge.tokenizer.template.source
    if (base / "tokenizer.json").exists():
        # The class that takes tokenizer.json as it is, as conj does: version 5's LlamaTokenizer splits text by its own
        # rules, and 4 does not know 5's TokenizersBackend. Without the names 4 returns token types, which no decoder takes.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(extra := config.pop("extra_special_tokens", None), dict):
        config["extra_special_tokens"] = extra
    elif extra:  # transformers 5 writes a list of them, which 4 calls so
        config["additional_special_tokens"] = extra
    config.pop("auto_map", None)
    _write_json(folder / "tokenizer_config.json", config)
    write_atomic(folder / "chat_template.jinja", judge.tokenizer.template.source.encode())


@torch.no_grad()
def _gather_shards(model: nn.Module, dtype: torch.dtype, max_bytes: int, is_writer: bool) -> Iterator[dict]:
    """{name: tensor} of each file of weights; on other ranks than the writer one empty one."""
    shard, size = {}, 0
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if not is_writer:
            continue
        full = full.to("cpu", dtype).contiguous()
        if shard and size + full.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = full
        size += full.nbytes
    yield shard
