"""Weights from safetensors into a model, row by row into the shard that a rank holds.

Whether a folder's weights are those of its config was seen before (`folder.read_decoder`).
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from conj.data.model_files import StoredTensor
from conj.model.decoder import Decoder
from conj.model.folder import read_decoder


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
def load_weights(model: nn.Module, tensors: dict[str, StoredTensor]) -> None:
    """Fills a (sharded) model from safetensors, casting to each parameter's dtype."""
    with ExitStack() as stack:
        paths = {tensor.file for tensor in tensors.values()}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        for name, parameter in model.named_parameters():
            rows = local_rows(parameter)
            if rows.start < rows.stop:
                local_tensor(parameter).copy_(files[tensors[name].file].get_slice(name)[rows])


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """A whole decoder on one device, for inspection and tests; training shards it first (`conj.train.sharding`)."""
    read = read_decoder(folder)
    with torch.device("meta"):
        model = Decoder(read.config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, read.tensors)
    return model
