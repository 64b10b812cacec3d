"""The fuzzer's model folders: a whole one of which each input damages one file, for the readers of training and sampling."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fuzz_common import Choose, Finding, chooser, pick
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from conj import InputError
from conj.data.judges import judge_prompt, load_judge
from conj.data.tokenizer import JudgeTokenizer
from conj.model.config import read_config
from conj.model.decoder import Decoder
from conj.model.folder import check_model, read_decoder
from conj.model.weights import load_model

CARD = load_judge("con-j")
# JSON texts put where a value was.
HOSTILE = [
    "null", "true", "-1", "0", "1", "2.5", "1e999", "-1e999", "NaN", "100000000", "1000000000", "9" * 19, "9" * 400,
]  # fmt: skip
HOSTILE += ["9" * 5000, '""', '"x"', '"' + "x" * 5000 + '"', "[]", "{}", "[null]", '{"a": 1}', '"\\ud800"', '"\\u0000"']
HOSTILE += ['"a\\nb"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 120 + "]" * 120]
HOSTILE += [
    '"../x.safetensors"', '"/etc/passwd"', '"{{ 1 / 0 }}"', '"{% for i in range(9) %}conj1placeholder{% endfor %}"',
]  # fmt: skip
HOSTILE += ['"{{ messages }}"', '"conj"', '"1"', '"\\u202e"']
NAMES = ["../x.safetensors", "/etc/passwd", "/dev/zero", "x.bin", "sub/x.safetensors", "..", "", "\u202e.safetensors"]
NAMES += ["\x00.safetensors", "a\nb.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", ".safetensors"]
NAMES += ["link.safetensors", "pipe.safetensors"]
JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
INDEX = "model.safetensors.index.json"
SLOT, TWIN = "@slot@", "@twin@"


@dataclass
class Folders:
    """One whole model in two layouts, of which each input damages one file."""

    root: Path
    files: dict[Path, bytes] = field(default_factory=dict)

    @classmethod
    def write(cls, root: Path) -> "Folders":
        """A Qwen2 of one layer with a tokenizer of bytes."""
        folders = cls(root)
        config = dict(
            model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, rope_parameters={"rope_theta": 1e4},
            tie_word_embeddings=False, max_position_embeddings=2048, eos_token_id=256, dtype="float32",
        )  # fmt: skip
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
        template = (
            "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        named = {"chat_template": template, "eos_token": "<|im_end|>"}
        contents = [json.dumps(config), tokenizer.to_str(), json.dumps(named), '{"eos_token_id": [256]}']
        for layout in ("single", "sharded"):
            (root / layout).mkdir(parents=True)
            for name, content in zip(JSON_FILES, contents):
                folders.put(root / layout / name, content.encode())
        torch.manual_seed(0)
        tensors = {n: p.detach() for n, p in Decoder(read_config(root / "single")).named_parameters()}
        folders.put(root / "single" / "model.safetensors", save(tensors))
        shards = {"1.safetensors": list(tensors)[:5], "2.safetensors": list(tensors)[5:]}
        for name, keys in shards.items():
            folders.put(root / "sharded" / name, save({key: tensors[key] for key in keys}))
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        folders.put(root / "sharded" / INDEX, json.dumps({"weight_map": weight_map}).encode())
        folders.put(root / "x.safetensors", save(tensors))  # a whole file, outside
        return folders

    def put(self, path: Path, content: bytes) -> None:
        self.files[path] = content
        path.write_bytes(content)


def edit_bytes(choose: Choose, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(1 + choose(6)):
        at, length = choose(len(content) + 1), choose(8)
        edits = [bytes([choose(256)]), b"", content[at : at + length] * 2, b"", bytes(length), b'"', b"}", b","]
        content[at : at + choose(3)] = pick(choose, edits)
    if choose(6) == 0:
        del content[choose(len(content) + 1) :]
    return bytes(content)


def edit_json(choose: Choose, content: bytes) -> tuple[bytes, bool]:
    """JSON with a value replaced, dropped, renamed or said twice; and whether a reader must refuse it (said twice)."""
    tree = json.loads(content)
    node, key = tree, None
    for _ in range(1 + choose(6)):
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        if not keys:
            break
        parent, key = node, pick(choose, keys)
        node = parent[key]
    edit, twice = choose(5), False
    if key is None or edit == 0:
        added = ["auto_map", "x", "added_tokens", "weight_map", "head_dim", "padding", "truncation"]
        tree = {**tree, pick(choose, added): SLOT}
    elif edit == 1 and isinstance(parent, dict):
        parent[TWIN] = pick(choose, [node, SLOT])
        twice = True
    elif edit == 2:
        del parent[key]
    elif edit == 3 and isinstance(parent, dict):
        parent[pick(choose, ["x", "", "a\nb", "\ud800", "x" * 3000])] = parent.pop(key)
    else:
        parent[key] = SLOT
    text = json.dumps(tree, ensure_ascii=bool(choose(2)))
    text = text.replace(f'"{SLOT}"', pick(choose, HOSTILE)).replace(f'"{TWIN}"', json.dumps(key))
    return text.encode("utf-8", "surrogatepass"), twice


@functools.cache
def empty_tensors(count: int) -> bytes:
    """Header entries of tensors without elements: the cheapest way to make a reader build many objects."""
    return b", ".join(b'"e%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % i for i in range(count))


def edit_weights(choose: Choose, content: bytes) -> tuple[bytes, bool]:
    """A safetensors file whose header lies; and whether its readers must refuse it."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    edit = choose(8)
    if edit == 0:
        sizes = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 4_000_001, 100_000_000]
        return pick(choose, sizes).to_bytes(8, "little") + content[8:], True
    if edit == 1:
        return content[: choose(len(content))], True
    if edit == 2:
        return content + bytes(1 + choose(9)), True
    if edit in (3, 4):
        header, refuse = edit_json(choose, header) if edit == 3 else (edit_bytes(choose, header), False)
        return len(header).to_bytes(8, "little") + header + body, refuse
    tree = json.loads(header)
    name = pick(choose, [n for n in tree if n != "__metadata__"])
    begin, end = tree[name]["data_offsets"]
    if edit == 5:
        shift = 4 * (1 + choose(4))
        moved = [[begin - shift, end], [begin, end + shift], [end, begin], [begin + shift, end + shift]]
        new = tree[name]["data_offsets"] = pick(choose, [*moved, [begin, begin], [0, 0]])
        if new == [begin, end]:
            return content, False
    elif edit == 6:
        shape = tree[name]["shape"]
        shapes = [[*shape, 2], [], [2**62, 4], [0, *shape], [-1], [*shape[:-1], shape[-1] + 1], [2**64], [1.5]]
        tree[name]["shape"] = pick(choose, shapes)
    header = json.dumps(tree).encode()
    if edit == 7:
        count = pick(choose, [1, 1, 1, 100, 100, 1000]) if choose(200) else pick(choose, [60_000, 500_000])
        header = header[:-1] + b", " + empty_tensors(count) + b"}"
    return len(header).to_bytes(8, "little") + header + body, True


