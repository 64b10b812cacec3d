"""Weights in and out of Hugging Face model folders: safetensors only, every key, shape and dtype accounted for.

Refused with one line, before much is read: pickles, remote code, index files that name a file outside the folder, headers
that lie or are larger than any model's, keys that are missing, stand twice or are not the model's, shapes that do not
fit the config, dtypes that are no floating point. Reading goes row by row into the shard that a rank holds.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from conj import InputError
from conj.data.files import brief, write_atomic
from conj.data.model_files import INDEX, SINGLE, open_weights, read_model_json, weight_files
from conj.model.decoder import Decoder, ModelConfig, read_config

FLOAT_TYPES = ("F32", "BF16", "F16")
# What makes a model folder complete beside the weights; copied from the base to the trained model as they are.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


def check_weights(folder: Path, expected: dict[str, tuple[int, ...]], stack: ExitStack) -> dict:
    """{name: open file} for every parameter; raises InputError unless keys, shapes and dtypes all match."""
    where, max_header_bytes = {}, 100_000 + 500 * len(expected)
    for path in weight_files(folder):
        file = stack.enter_context(open_weights(path, "pt", max_header_bytes))
        for key in file.keys():  # noqa: SIM118 (an open file, not a dict)
            if key in where:
                raise InputError(f"{path}: {brief(key)} stands in more than one file")
            if key not in expected:
                raise InputError(f"{path}: unexpected tensor {brief(key)}; the config asks for no such parameter")
            view = file.get_slice(key)
            if (shape := tuple(view.get_shape())) != expected[key]:
                raise InputError(f"{path}: {key}: expected shape {expected[key]}, found {brief(shape)}")
            if view.get_dtype() not in FLOAT_TYPES:
                raise InputError(f"{path}: {key}: expected one of {', '.join(FLOAT_TYPES)}, found {view.get_dtype()}")
            where[key] = file
    if missing := sorted(expected.keys() - where.keys()):
        raise InputError(f"{folder}: missing {len(missing)} tensors, first {', '.join(missing[:10])}")
    return where


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the config's model. One layer is built, on no device, however many the config asks for."""
    with torch.device("meta"):
        model = Decoder(replace(config, num_hidden_layers=1))
    shapes = {}
    for name, parameter in model.named_parameters():
        first, layer, rest = name.partition("layers.0.")
        for i in range(config.num_hidden_layers if layer else 1):
            shapes[f"{first}layers.{i}.{rest}" if layer else name] = tuple(parameter.shape)
    return shapes


def local_rows(parameter: Tensor) -> slice:
    """The rows of the full tensor that this rank holds: all of them, or its chunk of an FSDP2 shard on dim 0."""
    rows = parameter.shape[0]
    for dim, placement in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            chunk = -(-rows // parameter.device_mesh.size(dim))
            start = min(rows, chunk * parameter.device_mesh.get_local_rank(dim))
            return slice(start, min(rows, start + chunk))
    return slice(0, rows)


def local_tensor(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Fills a (sharded) model from a folder's safetensors, casting to each parameter's dtype."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        for name, file in check_weights(folder, shapes, stack).items():
            parameter = model.get_parameter(name)
            rows = local_rows(parameter)
            if rows.start < rows.stop:
                local_tensor(parameter).copy_(file.get_slice(name)[rows])


def check_model_folder(folder: Path) -> ModelConfig:
    """The config, once config and weights' headers are seen to fit together. Reads no weights."""
    config = read_config(folder)
    with ExitStack() as stack:
        check_weights(folder, parameter_shapes(config), stack)
    return config


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """A whole Qwen2 on one device, for inspection and tests; training shards it first (`conj.train.sharding`)."""
    config = check_model_folder(folder)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model


def export_model(
    model: nn.Module, folder: Path, base: Path, *, dtype: torch.dtype, is_writer: bool, max_shard_bytes: int = 5 << 30
) -> None:
    """Writes a (sharded) model as a Hugging Face folder that `transformers` and vLLM open as it is.

    Collective: every rank calls it, one writes. Tensors are gathered one at a time, so the writer holds one shard file
    at most. config and tokenizer files are the base's. The folder appears whole, by a rename."""
    beside = folder.with_name(folder.name + ".part")
    if is_writer:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    shards = []
    for shard in _gather_shards(model, dtype, max_shard_bytes, is_writer):
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
        index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
        write_atomic(beside / INDEX, json.dumps(index, indent=2).encode())
    config = read_model_json(base / "config.json")
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_atomic(beside / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    for name in COMPANIONS:
        if (base / name).exists():
            write_atomic(beside / name, (base / name).read_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


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
