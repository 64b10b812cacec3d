"""Stored reference logprobs: refused when anything they depend on has changed, and when a single bit of them has."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import CARD, change_config, random_pairs, same_bits_in_any_pack
from safetensors.torch import load_file, save_file
from test_dpo import dpo_options, make_reference, one_ulp

import conj
from conj import InputError
from conj.data import manifest
from conj.data.files import read_jsonl, write_jsonl
from conj.data.manifest import manifest_path
from conj.train import dpo, reference
from conj.train import options as train_options
from conj.train.options import FORWARD, ReferenceOptions


def replace(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rename_weights(model) -> None:
    """The same tensors under another file name, by an index."""
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    name = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(load_file(model / name), name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_a_token(run) -> None:
    rows = read_jsonl(run / "pairs.jsonl")
    rows[7]["rejected"][0]["content"] += "."
    write_jsonl(run / "pairs.jsonl", rows)


FILES = {  # what changes: the field that the message names, and the change
    "one weight by one ulp": ("weights", lambda run, model: one_ulp(model / "model.safetensors")),
    "file names": ("weights", lambda run, model: rename_weights(model)),
    "epsilon": ("config", lambda run, model: change_config(model, rms_norm_eps=1e-5)),
    "rope theta": (
        "config",
        lambda run, model: change_config(model, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    ),
    "tokenizer": ("tokenizer", lambda run, model: replace(model / "tokenizer.json", '"NFC"', '"NFKC"')),
    "template": ("tokenizer", lambda run, model: replace(model / "tokenizer_config.json", "assistant", "helper")),
    "one token id": ("tokens", lambda run, model: change_a_token(run)),
    "row order": ("tokens", lambda run, model: write_jsonl(run / "pairs.jsonl", random_pairs(30)[::-1])),
}


@pytest.mark.parametrize("change", FILES)
def test_a_stale_reference_is_refused_and_the_message_names_the_field(change, run_folder, model_copy):
    make_reference(run_folder, model_copy)
    field, apply = FILES[change]
    apply(run_folder, model_copy)
    with pytest.raises(InputError, match=f"stale reference, made with another [a-z, ]*{field}"):
        dpo.main(dpo_options(run_folder, model_copy))


@pytest.mark.parametrize("field", ["code", "backends", "torch", "device", "dtype"])
def test_a_reference_made_elsewhere_is_refused_and_the_message_names_the_field(
    field, run_folder, tied_model, monkeypatch
):
    """As if kernels, versions or device had been others: the key is what stands in the file."""
    key = reference.reference_key
    monkeypatch.setattr(reference, "reference_key", lambda *a, **k: key(*a, **k) | {field: "another"})
    make_reference(run_folder, tied_model)
    with pytest.raises(InputError, match=f"stale reference, made with another {field} "):
        dpo.main(dpo_options(run_folder, tied_model))


def test_the_key_knows_kernels_versions_and_device(run_folder, tied_model, monkeypatch):
    """Each is read where it is decided, not stated by hand: another choice gives another key."""
    pairs, tokenizer, _ = reference.load_pairs(run_folder / "pairs.jsonl", tied_model, 6400)

    def key(device: str = "cpu") -> dict:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        return reference.reference_key(
            tied_model, tokenizer, pairs, judge=CARD, dtype="float32", device=torch.device(device)
        )

    before = key()
    assert key("cuda")["device"] == "a GPU" != before["device"] == "cpu"
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert key()["torch"] == "9.9" != before["torch"]
    monkeypatch.setattr(reference.backends.current, "kernels", "compile")
    assert "compile" in key()["backends"] and key()["backends"] != before["backends"]
    monkeypatch.setattr(reference, "hash_forward", lambda: "0")
    assert key()["code"] == "0" != before["code"]


def test_the_hash_of_the_forward_covers_every_module_that_it_runs():
    """One that is left out could change and the stored logprobs would still be taken for the model's. What `backends`
    decides stands in the key itself."""
    found = todo = {"model/decoder", "train/batch"}
    while todo:
        sources = ((Path(conj.__file__).parent / f"{name}.py").read_text("utf-8") for name in sorted(todo))
        words = {m for source in sources for m in re.findall(r"from conj\.model(?:\.(\w+)| import ([\w, ]+))", source)}
        named = {f"model/{name.strip()}" for pair in words for part in pair for name in part.split(",") if name}
        todo, found = named - found, found | named
    assert found - {"model/backends"} == set(FORWARD)


def test_a_reference_of_other_code_is_stale_from_the_start_and_not_taken_from_another_run(
    run_folder, tied_model, tmp_path, monkeypatch
):
    """`conj run` says so in its first second; a run that builds on it makes its own."""
    make_reference(run_folder, tied_model)
    monkeypatch.setattr(train_options, "hash_forward", lambda: "0")
    options = ReferenceOptions(run_dir=run_folder, model=tied_model, dtype="float32", max_tokens_per_pack=900)
    [(artefact, inputs)] = options.makes().items()
    with pytest.raises(InputError, match="made from other inputs .changed: forward pass 0 of torch"):
        manifest.state(artefact, manifest.describe(inputs, options))
    new = dataclasses.replace(options, run_dir=tmp_path / "new", from_runs=(run_folder,))
    assert not manifest.is_complete(tmp_path / "new" / artefact.name, manifest.describe(inputs, new), new)


@same_bits_in_any_pack
@pytest.mark.parametrize("side", [0, 1])
def test_a_stored_logprob_off_by_one_ulp_is_refused_before_training(side, run_folder, tied_model):
    """By the spot check, since its manifest is gone too: the pairs are so few that all are computed again."""
    write_jsonl(run_folder / "pairs.jsonl", random_pairs(3, max_pairs=2))
    make_reference(run_folder, tied_model)
    spoil(run_folder, side)
    manifest_path(run_folder / "reference.safetensors").unlink()
    wrong = r"pair 2 \(prompt p00\d\): expected the logprobs .* that the model gives, found"
    with pytest.raises(InputError, match=wrong):
        dpo.main(dpo_options(run_folder, tied_model, pairs_per_step=2))


def test_where_the_number_of_rows_decides_the_bits_a_stored_logprob_is_compared_within_rounding(
    run_folder, tied_model, monkeypatch
):
    """On such a CPU every run would be refused, whose pairs are computed again outside of their packs."""
    monkeypatch.setattr(reference.backends, "rounds_rows_alike", lambda device: False)
    write_jsonl(run_folder / "pairs.jsonl", random_pairs(3, max_pairs=2))
    make_reference(run_folder, tied_model)
    spoil(run_folder, 0, by=0.1)
    manifest_path(run_folder / "reference.safetensors").unlink()
    options = dpo_options(run_folder, tied_model, pairs_per_step=2, max_steps=1)
    with pytest.raises(
        InputError, match=r"pair 2 \(prompt p00\d\): expected .* that the model gives, within 0.00\d and"
    ):
        dpo.main(options)
    spoil(run_folder, 0, by=-0.1)  # and a rounding or two
    dpo.main(options)


def test_a_stored_logprob_off_by_one_ulp_is_refused_by_its_manifest(run_folder, tied_model):
    """Also where no spot check looks at it."""
    make_reference(run_folder, tied_model)
    spoil(run_folder, 0)
    changed = "reference.safetensors: was changed after reference.safetensors.manifest.json"
    with pytest.raises(InputError, match=changed):
        dpo.main(dpo_options(run_folder, tied_model))


def spoil(run, side: int, by: float = 0.0) -> None:
    """One unit in the last place of pair 2, or `by` nats."""
    path = run / "reference.safetensors"
    key, logps = reference.read_reference(path)
    logps[1, side] = logps[1, side] + by if by else torch.nextafter(logps[1, side], torch.tensor(0.0))
    save_file({"logps": logps}, path, metadata={"key": json.dumps(key)})
