"""The trained folder: the same model for every reader, with what was evaluated as its defaults and nothing left over."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DECODERS, change_config, judge_messages, read_by, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conj.data.judges import decoding_of, load_judge
from conj.data.model_files import weight_files
from conj.model.export import export_model
from conj.model.folder import check_model, read_decoder
from conj.model.weights import load_model


def exported(base: Path, folder: Path, **settings) -> Path:
    export_model(load_model(base), folder, base, is_writer=True, **settings)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_an_export_says_how_its_judge_is_sampled(tied_model, tmp_path):
    """Greedily, a judge that thinks falls into loops; and it is asked as its file says, which lies beside the weights."""
    sampling = decoding_of(load_judge("english-thinking"))
    out = exported(tied_model, tmp_path / "out", sampling=sampling, also={"judge.toml": "ü"})
    given = read_json(out / "generation_config.json")
    assert {name: given[name] for name in ("do_sample", *sampling)} == {"do_sample": True, **sampling}
    assert sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20} and decoding_of(load_judge("english")) == {}
    assert (out / "judge.toml").read_text("utf-8") == "ü"


@pytest.mark.parametrize("kind", DECODERS)
def test_an_export_is_the_same_model_for_transformers_and_for_conj(kind, tmp_path):
    """Weights, rope, ties, biases; and the export may be the base of the next run."""
    base = write_model(tmp_path / "base", tied=kind != "llama", **DECODERS[kind])
    out = exported(base, tmp_path / "out")
    ids = torch.arange(60)[None] * 7 + 3
    expected, found = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (base, out))
    assert torch.equal(found, expected)
    one, two = (read_decoder(folder) for folder in (base, out))
    assert (two.config.rope, two.dtype) == (one.config.rope, one.dtype)
    again = exported(out, tmp_path / "again")
    assert (again / "config.json").read_text() == (out / "config.json").read_text()


@pytest.mark.parametrize("kind", DECODERS)
def test_the_config_speaks_both_dialects_and_leaves_no_default_to_its_reader(kind, tmp_path):
    """transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`, and without them takes 10,000 without a word."""
    base = write_model(tmp_path / "base", **DECODERS[kind])
    config, rope = read_json(exported(base, tmp_path / "out") / "config.json"), read_decoder(base).config.rope
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == rope.theta
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["rope_scaling"] or {"rope_type": "default"})["rope_type"] == rope.kind
    if rope.kind == "yarn":  # transformers 4.51 takes the ratio for the factor
        original = config["rope_scaling"]["original_max_position_embeddings"]
        assert config["max_position_embeddings"] / original == rope.factor
    if config["model_type"] == "mistral":
        assert config["sliding_window"] is None


def test_what_the_base_held_for_others_stays_behind(tmp_path):
    """A repetition penalty and a temperature that nobody evaluated would else be every user's default."""
    base = write_model(tmp_path / "base")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "pad_token_id": 560}
    (base / "generation_config.json").write_text(json.dumps(sampling | {"eos_token_id": [560, 562]}))
    change_config(base, _name_or_path="/home/somebody/base")
    (base / "LICENSE.txt").write_text("may be passed on with this text")
    out = exported(base, tmp_path / "out")
    assert (out / "LICENSE.txt").read_text() == "may be passed on with this text"
    assert read_json(out / "generation_config.json") == {
        "do_sample": False, "eos_token_id": [560, 562], "pad_token_id": 560,
    }  # fmt: skip
    assert not GenerationConfig.from_pretrained(out).do_sample
    config = read_json(out / "config.json")
    assert not {"_name_or_path", "quantization_config"} & config.keys()


def test_transformers_does_not_warn_of_the_tokenizer_of_an_export(tmp_path, caplog):
    """Qwen2's has 151,643 pieces. Negative control: of a folder that does not say which version wrote it, transformers
    says that its tokenizer is Mistral's broken one, and whoever follows that has other tokens."""
    base = write_model(tmp_path / "base", vocab_size=101_000)
    spec = read_json(base / "tokenizer.json")
    spec["model"]["vocab"] |= {f"piece {i}": i for i in range(1_000, 101_000)}
    (base / "tokenizer.json").write_text(json.dumps(spec))
    out = exported(base, tmp_path / "out")
    for version, warns in ((read_json(base / "config.json")["transformers_version"], False), (None, True)):
        assert read_json(out / "config.json").get("transformers_version") == version
        AutoTokenizer.from_pretrained(out)
        assert ("incorrect regex pattern" in caplog.text) == warns
        change_config(out, transformers_version=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_export_has_the_dtype_that_was_stored_also_where_no_config_states_it(dtype, tmp_path):
    """bf16 weights without a word in the config were once exported as fp32, twice their size."""
    base = write_model(tmp_path / "base")
    path = base / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    change_config(base, dtype=None)
    out = exported(base, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert read_json(out / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    expected, found = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tokenizer_that_transformers_5_wrote_is_written_for_4_too(tmp_path):
    """Version 5's own class and its list of extra tokens are unknown to 4; the template stands in both places."""
    base = write_model(tmp_path / "base")
    path = base / "tokenizer_config.json"
    config = read_json(path) | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]}
    (base / "chat_template.jinja").write_text(config.pop("chat_template"))
    path.write_text(json.dumps(config))
    out = exported(base, tmp_path / "out")
    written = read_json(out / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert (
        written["chat_template"]
        == (out / "chat_template.jinja").read_text()
        == check_model(base, None).tokenizer.template.source
    )
    messages = judge_messages("天空", "blue", "red")
    one, two = (AutoTokenizer.from_pretrained(f).apply_chat_template(messages, tokenize=False) for f in (base, out))
    assert one == two


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "TokenizersBackend", None])
def test_an_export_says_that_its_tokenizer_is_tokenizer_json(tokenizer_class, tmp_path):
    """By the class that R1's Llamas name, transformers 5 drops their line breaks; and without the names of its inputs,
    version 4 returns token types, which `generate` refuses."""
    base = write_model(tmp_path / "base", **DECODERS["llama"])
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"tokenizer_class": tokenizer_class}))
    out, messages = exported(base, tmp_path / "out"), judge_messages("天空", "blue\n\nred", "red")
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert inputs["input_ids"] == check_model(base, None).tokenizer.prompt_ids(messages)
    written = read_json(out / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]


def test_what_lies_beside_a_base_does_not_end_an_export(tmp_path):
    """After all training: folders of a licence's or a file's name, a link that leads nowhere, text that UTF-8 cannot hold."""
    base = write_model(tmp_path / "base")
    for name in ("LICENSES", "vocab.json"):
        (base / name).mkdir()
    (base / "NOTICE").symlink_to("NOTICE")
    change_config(base, note="\ud800 天空")
    out = exported(base, tmp_path / "out")
    assert read_json(out / "config.json")["note"] == "\ud800 天空"
    assert not {"LICENSES", "vocab.json", "NOTICE"} & {path.name for path in out.iterdir()}


def test_a_window_that_the_base_did_not_reach_does_not_come_with_a_longer_context(tmp_path):
    """A missing sliding_window is one of 4,096; the config says the context that YaRN stretched it to."""
    base = write_model(tmp_path / "base", **DECODERS["qwen2, yarn"])
    rope = DECODERS["qwen2, yarn"]["rope_parameters"] | {"factor": 100.0}
    change_config(base, rope_parameters=rope, max_position_embeddings=64, use_sliding_window=True)
    path = base / "config.json"
    path.write_text(json.dumps({name: value for name, value in read_json(path).items() if name != "sliding_window"}))
    out = exported(base, tmp_path / "out")
    assert read_json(out / "config.json")["sliding_window"] is None
    assert read_decoder(out).config.rope == read_decoder(base).config.rope


def test_several_files_name_every_tensor_once(tmp_path):
    base = write_model(tmp_path / "base", tied=False)
    out = exported(base, tmp_path / "out", max_shard_bytes=100_000)
    assert len(weight_files(out)) > 1 and read_decoder(out).tensors.keys() == read_decoder(base).tensors.keys()


# ---- Other versions, in environments of their own ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_other_versions_of_transformers_read_an_export_as_the_same_model(kind, other_transformers, tmp_path):
    base = write_model(tmp_path / "base", **DECODERS[kind])
    out = exported(base, tmp_path / "out")
    conversations = [judge_messages("天空", "blue <|im_end|>", "红色")]
    found, expected = (read_by(packages, out, conversations, tmp_path) for packages in (other_transformers, None))
    assert found["version"] != expected["version"] and found["dtype"] == expected["dtype"] == "torch.float32"
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    assert found["ids"] == expected["ids"] and found["texts"] == expected["texts"]


@pytest.mark.slow
def test_transformers_4_reads_another_rope_from_the_config_that_5_writes(other_transformers, tmp_path):
    """Negative control: the base as transformers 5 saved it is another model there, without a word."""
    base = write_model(tmp_path / "base")
    found, expected = (read_by(packages, base, [], tmp_path)["logits"] for packages in (other_transformers, None))
    assert (torch.tensor(found) - torch.tensor(expected)).abs().max() > 1e-2
