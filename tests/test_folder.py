"""What a model folder says: a table of folders, each read as the installed transformers reads it, or refused by name.

A folder that conj accepts must be the same model in transformers: the same logits, dtype and ends. One that its readers
take for different models is refused, and the message names both places.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, DECODERS, LLAMA3, YARN, change_config, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conj import InputError
from conj.data.tokenizer import JudgeTokenizer
from conj.model.attention import build_segments
from conj.model.config import Untrainable
from conj.model.folder import check_finite, check_model, read_decoder
from conj.model.weights import load_model

GONE = object()  # of a key: it is taken out
V4 = {"rope_parameters": GONE, "dtype": GONE}
YARN_4 = {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")} | {"type": "yarn"}
LLAMA3_4 = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
TURN_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    names = ("qwen2", "qwen3", "llama", "llama, biases", "mistral")
    folders = {name: write_model(root / name, tied=False, **DECODERS[name]) for name in names}
    folders["tied"] = write_model(root / "tied")
    folders["sharded"] = write_model(root / "sharded", max_shard_size="100KB")
    folders["qwen3, heads of 128"] = write_model(root / "q128", model_type="qwen3", head_dim=128)
    for kind in ("llama", "qwen2"):
        folders[f"{kind}, a key head each"] = write_model(root / f"{kind} mha", model_type=kind, num_key_value_heads=4)
    return folders


def config(**changes):
    """Changes to config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not GONE}))

    return change


