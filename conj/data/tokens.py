"""Contrastive pairs as token ids: made once, and kept in a file of arrays that all ranks map.

`tokens.safetensors` in a run folder follows from pairs and tokenizer. It names what it was made of and holds the hash of
its own bytes; where either is not as it should be, it is made again. Rows and texts are read and encoded a chunk at a
time, and in memory is what a mapped file needs: where each text starts, ids of records, and the system's page cache.
"""

import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from conj import InputError
from conj.data import chat_template, tokenizer
from conj.data.files import locate_jsonl, open_atomic, sha256_file
from conj.data.progress import progress
from conj.data.tokenizer import JudgeTokenizer

TOKENS = "tokens.safetensors"
PAIR_COLUMNS = {"id": str, "prompt": list, "chosen": list, "rejected": list, "label": int, "pair_type": str}
CHUNK_ROWS = 1000  # read and encoded at a time
HEADER_BYTES = 4096  # a page, so that arrays are aligned; written last, when their lengths are known
LAYOUT = {  # arrays of one dimension; a text is a prompt, a chosen or a rejected judgment
    "values": "I32",  # token ids of all texts, one after the other
    "lengths": "I32",  # tokens of each text
    "prompts": "I32",  # which text each distinct prompt is
    "chosen": "I32",  # which text each pair's chosen judgment is; its rejected one is the next
    "prompt_of": "I32",  # which distinct prompt each pair has
    "pair_types": "I32",  # which of the types in `names`
    "is_eval": "U8",  # 1 for a pair that is held out from training
    "names": "U8",  # JSON: the record's id of each pair, and the types
}
DTYPES = {"I32": np.dtype("<i4"), "U8": np.dtype("u1")}


class Ragged(Sequence):
    """Token ids of many texts in one array. An item is a text, or a tuple of texts where `starts` has two dimensions."""

    def __init__(self, values: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.values, self.starts, self.lengths = values, starts, lengths  # (T,) int32; of each text, in `values`

    @classmethod
    def of(cls, items: "Ragged | Sequence") -> "Ragged":
        """From texts, or from tuples of texts. A text that several items share is held once."""
        if isinstance(items, Ragged):
            return items
        grouped = [item if isinstance(item, tuple) else (item,) for item in items]
        texts = {id(text): text for group in grouped for text in group}
        ends = np.cumsum([len(text) for text in texts.values()], dtype=np.int64)
        starts = dict(zip(texts, [0, *ends[:-1].tolist()]))
        where = np.array([[(starts[id(text)], len(text)) for text in group] for group in grouped], dtype=np.int64)
        where = where if any(isinstance(item, tuple) for item in items) else where.reshape(-1, 2)
        values = np.concatenate([np.array(text, dtype=np.int32) for text in texts.values()])
        return cls(values, where[..., 0], where[..., 1])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int):
        starts, lengths = self.starts[i], self.lengths[i]
        if self.starts.ndim == 1:
            return array("i", self.values[starts : starts + lengths].tobytes())
        return tuple(array("i", self.values[s : s + n].tobytes()) for s, n in zip(starts, lengths))

    def update(self, digest) -> None:
        """Adds all texts, in order, to a hash."""
        digest.update(self.lengths.astype("<i8").tobytes())
        for start, length in zip(self.starts.ravel().tolist(), self.lengths.ravel().tolist()):
            digest.update(self.values[start : start + length])


