"""Texts and model folders made to break conj: every one must end in a verdict or none, a model or one line of refusal.

    python scripts/fuzz.py verdicts --runs 1000000          # judgments for the parsers of conj.data.verdicts
    python scripts/fuzz.py model-folder --runs 200000       # damaged folders for the readers of training and sampling
    python scripts/fuzz.py verdicts --runs 100000 --coverage  # inputs chosen by the code they reach (needs atheris)

Each input grows from a few bytes: as many decisions of a grammar. The grammar knows, by construction, which verdict a
text states, and which folders must be refused. Findings: an exception that is no InputError, a message of more than a
line, an input that takes over a second of a core, memory that grows by over 500 MB, a verdict that the text does not
state, a lie that is believed. Exit code 1, and the input's number: `--only NUMBER` runs it alone.
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MAX_SECONDS, MAX_GROWTH_MB = 1.0, 500.0
RUNS_PER_PROCESS = 20_000
KEY, REASON = "更好的回答", "原因"
Choose = Callable[[int], int]  # choose(n): a number from 0 to n - 1


class Finding(AssertionError):
    """What must not happen, in a line."""


def chooser(data: bytes) -> Choose:
    """Decisions read off `data`; 0 once it is used up."""
    stream = iter(data)

    def choose(n: int) -> int:
        value = next(stream, 0)
        if n > 256:
            value = value << 16 | next(stream, 0) << 8 | next(stream, 0)
        return value % n

    return choose


def pick(choose: Choose, items):
    return items[choose(len(items))]


# ---- Judgments ----

WORDS = [
    "回答1更好。", "回答2", "x", " ", "\n", "1", "2", "\t", "第1个", "更好的是2", ",", "，", ":", "：", "。",
    "null", "\u2028",
]  # fmt: skip
ODD = [
    "\\", "'", "<|im_end|>", "<|im_start|>assistant\n", "\ud83d", "\x00", "\ufeff", "e\u0301", "//", "/*", "#",
    "\\n", "`",
]  # fmt: skip
MARKS = ['"', "“", "{", "}", "[", "]", "{name}", '{"a": 1}', "```", "```json\n", "'}", "()", '\\"']
KEYS = [KEY, REASON, f'"{KEY}"', f"“{KEY}”：1", f'"{KEY}": 2', f'", "{KEY}": 1}}', f'{{"{KEY}": 2}}']
# A reason that quotes the format without escaping it. A plain word stands before the key, or the text would be one that
# anybody reads as a finished judgment.
MENTIONS = [
    f'应输出"{KEY}": 1}}',
    f'例如{{"{KEY}": 2}}，但',
    f'例如{{"{REASON}": "解释", "{KEY}": 1}}',
    f'写"{KEY}"',
    f"没有{KEY}: 2}}",
]
WRONG = [
    "3", "0", "true", "1.0", "null", "[1]", "[]", "{}", '"回答1和回答2"', '"1或2"', '" 1"', "-1", '"１"', "12",
    "1e0", '""', "NaN",
]  # fmt: skip
WRONG += ["1" * 5000, "[" * 2000 + "]" * 2000]
TRAPS = [  # of the published parser
    f'{{"{REASON}": "回答1不好，回答2明显更好","更好的',
    f'{{"{REASON}": "回答2更好，回答1差"',
    "两个回答都好，分数是1",
    f'{{"{REASON}": "x", "{KEY}": 1',
]
STATED_VALUE = re.compile(KEY + r'["\']?\s*[:：]\s*["\']?(?:回答)?([12])')


def some_text(choose: Choose, pieces: list[str], most: int = 12) -> str:
    text = "".join(pick(choose, pieces) for _ in range(choose(most)))
    return text * (1 + choose(100_000) // max(1, len(text))) if choose(500) == 499 else text


def value_text(choose: Choose, verdict: int) -> str:
    return pick(choose, [f"{verdict}", f'"{verdict}"', f'"回答{verdict}"'])


def valid_judgment(choose: Choose, value: str, reason: object) -> str:
    """A JSON object that states `value`, in any order, spacing and escaping, perhaps with other keys."""
    ascii_only = choose(4) == 0
    fields = [(REASON, json.dumps(reason, ensure_ascii=ascii_only)), (KEY, value)]
    if choose(3) == 0:
        extra = pick(choose, [1, None, [{KEY: 1}], {KEY: 2}, {"a": {KEY: 1}}, f'"{KEY}": 1', "}"])
        fields.append((pick(choose, ["注", "", "score", KEY + "x"]), json.dumps(extra, ensure_ascii=ascii_only)))
    if choose(2):
        fields.reverse()
    colon, comma = pick(choose, [": ", ":", " : ", ":\n"]), pick(choose, [", ", ",", ",\n  ", " ,"])
    body = comma.join(json.dumps(key, ensure_ascii=ascii_only) + colon + text for key, text in fields)
    return "{" + pick(choose, ["", "\n", " "]) + body + pick(choose, ["", "\n", " "]) + "}"


def make_judgment(choose: Choose) -> tuple[str, set]:
    """A text, and what a parser may say of it: the verdict it states, or None, or either where the text is damaged."""
    verdict = 1 + choose(2)
    reason = some_text(choose, WORDS + ODD + MARKS + KEYS)
    raw = some_text(choose, WORDS + ODD + MARKS + MENTIONS)  # as written by a model that does not escape
    prose = some_text(choose, WORDS, 5)
    value = value_text(choose, verdict)
    whole = valid_judgment(choose, value, reason)
    kind = choose(17)
    if kind == 0:
        return whole, {verdict}
    if kind == 1:
        return prose + whole[: choose(len(whole))], {None}
    if kind == 2:
        return f'{{"{REASON}": "{raw}", "{KEY}": {value}}}', {verdict, None}
    if kind == 3:
        ending = pick(choose, ["", '"', '",', f'", "{KEY}"', f'", "{KEY}":', f'", "{KEY}": {value}', f'", "{KEY}": "'])
        text = f'{{"{REASON}": "{raw}{ending}'
        return text[: len(text) - choose(len(text))] if choose(2) else text, {None}
    if kind == 4:
        pieces = [p for p in WORDS + ODD + MARKS + KEYS if "{" not in p]
        return some_text(choose, pieces, 30), {None}
    if kind == 5:
        other = 1 + choose(2)
        text = prose.join([whole, valid_judgment(choose, value_text(choose, other), "x"), *[whole] * choose(3)])
        return text, {verdict, None} if other == verdict else {None}
    if kind == 6:
        inner = json.dumps(pick(choose, [{KEY: verdict}, [{KEY: verdict}], [[{REASON: "x", KEY: verdict}]]]))
        return prose + '{"' + pick(choose, [REASON, "a", KEY]) + f'": {inner}}}', {None}
    if kind == 7:
        return valid_judgment(choose, pick(choose, WRONG), reason), {None}
    if kind == 8:
        other = 1 + choose(2)
        text = f'{{"{KEY}": {value}, "{REASON}": {json.dumps(reason)}, "{KEY}": {value_text(choose, other)}}}'
        return text, {verdict} if other == verdict else {None}
    if kind == 9:
        fence = pick(choose, ["", "```", "```json\n", "```\n", "'''"])
        return prose + fence + whole + fence.strip("json\n") + prose, {verdict, None}
    if kind == 10:
        colon, comma, quote = (
            pick(choose, [":", "："]),
            pick(choose, ["，", ",", " ", ""]),
            pick(choose, ['"', "“", "'"]),
        )
        return f"{{{quote}{REASON}{quote}{colon}{quote}{raw}{quote}{comma}{quote}{KEY}{quote}{colon}{value}}}", {
            verdict,
            None,
        }
    if kind == 11:
        return pick(choose, TRAPS) + prose.replace(":", "").replace("：", ""), {None}
    if kind == 12:
        hole = choose(len(whole) + 1)
        return whole[:hole] + some_text(choose, WORDS + ODD + MARKS, 4) + whole[hole + choose(4) :], {1, 2, None}
    if kind == 13:
        return "".join(pick(choose, WORDS + ODD + MARKS + KEYS + MENTIONS + [whole]) for _ in range(choose(40))), {
            1,
            2,
            None,
        }
    if kind == 14:
        many = pick(choose, ["[", "{", '{"a":', '"', '{"', "\\", "回答", f'"{KEY}"', " ", "```", '{"a":1}'])
        text = many * (choose(100_000) // len(many) // 10 ** choose(4))
        return pick(choose, [text, f'{{"{REASON}": "{text}', f'{{"{REASON}": "{text}", "{KEY}": ']), {None}
    if kind == 15:  # the reason quotes a finished judgment; what follows says otherwise, or is cut off
        quoted = f'{raw}", "{KEY}": {value_text(choose, 3 - verdict)}}}{prose}'
        ending = f'", "{KEY}": {value}}}'
        if choose(2):
            return f'{{"{REASON}": "{quoted}{ending}', {verdict, None}
        return f'{{"{REASON}": "{quoted}{ending}'[: -1 - choose(len(value) + 1)], {None}
    text = bytes(choose(256) for _ in range(choose(256))).decode("utf-8", "replace")
    return text, {1, 2, None} if KEY in text else {None}


def fuzz_verdict(data: bytes, parse: Callable | None = None) -> str:
    """Makes a judgment of `data` and parses it. Returns `accepted` or `refused`; raises Finding."""
    from conj.data.verdicts import parse_reason, parse_released, parse_strict

    text, allowed = make_judgment(chooser(data))
    verdict = (parse or parse_strict)(text)
    if verdict.value not in allowed:
        raise Finding(f"invented: {verdict} where {allowed} is stated: {text[:2000]!r}")
    if verdict.value is not None and str(verdict.value) not in STATED_VALUE.findall(unescaped(text)):
        raise Finding(f"invented: {verdict}, which stands behind no key: {text[:2000]!r}")
    if (verdict.value in (1, 2)) != (verdict.rung != "none") or parse_released(text).value not in (1, 2, None):
        raise Finding(f"malformed: {verdict}: {text[:2000]!r}")
    if not isinstance(parse_reason(text), str):
        raise Finding(f"malformed: the reason is no text: {text[:2000]!r}")
    return "refused" if verdict.value is None else "accepted"


def unescaped(text: str) -> str:
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text) if "\\u" in text else text


# ---- Model folders ----

# JSON texts put where a value was.
HOSTILE = [
    "null", "true", "-1", "0", "1", "2.5", "1e999", "-1e999", "NaN", "100000000", "1000000000", "9" * 19,
    "9" * 400,
]  # fmt: skip
HOSTILE += [
    "9" * 5000, '""', '"x"', '"' + "x" * 5000 + '"', "[]", "{}", "[null]", '{"a": 1}', '"\\ud800"', '"\\u0000"',
    '"a\\nb"',
]  # fmt: skip
HOSTILE += [
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 120 + "]" * 120,
    '"../x.safetensors"',
    '"/etc/passwd"',
]
HOSTILE += [
    '"{{ 1 / 0 }}"', '"{% for i in range(9) %}conj1placeholder{% endfor %}"', '"{{ messages }}"', '"conj"',
    '"1"', '"\\u202e"',
]  # fmt: skip
NAMES = [
    "../x.safetensors", "/etc/passwd", "/dev/zero", "x.bin", "sub/x.safetensors", "..", "",
    "\u202e.safetensors", "\x00.safetensors",
]  # fmt: skip
NAMES += [
    "a\nb.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", ".safetensors", "link.safetensors",
    "pipe.safetensors",
]  # fmt: skip
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
        import torch
        from safetensors.torch import save
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        from conj.model.qwen2 import Qwen2, read_config

        folders = cls(root)
        config = dict(model_type="qwen2", vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        config |= dict(
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, rope_parameters={"rope_theta": 1e4}
        )
        config |= dict(tie_word_embeddings=False, max_position_embeddings=2048, eos_token_id=256, dtype="float32")
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
        common = {
            "config.json": json.dumps(config).encode(),
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}).encode(),
            "generation_config.json": b'{"eos_token_id": [256]}',
        }
        for layout in ("single", "sharded"):
            (root / layout).mkdir(parents=True)
            for name, content in common.items():
                folders.put(root / layout / name, content)
        torch.manual_seed(0)
        tensors = {n: p.detach() for n, p in Qwen2(read_config(root / "single")).named_parameters()}
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
        edits = [
            bytes([choose(256)]),
            b"",
            content[at : at + length] * 2,
            os.urandom(0),
            bytes(length),
            b'"',
            b"}",
            b",",
        ]
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
        tree = {
            **tree,
            pick(choose, ["auto_map", "x", "added_tokens", "weight_map", "head_dim", "padding", "truncation"]): SLOT,
        }
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
        size = pick(
            choose, [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 4_000_001, 100_000_000]
        )
        return size.to_bytes(8, "little") + content[8:], True
    if edit == 1:
        return content[: choose(len(content))], True
    if edit == 2:
        return content + bytes(1 + choose(9)), True
    if edit == 3:
        header, twice = edit_json(choose, header)
        return len(header).to_bytes(8, "little") + header + body, twice
    if edit == 4:
        header = edit_bytes(choose, header)
        return len(header).to_bytes(8, "little") + header + body, False
    tree = json.loads(header)
    name = pick(choose, [n for n in tree if n != "__metadata__"])
    begin, end = tree[name]["data_offsets"]
    if edit == 5:
        shift = 4 * (1 + choose(4))
        new = pick(
            choose,
            [
                [begin - shift, end],
                [begin, end + shift],
                [end, begin],
                [begin + shift, end + shift],
                [begin, begin],
                [0, 0],
            ],
        )
        tree[name]["data_offsets"] = new
        if new == [begin, end]:
            return content, False
    elif edit == 6:
        shape = tree[name]["shape"]
        tree[name]["shape"] = pick(
            choose, [[*shape, 2], [], [2**62, 4], [0, *shape], [-1], [*shape[:-1], shape[-1] + 1], [2**64], [1.5]]
        )
    else:
        count = pick(choose, [1, 1, 1, 100, 100, 1000]) if choose(200) else pick(choose, [60_000, 500_000])
        header = json.dumps(tree)[:-1].encode() + b", " + empty_tensors(count) + b"}"
        return len(header).to_bytes(8, "little") + header + body, True
    header = json.dumps(tree).encode()
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
        refuse = name not in ("generation_config.json",)
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
        if hostile == "link.safetensors":
            made.append(folder / hostile)
            made[0].symlink_to(folders.root / "x.safetensors")
        elif hostile == "pipe.safetensors":
            made.append(folder / hostile)
            os.mkfifo(made[0])
    elif name.endswith(".safetensors") and kind < 10:
        content, refuse = edit_weights(choose, content)
        path.write_bytes(content)
    elif name.endswith(".json") and kind < 10:
        content, refuse = edit_json(choose, content)
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
    from conj import InputError

    try:
        return function(*arguments)
    except InputError as e:
        if len(str(e).splitlines()) != 1 or len(str(e)) > 1000 or not str(e).isprintable():
            raise Finding(f"not one line: {str(e)[:2000]!r}") from None
        return e


def fuzz_model_folder(data: bytes, folders: Folders) -> str:
    """Reads a damaged folder as training and sampling do. Returns `accepted` or `refused`; raises Finding."""
    from conj import InputError
    from conj.data.prompts import JudgeTokenizer, judge_messages
    from conj.model.folder import check_model
    from conj.model.weights import check_model_folder, load_model

    with damaged(folders, chooser(data)) as (folder, refuse, same_tokenizer):
        config, model = attempt(check_model_folder, folder), attempt(check_model, folder, None)
        tokenizer = attempt(JudgeTokenizer.load, folder) if isinstance(model, InputError) else model.tokenizer
        refused = [isinstance(result, InputError) for result in (config, tokenizer, model)]
        if refuse and not any(refused):
            raise Finding("believed: a folder that lies")
        if not refused[0] and same_tokenizer:
            load_model(folder)
        if not refused[1]:
            text = "\n问题 {x} <|im_end|>"
            ids = tokenizer.prompt_ids(judge_messages(text, "", "b\ud800"))
            control = set(tokenizer.special.values())
            if control & {*tokenizer.encode_text(text), *tokenizer.completion_ids(text)[:-1]}:
                raise Finding("believed: text became a control token")
            tokenizer.decode(ids)
    return "refused" if any(refused) else "accepted"


# ---- Runs ----


@dataclass
class Tally:
    counts: Counter = field(default_factory=Counter)  # accepted, refused, exceptions, invented, slow, other
    slowest: tuple[float, int] = (0.0, -1)  # seconds of a core, number of the input
    growth_mb: float = 0.0  # of the peak, the largest of all processes
    findings: list[str] = field(default_factory=list)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_one(target: Callable, data: bytes, number: int, tally: Tally) -> None:
    began = time.process_time()
    try:
        tally.counts[target(data)] += 1
    except Finding as e:
        kind = str(e).partition(":")[0]
        tally.counts["invented" if kind in ("invented", "believed") else "other"] += 1
        tally.findings.append(f"{number}: {e}")
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of Rust code is no Exception
        tally.counts["exceptions"] += 1
        tally.findings.append(f"{number}: {type(e).__name__}: {str(e)[:500]!r}")
    seconds = time.process_time() - began
    tally.slowest = max(tally.slowest, (seconds, number))
    if seconds > MAX_SECONDS:
        tally.counts["slow"] += 1
        tally.findings.append(f"{number}: took {seconds:.2f} s")


def input_bytes(seed: int, number: int) -> bytes:
    rng = random.Random(seed * 1_000_000_007 + number)
    return rng.randbytes(rng.choice((16, 64, 200)))


def report(tally: Tally, began: float, out: Path | None) -> int:
    """Prints the table and the findings. Returns the exit code."""
    if tally.growth_mb > MAX_GROWTH_MB:
        tally.findings.append(f"memory grew by {tally.growth_mb:.0f} MB")
    kinds = ("accepted", "refused", "exceptions", "invented", "other")
    row = {"runs": sum(tally.counts[kind] for kind in kinds)} | {kind: tally.counts[kind] for kind in kinds}
    row |= {"over_1_s": tally.counts["slow"], "slowest_ms": round(tally.slowest[0] * 1000, 1)}
    row |= {"slowest_input": tally.slowest[1], "growth_mb": round(tally.growth_mb)}
    row["wall_s"] = round(time.monotonic() - began, 1)
    print(" | ".join(row), " | ".join(map(str, row.values())), sep="\n", flush=True)
    for finding in tally.findings[:20]:
        print("FINDING", finding.encode("utf-8", "backslashreplace").decode(), flush=True)
    if out is not None:
        out.write_text(json.dumps(row | {"findings": len(tally.findings)}) + "\n")
    return 1 if tally.findings else 0


def prepare(kind: str, root: Path) -> Callable[[bytes], str]:
    """The target, with everything imported and used once, so that growth of memory is the inputs' own."""
    if kind == "verdicts":
        return fuzz_verdict
    from conj.model import weights

    # Building even one layer takes longer than all else; which shapes a config asks for does not depend on the folder.
    weights.parameter_shapes = functools.lru_cache(20)(weights.parameter_shapes)
    folders = Folders.write(root)
    weights.load_model(root / "single")  # imports what torch imports late
    for count in (60_000, 500_000):
        empty_tensors(count)
    return functools.partial(fuzz_model_folder, folders=folders)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("target", choices=("verdicts", "model-folder"), help="what reads the inputs")
    parser.add_argument("--runs", type=int, default=10_000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--only", type=int, default=None, help="number of the only input to run")
    parser.add_argument("--coverage", action="store_true", help="let atheris choose inputs by the code they reach")
    parser.add_argument("--json", type=Path, default=None, help="file for the table's row")
    args = parser.parse_args()
    began = time.monotonic()
    if args.coverage:
        return run_coverage(args, began)
    numbers = range(args.runs) if args.only is None else range(args.only, args.only + 1)
    # A process that reads folders for ever grows: native code keeps some kB of every tokenizer. A stage reads one.
    chunks = [numbers[i : i + RUNS_PER_PROCESS] for i in range(0, len(numbers), RUNS_PER_PROCESS)]
    total, spawn = Tally(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for tally in pool.map(functools.partial(run_chunk, args.target, args.seed), chunks):
            total.counts += tally.counts
            total.slowest = max(total.slowest, tally.slowest)
            total.growth_mb = max(total.growth_mb, tally.growth_mb)
            total.findings += tally.findings
            print(dict(total.counts), file=sys.stderr, flush=True)
    return report(total, began, args.json)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None, ignore_cleanup_errors=True
    ) as root:
        yield Path(root)


def run_chunk(kind: str, seed: int, numbers: range) -> Tally:
    tally = Tally()
    with scratch_folder() as root:
        target = prepare(kind, root)
        run_one(target, b"", -1, Tally())
        base_mb = peak_mb()
        for number in numbers:
            if number % 1000 == 0:
                faulthandler.dump_traceback_later(300, exit=True)  # a hang in Rust code heeds no signal of Python's
            run_one(target, input_bytes(seed, number), number, tally)
        faulthandler.cancel_dump_traceback_later()
        tally.growth_mb = peak_mb() - base_mb
    return tally


def run_coverage(args, began: float) -> int:
    import atheris

    read = ["conj.data", "json_repair"] if args.target == "verdicts" else ["conj.data", "conj.model", "conj.sample"]
    tally = Tally()
    with scratch_folder() as root:
        with atheris.instrument_imports(include=read):
            target = prepare(args.target, root)
            target(b"")
        base_mb = peak_mb()

        def one(data: bytes) -> None:
            number = sum(tally.counts.values()) - tally.counts["slow"]
            before = len(tally.findings)
            run_one(target, data, number, tally)
            tally.findings[before:] = [f"{finding} (bytes {data.hex()})" for finding in tally.findings[before:]]
            if number + 1 == args.runs:
                tally.growth_mb = peak_mb() - base_mb
                code = report(tally, began, args.json)
                shutil.rmtree(root, ignore_errors=True)
                os._exit(code)  # libFuzzer does not come back

        flags = [f"-seed={args.seed + 1}", "-max_len=400", "-rss_limit_mb=0", f"-runs={2 * args.runs}"]
        atheris.Setup([sys.argv[0], *flags], one)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
