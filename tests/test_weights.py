"""Model folders in and out: what fits is read and written exactly, everything else is refused in one line."""

import json
import shutil

import pytest
import torch
from conftest import change_config, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conj import InputError
from conj.model.weights import check_model_folder, export_model, load_model


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model_opens_in_transformers_with_the_same_weights_and_tokenizer(tied, tmp_path):
    """Sharded output is split into several files here: the index must name every tensor once."""
    base = write_model(tmp_path / "base", tied=tied)
    export_model(load_model(base), tmp_path / "out", base, dtype=torch.float32, is_writer=True, max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    expected, found = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (base, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    messages = [{"role": "user", "content": "回答1 is 更好"}]
    texts = [
        AutoTokenizer.from_pretrained(f).apply_chat_template(messages, tokenize=True) for f in (base, tmp_path / "out")
    ]
    assert texts[0] == texts[1]


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


def leave_only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def point_outside(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "../other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


NORM = "model.norm.weight"
DAMAGE = {
    "missing tensor": (
        lambda f: change_weights(f, lambda t: t.pop(NORM)),
        "missing 1 tensors, first model.norm.weight",
    ),
    "unexpected tensor": (
        lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))),
        "unexpected tensor 'extra'",
    ),
    "wrong shape": (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(63)})), "expected shape (64,)"),
    "integer dtype": (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(64).int()})), "found I32"),
    "truncated file": (truncate, "not a whole safetensors file"),
    "pickle": (leave_only_a_pickle, "pytorch_model.bin is a pickle"),
    "file outside the folder": (point_outside, "found '../other.safetensors'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another architecture": (lambda f: change_config(f, model_type="llama"), "expected 'qwen2', found 'llama'"),
    "remote code": (lambda f: change_config(f, auto_map={"AutoModel": "m.py"}), "remote code"),
    "sliding window": (lambda f: change_config(f, use_sliding_window=True), "use_sliding_window"),
    "scaled rope": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "factor": 4}), "rope_type"),
    "malformed config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "text for a number": (lambda f: change_config(f, hidden_size="wide"), "wide"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder_is_refused_in_one_line(damage, model_copy):
    assert check_model_folder(model_copy).hidden_size == 64
    change, message = DAMAGE[damage]
    change(model_copy)
    with pytest.raises(InputError) as error:
        check_model_folder(model_copy)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        check_model_folder(tmp_path / "nowhere")