@dataclass(frozen=True, kw_only=True)
class TokenizedPairs:
    """N pairs as token ids. Pairs with the same prompt text hold the same prompt number."""

    ids: list[str]  # (N,) id of the prompt's record
    is_eval: list[bool]  # (N,) held out from training
    prompts: Ragged  # token ids of each distinct prompt; may be given as a list
    prompt_of: list[int]  # (N,) row of `prompts`
    judgments: Ragged  # (N,) chosen and rejected token ids, each with its end token; may be given as a list
    pair_types: list[str] | None = None  # (N,) how each was made; for the log alone

    def __post_init__(self):
        for name in ("prompts", "judgments"):
            object.__setattr__(self, name, Ragged.of(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.ids)

    def num_tokens(self, pair: int) -> int:
        """Tokens of the prompt and the longer of its two judgments."""
        return int(self._num_tokens[pair])

    def within(self, num_tokens: int) -> list[int]:
        """The pairs of at most so many tokens."""
        return np.flatnonzero(self._num_tokens <= num_tokens).tolist()

    @cached_property
    def _num_tokens(self) -> np.ndarray:
        return self.prompts.lengths[np.array(self.prompt_of, dtype=np.int64)] + self.judgments.lengths.max(axis=1)

    @cached_property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each distinct prompt."""
        return self.prompts.lengths.tolist()

    @cached_property
    def judgment_tokens(self) -> list[int]:
        """(N,) tokens a pair's judgments take in a pack. The last token of a judgment is only predicted, never read."""
        return (self.judgments.lengths.sum(axis=1) - 2).tolist()

    def fingerprint(self) -> str:
        """sha256 over all token ids in row order."""
        digest = hashlib.sha256(np.array(self.prompt_of, dtype="<i8").tobytes())
        self.prompts.update(digest)
        self.judgments.update(digest)
        return digest.hexdigest()


# ---- From text ----


def tokenize_pairs(rows: Iterable[dict], tokenizer: JudgeTokenizer, vocab_size: int) -> TokenizedPairs:
    """Rows of `pairs.jsonl` as ids. Raises InputError (row number) on messages of another shape and ids over the model's."""
    values = io.BytesIO()
    arrays = _tokenize(rows, tokenizer, vocab_size, values.write)
    return _as_pairs({"values": np.frombuffer(values.getbuffer(), DTYPES["I32"]), **arrays})


def _tokenize(
    rows: Iterable[dict], tokenizer: JudgeTokenizer, vocab_size: int, write: Callable[[array], object]
) -> dict[str, np.ndarray]:
    """The arrays of LAYOUT; `write` is given `values`, a chunk at a time."""
    table = {name: array("i") for name in ("lengths", "prompts", "chosen", "prompt_of", "pair_types", "is_eval")}
    numbers, types, ids = {}, {}, []  # of distinct prompts, by their hash; of types; of records
    numbered = enumerate(rows, 1)
    while chunk := list(islice(numbered, CHUNK_ROWS)):
        texts, num_before = [], len(table["lengths"])  # (row number, what the text is made of)
        for number, row in chunk:
            with _naming(number):
                prompt = [[message["role"], _content(message)] for message in row["prompt"]]
                key = hashlib.sha256(json.dumps(prompt).encode()).digest()
                (chosen,), (rejected,) = row["chosen"], row["rejected"]
                judgments = [tokenizer.completion_parts(_content(message)) for message in (chosen, rejected)]
                if key not in numbers:
                    numbers[key] = len(numbers)
                    table["prompts"].append(num_before + len(texts))
                    texts.append((number, tokenizer.prompt_parts(row["prompt"])))
            table["chosen"].append(num_before + len(texts))
            texts += [(number, parts) for parts in judgments]
            table["prompt_of"].append(numbers[key])
            table["pair_types"].append(types.setdefault(row["pair_type"], len(types)))
            table["is_eval"].append(row.get("split") == "eval")
            ids.append(row["id"])
        for encoded in _encode(texts, tokenizer, vocab_size):
            table["lengths"].append(len(encoded))
            write(encoded)
    arrays = {name: np.array(column, dtype=DTYPES[LAYOUT[name]]) for name, column in table.items()}
    names = json.dumps({"ids": ids, "pair_types": list(types)}).encode()
    return arrays | {"names": np.frombuffer(names, DTYPES["U8"])}


def _encode(texts: list[tuple[int, list]], tokenizer: JudgeTokenizer, vocab_size: int) -> Iterator[array]:
    """Token ids of texts, of which their row's number and what they are made of is given."""
    encoded = {}
    for after_text in (False, True):
        pieces = [p[0] for _, parts in texts for p in parts if isinstance(p, tuple) and p[1] is after_text]
        encoded[after_text] = iter(tokenizer.encode_texts(pieces, after_text=after_text))
    for number, parts in texts:
        ids = array("i")
        with _naming(number):
            for part in parts:
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids.extend(tokenizer.check_inert(part[0], next(encoded[part[1]])))
        if (highest := max(ids)) >= vocab_size:
            raise InputError(
                f"pairs.jsonl:{number}: token id {highest} is outside the model's vocabulary of {vocab_size}"
            )
        yield ids


@contextmanager
def _naming(number: int) -> Iterator[None]:
    try:
        yield
    except (TypeError, LookupError, ValueError) as e:
        expected = "prompt messages and one chosen and one rejected message"
        raise InputError(f"pairs.jsonl:{number}: expected {expected}, found {e!r}") from None


def _content(message: dict) -> str:
    if not isinstance(message["content"], str):
        raise TypeError(f"content {message['content']!r:.60}")
    return message["content"]


# ---- The file ----


def tokens_key(pairs: Path, judge: JudgeTokenizer, vocab_size: int) -> dict[str, str]:
    """Everything that the tokens of a `pairs.jsonl` follow from, field by field. Reads the file."""
    modules = (Path(module.__file__).read_bytes() for module in (tokenizer, chat_template))
    code = hashlib.sha256(b"".join([Path(__file__).read_bytes(), *modules, version("tokenizers").encode()])).hexdigest()
    fields = {"pairs": sha256_file(pairs), "tokenizer": judge.fingerprint, "vocabulary": str(vocab_size)}
    return fields | {"code": code}


def write_tokens(path: Path, pairs: Path, judge: JudgeTokenizer, vocab_size: int, key: dict[str, str]) -> None:
    """Writes the tokens of a `pairs.jsonl`, with their key. Raises InputError as `tokenize_pairs` does."""
    digest = hashlib.sha256()
    with open_atomic(path) as file:
        file.write(bytes(HEADER_BYTES))

        def write(data: array | np.ndarray) -> None:
            digest.update(data)
            file.write(data)

        arrays = _tokenize(_rows(pairs), judge, vocab_size, write)
        sizes = {"values": (file.tell() - HEADER_BYTES) // DTYPES["I32"].itemsize}
        for name, data in arrays.items():
            write(data)
            sizes[name] = len(data)
        file.seek(0)
        file.write(_header(sizes, {"key": json.dumps(key), "sha256": digest.hexdigest()}))


def find_tokens(places: Sequence[Path], pairs: Path, judge: JudgeTokenizer, vocab_size: int) -> Path:
    """The first of `places` that holds the tokens of a `pairs.jsonl`. Where none does they are written to the first, and a
    line says why not to one that is there. Raises InputError as `tokenize_pairs` does."""
    key = tokens_key(pairs, judge, vocab_size)
    for path in (path for path in dict.fromkeys(places) if path.exists()):
        try:
            check_tokens(path, key)
            return path
        except InputError as e:
            print(f"{e}; not used")
    write_tokens(places[0], pairs, judge, vocab_size, key)
    check_tokens(places[0], key)  # of two processes that began at once, one may have written into the other's file
    return places[0]


def _rows(pairs: Path) -> Iterator[dict]:
    size = pairs.stat().st_size
    with progress(total=size, desc="tokens", unit="B", unit_scale=True) as bar:
        for _, offset, row in locate_jsonl(pairs, PAIR_COLUMNS):
            bar.update(offset - bar.n)
            yield row
        bar.update(size - bar.n)


def _header(sizes: dict[str, int], metadata: dict[str, str]) -> bytes:
    """Of a safetensors file with the arrays of LAYOUT, of so many numbers each."""
    content, start = {"__metadata__": metadata}, 0
    for name, kind in LAYOUT.items():
        stop = start + sizes[name] * DTYPES[kind].itemsize
        content[name] = {"dtype": kind, "shape": [sizes[name]], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content).encode()
    assert len(text) <= HEADER_BYTES - 8
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


def _map(path: Path) -> tuple[dict[str, str], str, np.ndarray, dict[str, np.ndarray]]:
    """A file's key, the sha256 it states, and its bytes past the header, mapped: all of them, and array by array. Raises
    InputError unless its header is as `write_tokens` writes it, and its length as the header says."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
        content = json.loads(head[8:])
        metadata, sizes = content["__metadata__"], {name: content[name]["shape"][0] for name in LAYOUT}
        key, sha256 = dict(json.loads(metadata["key"])), metadata["sha256"]
        spans = {name: slice(*content[name]["data_offsets"]) for name in LAYOUT}
        whole = head == _header(sizes, metadata) and path.stat().st_size == HEADER_BYTES + spans["names"].stop
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError) as e:
        raise InputError(f"{path}: not a file of tokens: {e}") from None
    if not whole:
        raise InputError(f"{path}: not a whole file of tokens")
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES).view(np.ndarray)
    return key, sha256, data, {name: data[span].view(DTYPES[LAYOUT[name]]) for name, span in spans.items()}


def check_tokens(path: Path, key: dict[str, str] | None = None) -> str:
    """sha256 of a file's arrays. Raises InputError unless they are whole, have the hash that the file states, and, with
    `key`, are of that key."""
    made, stated, data, _ = _map(path)
    found = hashlib.sha256(data).hexdigest()
    if stated != found:
        raise InputError(f"{path}: was changed: its arrays have not the sha256 it states")
    if others := [name for name in key or () if made.get(name) != key[name]]:
        raise InputError(f"{path}: made with another {', '.join(others)}")
    return found


def read_key(path: Path) -> dict[str, str]:
    """The key that a file states."""
    return _map(path)[0]


def map_tokens(path: Path) -> TokenizedPairs:
    """The pairs of a file that `check_tokens` found sound."""
    return _as_pairs(_map(path)[3])


def _as_pairs(arrays: dict[str, np.ndarray]) -> TokenizedPairs:
    values, lengths, chosen = arrays["values"], arrays["lengths"].astype(np.int64), arrays["chosen"]
    starts, judgments = np.cumsum(lengths) - lengths, np.stack([chosen, chosen + 1], axis=1)
    names = json.loads(arrays["names"].tobytes())
    return TokenizedPairs(
        ids=names["ids"], is_eval=arrays["is_eval"].astype(bool).tolist(), prompt_of=arrays["prompt_of"].tolist(),
        prompts=Ragged(values, starts[arrays["prompts"]], lengths[arrays["prompts"]]),
        judgments=Ragged(values, starts[judgments], lengths[judgments]),
        pair_types=[names["pair_types"][kind] for kind in arrays["pair_types"]],
    )  # fmt: skip