def weights(edit):
    """`edit` takes the tensors of model.safetensors and changes them."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def cast(dtype: torch.dtype, names: str = ""):
    return weights(lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if names in n}))


def both(*changes):
    def change(folder: Path) -> None:
        for part in changes:
            part(folder)

    return change


def file(name: str, **content):
    return lambda folder: (folder / name).write_text(json.dumps(content))


def generation(**content):
    return file("generation_config.json", **content)


def tokenizer(**changes):
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index(edit):
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        names = load_file(folder / "model.safetensors") if not path.exists() else {}
        content = {"weight_map": dict.fromkeys(names, "model.safetensors")} if names else json.loads(path.read_text())
        edit(content["weight_map"])
        path.write_text(json.dumps(content))

    return change


def swap_files(weight_map: dict) -> None:
    first, *_, second = weight_map
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def stale_single(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")


def stray(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


def template_file(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    (folder / "chat_template.jinja").write_text(content.pop("chat_template"))
    path.write_text(json.dumps(content))


def more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 600, "content": "<|more|>"})
    path.write_text(json.dumps(content))


def head_of_its_own(scale: float):
    return weights(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}))


def stored_frequencies(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def one_bad(value: float):
    return lambda tensors: tensors["model.norm.weight"].__setitem__(3, value)


ACCEPTED = {  # base, change
    "as transformers 5 saves it": ("qwen2", config()),
    "as transformers 4 saves it": ("qwen2", config(**V4, rope_theta=1e6, torch_dtype="float32")),
    "a whole number for theta": ("qwen2", config(**V4, rope_theta=1000000)),
    "rope_scaling null": ("qwen2", config(**V4, rope_theta=1e6, rope_scaling=None)),
    "both dialects, the same": ("qwen2", config(rope_theta=1e6, torch_dtype="float32", rope_scaling=None)),
    "no theta: it is 10,000": ("qwen2", config(**V4)),
    "theta beside a type alone": ("qwen2", config(rope_parameters={"rope_type": "default"}, rope_theta=5e4)),
    "yarn as 4 writes it": ("qwen2", config(**V4, rope_theta=1e6, rope_scaling=YARN_4, max_position_embeddings=64)),
    "yarn, stretched already": ("qwen2", config(**V4, rope_theta=1e6, rope_scaling=YARN_4, max_position_embeddings=256)),
    "yarn as 5 writes it": ("qwen2", config(rope_parameters=YARN, max_position_embeddings=64)),
    "yarn by both names": ("qwen2", config(rope_parameters=YARN | {"type": "yarn"}, max_position_embeddings=256)),
    "yarn with its own scale": ("qwen2", config(rope_parameters=YARN | {"attention_factor": 1.3}, max_position_embeddings=64)),
    "yarn, other bounds": ("qwen2", config(rope_parameters=YARN | {"beta_fast": 4, "beta_slow": 0.5}, max_position_embeddings=64)),
    "yarn, bounds as whole dimensions": ("qwen2", config(rope_parameters=YARN | {"truncate": True}, max_position_embeddings=64)),
    "the config's own length before yarn, the same": ("qwen2", config(rope_parameters=YARN, max_position_embeddings=256, original_max_position_embeddings=64)),
    "yarn in a llama": ("llama", config(rope_parameters=YARN, max_position_embeddings=64)),
    "yarn in a mistral": ("mistral", config(rope_parameters=YARN, max_position_embeddings=64)),
    "yarn in a qwen3": ("qwen3", config(rope_parameters=YARN, max_position_embeddings=256)),
    "llama3 as 4 writes it": ("llama", config(**V4, rope_theta=5e5, rope_scaling=LLAMA3_4)),
    "llama3 as 5 writes it": ("llama", config(rope_parameters=LLAMA3)),
    "llama3 in both dialects": ("llama", config(rope_parameters=LLAMA3, rope_theta=5e5, rope_scaling=LLAMA3_4)),
    "llama3 in a qwen2": ("qwen2", config(rope_parameters=LLAMA3)),
    "all of the head is rotated": ("llama", config(partial_rotary_factor=1.0)),
    "qwen3": ("qwen3", config()),
    "qwen3, no head_dim: it is 128": ("qwen3, heads of 128", config(head_dim=GONE)),
    "llama": ("llama", config()),
    "llama with biases": ("llama, biases", config()),
    "llama, no key heads: as many as queries": ("llama, a key head each", config(num_key_value_heads=GONE)),
    "key heads null: as many as queries": ("qwen2, a key head each", config(num_key_value_heads=None)),
    "llama, head_dim null": ("llama", config(head_dim=None)),
    "mistral": ("mistral", config()),
    "mistral, a window as long as its context": ("mistral", config(sliding_window=2048)),
    "a window that is off": ("qwen2", config(sliding_window=64, use_sliding_window=False)),
    "a switch without a window": ("qwen2", config(sliding_window=None, use_sliding_window=True)),
    "tied": ("tied", config()),
    "tied, and the same head stored": ("tied", head_of_its_own(1)),
    "no word on ties": ("qwen2", config(tie_word_embeddings=GONE)),
    "several files": ("sharded", config()),
    "an index of one file": ("qwen2", index(lambda weight_map: None)),
    "frequencies stored": ("llama", weights(stored_frequencies)),
    "keys that no one knows": ("qwen2", config(_name_or_path="x", pretraining_tp=2, my_key={"a": 1})),
    "dtype null": ("qwen2", config(dtype=None)),
    "no dtype, bf16 weights": ("qwen2", both(config(dtype=GONE), cast(torch.bfloat16))),
    "no dtype, fp16 weights": ("qwen2", both(config(dtype=GONE), cast(torch.float16))),
    "fp32 weights that a config calls bf16": ("qwen2", config(dtype="bfloat16")),
    "bf16 weights, norms in fp32": ("qwen2", both(config(dtype="bfloat16"), cast(torch.bfloat16, "proj"), cast(torch.bfloat16, "e"))),
    "the template in a file of its own": ("qwen2", template_file),
    "a template that draws the token for padding": ("qwen2", tokenizer(chat_template="{{ pad_token }}" + CHATML)),
    "a template that draws a token of its own": ("qwen2", tokenizer(chat_template="{{ my_token }}" + CHATML, extra_special_tokens={"my_token": END_OF_TEXT})),
    "a tokenizer's names in an earlier form, the same": ("qwen2", file("special_tokens_map.json", eos_token={"content": TURN_END}, pad_token=END_OF_TEXT)),
    "several ends of text": ("qwen2", both(config(eos_token_id=[5, 6]), generation(eos_token_id=[6, 7]))),
    "generation's end alone": ("qwen2", both(config(eos_token_id=None), generation(eos_token_id=7))),
}  # fmt: skip
REFUSED = {  # base, change, what is said
    "saved again by transformers 4.51": ("qwen2", config(rope_theta=1e4), "rope_theta: expected 1000000.0, as rope_parameters.rope_theta says, found 10000.0"),
    "two thetas in two objects": ("qwen2", config(rope_parameters=YARN, rope_scaling=YARN_4 | {"rope_theta": 1e5}), "rope_scaling.rope_theta: expected 1000000.0, as rope_parameters.rope_theta"),
    "two factors": ("qwen2", config(rope_parameters=YARN, rope_scaling=YARN_4 | {"factor": 2.0}), "rope_scaling.factor: expected 4.0, as rope_parameters.factor says, found 2.0"),
    "stretched in one place": ("qwen2", config(rope_theta=1e6, rope_scaling=YARN_4), "rope_scaling.factor: expected None, as rope_parameters.factor says"),
    "two types": ("qwen2", config(rope_parameters=YARN | {"type": "linear"}), "rope_parameters.type: expected 'yarn', as rope_parameters.rope_type says, found 'linear'"),
    "yarn without its length": ("qwen2", config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}), "missing 'original_max_position_embeddings'"),
    "yarn to another length": ("qwen2", config(rope_parameters=YARN, max_position_embeddings=128), "max_position_embeddings: expected 64 or, stretched, 256"),
    "a factor in words": ("qwen2", config(rope_parameters=YARN | {"factor": "four"}), "factor: expected a number"),
    "llama3 the wrong way round": ("llama", config(rope_parameters=LLAMA3 | {"low_freq_factor": 9.0}), "high_freq_factor: expected more than"),
    "two lengths before yarn": ("qwen2", config(rope_parameters=YARN, max_position_embeddings=256, original_max_position_embeddings=32), "original_max_position_embeddings: expected 64, as rope_parameters.original_max_position_embeddings says, found 32"),
    "two lengths before llama3": ("llama", config(rope_parameters=LLAMA3, original_max_position_embeddings=32), "original_max_position_embeddings: expected 64, as rope_parameters"),
    "a type of null": ("qwen2", config(rope_parameters={"rope_type": None, "rope_theta": 1e6}), "rope_parameters.rope_type: expected a value, or no such key, found None"),
    "no rope but false": ("qwen2", config(rope_parameters=False, rope_theta=1e6), "rope_parameters: expected a JSON object, found False"),
    "types of fewer layers": ("qwen2", config(layer_types=["full_attention"]), "layer_types: expected 2, as num_hidden_layers says, found 1"),
    "an end in words": ("qwen2", config(eos_token_id="5"), "config.json: eos_token_id: expected an id or a list of ids, found '5'"),
    "an end in words for generation": ("qwen2", generation(eos_token_id=[5, "6"]), "generation_config.json: eos_token_id: expected an id"),
    "a filling in words": ("qwen2", config(pad_token_id="x"), "pad_token_id: expected an id of the vocabulary, found 'x'"),
    "several begins": ("qwen2", generation(bos_token_id=[1, 2]), "generation_config.json: bos_token_id: expected an id"),
    "two ends in two of the tokenizer's files": ("qwen2", file("special_tokens_map.json", eos_token=END_OF_TEXT), "special_tokens_map.json: eos_token: expected '<|im_end|>', as tokenizer_config.json says, found '<|endoftext|>'"),
    "a begin in one of the tokenizer's files": ("qwen2", both(tokenizer(chat_template="{{ bos_token }}" + CHATML), file("special_tokens_map.json", bos_token=END_OF_TEXT)), "special_tokens_map.json: bos_token: expected None"),
    "a token in one of the tokenizer's files": ("qwen2", file("added_tokens.json", word=563), "added_tokens.json: 'word': expected id None, as tokenizer.json says, found 563"),
    "two lists of added tokens": ("qwen2", tokenizer(added_tokens_decoder={"560": {"content": END_OF_TEXT}}), "added_tokens_decoder: '<|im_start|>': expected id 561, as tokenizer.json says, found None"),
    "a token without an id": ("qwen2", tokenizer(additional_special_tokens=["word"]), "additional_special_tokens: expected added tokens of tokenizer.json, found 'word'"),
    "several templates": ("qwen2", tokenizer(chat_template=[{"name": "default", "template": CHATML}]), "chat_template: expected one, found several"),
    "a template that no encoding has": ("qwen2", tokenizer(chat_template="\ud800" + CHATML), "a lone surrogate"),
    "a list for the rope": ("qwen2", config(rope_parameters=[1]), "rope_parameters: expected a JSON object"),
    "theta in words": ("qwen2", config(**V4, rope_theta="1e6"), "rope_theta: expected a number"),
    "theta true": ("qwen2", config(**V4, rope_theta=True), "rope_theta: expected a number"),
    "two dtypes": ("qwen2", config(torch_dtype="float16"), "torch_dtype: expected 'float32', as dtype says, found 'float16'"),
    "another class than its type": ("qwen2", config(architectures=["LlamaForCausalLM"]), "architectures: expected ['Qwen2ForCausalLM'], as model_type 'qwen2' says"),
    "a reward model": ("qwen2", config(architectures=["Qwen2ForSequenceClassification"]), "architectures: expected"),
    "no class": ("qwen2", config(architectures=GONE), "architectures: expected"),
    "remote code": ("qwen2", config(auto_map={"AutoConfig": "m.py"}), "auto_map"),
    "qwen2, no key heads: 32": ("qwen2", config(num_key_value_heads=GONE), "expected a multiple of num_key_value_heads (32)"),
    "tied, and another head stored": ("tied", head_of_its_own(2), "lm_head.weight: expected the embeddings, as tie_word_embeddings"),
    "a head of its own that is missing": ("tied", config(tie_word_embeddings=False), "missing 1 tensors, first lm_head.weight"),
    "no norm of queries": ("qwen3", weights(lambda t: t.pop("model.layers.0.self_attn.q_norm.weight")), "missing 1 tensors, first model.layers.0.self_attn.q_norm"),
    "a bias too many": ("llama", weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})), "unexpected tensor"),
    "a stale file beside an index": ("sharded", stale_single, "expected model.safetensors.index.json or model.safetensors, found both"),
    "a second file without an index": ("qwen2", stray, "found consolidated.safetensors, model.safetensors"),
    "an index that is wrong": ("sharded", index(swap_files), "where it lies"),
    "an index that names too much": ("sharded", index(lambda w: w.update(extra=w["model.norm.weight"])), "'extra': expected in none of its files"),
    "more words than rows": ("qwen2", more_tokens, "the tokenizer has ids up to 600, the vocabulary 600 entries"),
    "an end outside the vocabulary": ("qwen2", config(eos_token_id=600), "eos_token_id: expected ids of the vocabulary, found [600]"),
    "generation's end outside it": ("qwen2", generation(eos_token_id=[1, 700]), "eos_token_id: expected ids of the vocabulary, found [700]"),
    "more rows than are stored": ("qwen2", config(vocab_size=700), "expected shape (700, 64)"),
}  # fmt: skip
UNTRAINABLE = {
    "a window": ("mistral", config(sliding_window=64), "sliding_window: expected attention to the whole text, found a window of 64"),
    "mistral, no window: it is 4,096": ("mistral", config(sliding_window=GONE, max_position_embeddings=8192), "found a window of 4096, transformers' where the key is missing"),
    "a window that is on": ("qwen2", config(sliding_window=64, use_sliding_window=True), "use_sliding_window"),
    "layers with a window": ("qwen3", config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "linear rope": ("llama", config(**V4, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type: expected one of default, yarn, llama3, found 'linear'"),
    "dynamic rope": ("llama", config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "found 'dynamic'"),
    "yarn of another kind": ("qwen2", config(rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, max_position_embeddings=64), "mscale: expected no such parameter"),
    "yarn that transformers 4 does not know": ("qwen2", config(rope_parameters=YARN | {"truncate": False}, max_position_embeddings=64), "truncate: expected no such parameter, found False"),
    "half a head is rotated": ("llama", config(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1"),
    "attention by chunks": ("qwen2", config(dual_chunk_attention_config={"chunk_size": 64}), "dual_chunk_attention_config: expected None"),
    "no activation": ("qwen2", config(hidden_act=None), "hidden_act: expected 'silu', found None"),
    "a dtype that torch does not have": ("qwen2", config(dtype="torch.float32"), "dtype: expected one of float32, bfloat16, float16, found 'torch.float32'"),
    "quantized, by its other name": ("qwen2", config(compression_config={"quant_method": "compressed-tensors"}), "compression_config: expected none"),
    "another activation": ("llama", config(hidden_act="gelu"), "hidden_act: expected 'silu', found 'gelu'"),
    "biases that vLLM and transformers place otherwise": ("qwen3", config(attention_bias=True), "attention_bias: expected False"),
    "another type": ("llama", config(model_type="olmo2", architectures=["Olmo2ForCausalLM"]), "model_type: expected one of qwen2"),
    "no type": ("llama", config(model_type=GONE), "model_type: expected one of qwen2, qwen3, llama, mistral, found none"),
    "quantized, or what is left of it": ("qwen2", config(quantization_config={"quant_method": "gptq"}), "quantization_config: expected none"),
    "whole numbers for weights": ("qwen2", cast(torch.int8, "mlp"), "expected one of F32, BF16, F16, found I8"),
}  # fmt: skip


def variant(bases: dict, folder: Path, base: str, change) -> Path:
    shutil.copytree(bases[base], folder)
    change(folder)
    return folder


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_folder_that_is_accepted_is_the_same_model_in_transformers(name, bases, tmp_path):
    """Logits, sizes, ties, the tokens that end a text, and the template's ids."""
    folder = variant(bases, tmp_path / "model", *ACCEPTED[name])
    ids = torch.arange(60) * 7 + 3
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(ids[None]).logits[0]
    found = load_model(folder).logits(ids, torch.arange(len(ids)), build_segments([len(ids)], [None]))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    read, judge, official = read_decoder(folder), check_model(folder, None), AutoConfig.from_pretrained(folder)
    for key in ("vocab_size", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "model_type"):
        assert getattr(read.config, key) == getattr(official, key), key
    assert judge.untrainable is None
    reader = AutoTokenizer.from_pretrained(folder)
    stated = [official.eos_token_id, GenerationConfig.from_pretrained(folder).eos_token_id]
    ends = {i for eos in stated for i in (eos if isinstance(eos, list) else [eos]) if i is not None}
    assert ends | {reader.eos_token_id} <= set(judge.end_ids)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "回答1 is 更好"}]
    rendered = reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert judge.tokenizer.prompt_ids(messages) == reader(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_its_readers_would_not_agree_on_is_refused_everywhere(name, bases, tmp_path):
    """By whoever samples, trains or evaluates with it; the line names what differs."""
    base, change, message = REFUSED[name]
    folder = variant(bases, tmp_path / "model", base, change)
    with pytest.raises(InputError) as error:
        check_model(folder, None)
    assert message in str(error.value) and str(folder) in str(error.value) and str(error.value).isprintable()
    assert not isinstance(error.value, Untrainable)


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_a_folder_that_only_training_cannot_use_is_refused_by_training_only(name, bases, tmp_path):
    base, change, message = UNTRAINABLE[name]
    folder = variant(bases, tmp_path / "model", base, change)
    with pytest.raises(Untrainable) as error:
        read_decoder(folder)
    assert message in str(error.value)
    assert check_model(folder, None).untrainable == str(error.value)


def test_the_table_has_at_least_60_folders_no_two_of_a_name():
    assert len(ACCEPTED | REFUSED | UNTRAINABLE) == len(ACCEPTED) + len(REFUSED) + len(UNTRAINABLE) >= 60


MIXED = both(cast(torch.bfloat16), cast(torch.float16, "mlp"))
ACCEPTED["bf16 and fp16"] = ("qwen2", MIXED)
STORED = {
    "bf16 and fp16": "float32",
    "as transformers 5 saves it": "float32", "no dtype, bf16 weights": "bfloat16", "no dtype, fp16 weights": "float16",
    "fp32 weights that a config calls bf16": "float32", "bf16 weights, norms in fp32": "bfloat16", "dtype null": "float32",
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_the_dtype_is_that_of_most_weights_whatever_the_config_says(name, bases, tmp_path):
    """What a config states is a wish of whoever loads it; the export keeps what was stored."""
    assert read_decoder(variant(bases, tmp_path / "model", *ACCEPTED[name])).dtype == STORED[name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(value, dtype, bases, tmp_path):
    folder = variant(bases, tmp_path / "model", "qwen2", cast(dtype))
    check_finite(read_decoder(folder).tensors.items())
    weights(one_bad(value))(folder)
    with pytest.raises(InputError, match="model.norm.weight: expected finite weights, found 1 that"):
        check_finite(read_decoder(folder).tensors.items())


def test_the_largest_finite_numbers_are_finite(bases, tmp_path):
    """Negative control: the exponent one below that of infinity is a number."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = variant(bases, tmp_path / str(dtype), "qwen2", cast(dtype))
        weights(one_bad(torch.finfo(dtype).max))(folder)
        check_finite(read_decoder(folder).tensors.items())


def test_the_context_is_what_vllm_takes_for_it(bases, tmp_path):
    """YaRN could reach four times as far, but only where max_position_embeddings says so too."""
    for name, context in (("yarn as 4 writes it", 64), ("yarn, stretched already", 256)):
        assert check_model(variant(bases, tmp_path / str(context), *ACCEPTED[name]), None).max_length == context


def test_a_change_is_seen_by_the_comparison(bases, tmp_path):
    """Negative control: another theta makes other logits of the same weights."""
    folder = variant(bases, tmp_path / "model", "qwen2", config())
    ids = torch.arange(60) * 7 + 3
    segments = build_segments([60], [None])
    before = load_model(folder).logits(ids, torch.arange(60), segments)
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    after = load_model(folder).logits(ids, torch.arange(60), segments)
    assert ((after - before).norm() / before.norm()).item() > 1e-3
    assert JudgeTokenizer.load(folder).encode_text("天空") == JudgeTokenizer.load(bases["qwen2"]).encode_text("天空")