@contextlib.contextmanager
def damaged(folders: Folders, choose: Choose) -> Iterator[tuple[Path, bool, bool]]:
    """A model folder with one file damaged, whether it must be refused, and whether its tokenizer is the whole one's."""
    folder = folders.root / pick(choose, ["single", "sharded"])
    weights = ["model.safetensors"] if folder.name == "single" else ["1.safetensors", "2.safetensors", INDEX]
    name = pick(choose, JSON_FILES + weights * 3)
    path, refuse, made = folder / name, False, []
    content = folders.files[path]
    kind = choose(12)
    if kind == 0:
        path.unlink()
        refuse = name != "generation_config.json"
        other = choose(6)
        if other == 0:
            path.mkdir()
        elif other == 1:
            os.mkfifo(path)
        elif other == 2:
            path.symlink_to(path)
        elif other == 3:
            path.symlink_to("/dev/zero")
        elif other == 4:
            refuse = folder.name == "sharded" and name.endswith("safetensors")
            made.append(folders.root / "moved")
            made[0].write_bytes(content)
            path.symlink_to(made[0])
        refuse = refuse or (name == "generation_config.json" and other in (0, 1, 3))
    elif kind == 1:
        made.append(folder / "chat_template.jinja")
        text = json.loads(folders.files[folder / "tokenizer_config.json"])["chat_template"].encode()
        made[0].write_bytes(edit_bytes(choose, text))
    elif name == INDEX and kind < 7:
        tree = json.loads(content)
        hostile = pick(choose, NAMES)
        tree["weight_map"][pick(choose, list(tree["weight_map"]))] = hostile
        path.write_bytes(json.dumps(tree).encode())
        refuse = True
        if hostile in ("link.safetensors", "pipe.safetensors"):
            made.append(folder / hostile)
            made[0].symlink_to(folders.root / "x.safetensors") if hostile[0] == "l" else os.mkfifo(made[0])
    elif kind < 10:
        content, refuse = (edit_json if name.endswith(".json") else edit_weights)(choose, content)
        path.write_bytes(content)
    else:
        path.write_bytes(edit_bytes(choose, content))
    try:
        yield folder, refuse, not (name.startswith("token") or kind == 1)
    finally:
        for extra in made:
            extra.unlink()
        if path.is_symlink() or not path.is_file():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(folders.files[path])


def attempt(function: Callable, *arguments):
    """The function's result, or the InputError it raised. Raises Finding for a message of more than a line."""
    try:
        return function(*arguments)
    except InputError as e:
        if len(str(e).splitlines()) != 1 or len(str(e)) > 1000 or not str(e).isprintable():
            raise Finding(f"not one line: {str(e)[:2000]!r}") from None
        return e


def fuzz_model_folder(data: bytes, folders: Folders) -> str:
    """Reads a damaged folder as training and sampling do. Returns `accepted` or `refused`; raises Finding."""
    with damaged(folders, chooser(data)) as (folder, refuse, same_tokenizer):
        config, model = attempt(read_decoder, folder), attempt(check_model, folder, None)
        tokenizer = attempt(JudgeTokenizer.load, folder) if isinstance(model, InputError) else model.tokenizer
        refused = [isinstance(result, InputError) for result in (config, tokenizer, model)]
        if refuse and not any(refused):
            raise Finding("believed: a folder that lies")
        if not refused[0] and same_tokenizer:
            load_model(folder)
        if not refused[1]:
            text = "\n问题 {x} <|im_end|>"
            ids = tokenizer.prompt_ids(judge_prompt(CARD, text, "", "b\ud800"))
            control = set(tokenizer.special.values())
            if control & {*tokenizer.encode_text(text), *tokenizer.completion_ids(text)[:-1]}:
                raise Finding("believed: text became a control token")
            tokenizer.decode(ids)
    return "refused" if any(refused) else "accepted"
