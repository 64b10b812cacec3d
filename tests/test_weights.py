"""Weights in: what fits is read exactly, everything else is refused in one line."""

import json
import os
import shutil
import time

import pytest
import torch
from conftest import change_config, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conj import InputError
from conj.model.folder import read_decoder
from conj.model.weights import load_model


def test_sharded_files_of_transformers_are_read(tmp_path):
    base = write_model(tmp_path / "base", tied=False, max_shard_size="100KB")
    assert (base / "model.safetensors.index.json").exists()
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = load_model(base).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def point_outside(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "../other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def point_through_a_link(folder):
    point_outside(folder)
    (folder / "link.safetensors").symlink_to(folder.parent / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("../other", "link"))


def change_header(folder, change):
    """`change` takes the header's JSON text and gives another; the length before it is made to fit."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode().strip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edit_entry(folder, name, **changes):
    def change(header):
        tree = json.loads(header)
        tree[name].update(changes)
        return json.dumps(tree)

    change_header(folder, change)


def pipe_for_the_config(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def claim_a_long_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def add_empty_tensors(folder):
    """In 35 MB of header; a reader that builds an object for each takes seconds and a gigabyte."""
    entries = ", ".join(f'"e{i}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for i in range(500_000))
    change_header(folder, lambda header: header[:-1] + ", " + entries + "}")


def repeat_a_key(folder):
    """Readers of JSON take the last of the two without a word."""
    change_header(folder, lambda header: header[:-1] + f', "{NORM}": {json.dumps(json.loads(header)[NORM])}}}')


NORM = "model.norm.weight"
DAMAGE = {
    "missing tensor": (lambda f: change_weights(f, lambda t: t.pop(NORM)), "missing 1 tensors, first model.norm.weight"),
    "unexpected tensor": (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))), "unexpected tensor 'extra'"),
    "wrong shape": (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(63)})), "expected shape (64,)"),
    "integer dtype": (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(64).int()})), "found I32"),
    "truncated file": (lambda f: os.truncate(f / "model.safetensors", 100_000), "not a whole safetensors file"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "file outside the folder": (point_outside, "found '../other.safetensors'"),
    "link out of the folder": (point_through_a_link, "found 'link.safetensors', a link out of it"),
    "header longer than the file": (claim_a_long_header, "expected a header of at most"),
    "overlapping tensors": (lambda f: edit_entry(f, NORM, data_offsets=[0, 256]), "not a whole safetensors file"),
    "shape that the offsets belie": (lambda f: edit_entry(f, NORM, shape=[65]), "not a whole safetensors file"),
    "key that stands twice": (repeat_a_key, "'model.norm.weight' stands 2 times"),
    "half a million empty tensors": (add_empty_tensors, "expected a header of at most"),
    "a pipe for a file": (pipe_for_the_config, "expected a file"),
    "config key that stands twice": (
        lambda f: (f / "config.json").write_text('{"hidden_size": 64, "hidden_size": 32}'), "'hidden_size' stands 2 times",
    ),
    "a thousand million layers": (lambda f: change_config(f, num_hidden_layers=10**9), "below 1001"),
    "number larger than a float": (lambda f: change_config(f, rms_norm_eps=10**400), "rms_norm_eps"),
    "deeply nested config": (lambda f: (f / "config.json").write_text("[" * 10**5), "cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another architecture": (lambda f: change_config(f, model_type="gemma2"), "model_type: expected one of qwen2, qwen3"),
    "remote code": (lambda f: change_config(f, auto_map={"AutoModel": "m.py"}), "remote code"),
    "sliding window": (lambda f: change_config(f, use_sliding_window=True, sliding_window=64), "use_sliding_window"),
    "scaled rope": (lambda f: change_config(f, rope_parameters={"rope_type": "longrope"}), "rope_type"),
    "malformed config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "text for a number": (lambda f: change_config(f, hidden_size="wide"), "wide"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder_is_refused_in_one_line(damage, model_copy):
    assert read_decoder(model_copy).config.hidden_size == 64
    change, message = DAMAGE[damage]
    change(model_copy)
    began = time.process_time()
    with pytest.raises(InputError) as error:
        read_decoder(model_copy)
    assert message in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 1000
    assert time.process_time() - began < 1


def test_a_model_in_the_hubs_cache_whose_files_are_links_is_read(model_copy, tmp_path):
    """snapshots/REVISION/ holds links to blobs/ and nothing else."""
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.move(model_copy, tmp_path / "hub" / "blobs")
    for path in (tmp_path / "hub" / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    weight_map = dict.fromkeys(load_file(snapshot / "model.safetensors"), "model.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_decoder(snapshot).config.hidden_size == 64


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_decoder(tmp_path / "nowhere")
