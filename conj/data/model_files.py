"""Files of a model folder, read with bounds: nothing in it is trusted, and nothing is believed twice."""

import json
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from conj import InputError
from conj.data.files import brief, first_line, listed

INDEX = "model.safetensors.index.json"  # of a model whose weights are spread over several files
SINGLE = "model.safetensors"
CONFIG = "config.json"
JUDGE_FILE = "judge.toml"  # as which judge a model was trained
TOKENIZER, SENTENCEPIECE = ("tokenizer.json",), ("tokenizer.model", "special_tokens_map.json", "added_tokens.json")
OTHER_TEXTS = (CONFIG, "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
TEXT_FILES = (*OTHER_TEXTS, *TOKENIZER, *SENTENCEPIECE)  # all that conj reads but weights and their index
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # patterns; whoever passes the model on passes these on
# Bounds on what a model folder may hold, above the largest in use (Gemma 3: a tokenizer of 33 MB, half a million merges;
# DeepSeek V3: an index of 9 MB; Qwen2's headers have 40 kB). They bound time and memory before anything is parsed.
MAX_CONFIG_BYTES = 4_000_000
MAX_HEADER_BYTES = 2_000_000
MAX_INDEX_BYTES = 16_000_000
MAX_TOKENIZER_BYTES = 40_000_000
MAX_BRACKETS = 1_500_000


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those that its index names, or its only one.

    Raises InputError when there are none, the index is not sound, or readers would take different ones: beside an index
    transformers prefers `model.safetensors`, and without one vLLM reads every file there is."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        files = indexed_files(folder / INDEX)
        if SINGLE in found and [path.name for path in files] != [SINGLE]:
            raise InputError(
                f"{folder}: expected {INDEX} or {SINGLE}, found both, of which readers take one or the other: delete the stale one"
            )
        return files
    if not found:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        pickle = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
        raise InputError(f"{folder}: not a model folder: expected {SINGLE} or {INDEX}{pickle}")
    if found != [SINGLE]:
        raise InputError(
            f"{folder}: expected {SINGLE} alone, or {INDEX} to say which files count, found {listed(found)}"
        )
    return [folder / SINGLE]


def deciding_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide results: configuration, tokenizer, chat template and weights.

    Raises InputError as `weight_files` does."""
    weights, names = weight_files(folder), {path.name for path in folder.iterdir() if path.is_file()}
    texts = (folder / name for name in names if decides(name, names) and not name.endswith(".safetensors"))
    return sorted({*texts, *weights})


def decides(name: str, names: Collection[str]) -> bool:
    """Whether a file of this name decides results, among others of a model folder."""
    tokenizer = TOKENIZER if TOKENIZER[0] in names else SENTENCEPIECE
    return name in (*OTHER_TEXTS, *tokenizer, INDEX) or name.endswith(".safetensors")


def read_model_file(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """A file of a model folder. Raises InputError when it is missing, no regular file (a pipe would block) or larger."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: expected a file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a model folder: {path.name} is missing") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: expected at most {max_bytes:,} bytes, found more")
    return data


def read_model_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict:
    """A JSON object of a model folder. Raises InputError when it is missing, malformed, too large, or says a thing twice."""
    return _parse_object(read_model_file(path, max_bytes), path)


def _parse_object(data: bytes, path: Path) -> dict:
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:  # each may become an object of 70 bytes
        raise InputError(f"{path}: expected at most {MAX_BRACKETS:,} brackets, found more")
    try:
        content = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """An object; of a key that stands in it twice every reader takes what it likes."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{brief(name)} stands {times} times in one object")
    return content


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file, not read yet."""

    file: Path
    dtype: str  # as safetensors calls it: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # bytes from the file's begin
    stop: int


def read_header(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, StoredTensor]:
    """{name: tensor} of a safetensors file. Raises InputError unless it is whole: a header of a bounded size that names no
    tensor twice (readers take the last one without a word), and, by safetensors itself, offsets that leave no hole and do
    not overlap, sizes that follow from shapes, and a file as long as all that."""
    try:
        if not os.path.isfile(path):
            raise InputError(f"{path}: expected a file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > max_header_bytes:
                raise InputError(f"{path}: expected a header of at most {max_header_bytes:,} bytes, found {length:,}")
            header = file.read(length)
        content = _parse_object(header, path) if len(header) == length else {}
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not whole (not a whole safetensors file): {first_line(e)}") from None
    begin = 8 + length
    return {
        name: StoredTensor(file=path, dtype=entry["dtype"], shape=tuple(entry["shape"]),
            start=begin + entry["data_offsets"][0], stop=begin + entry["data_offsets"][1])
        for name, entry in content.items() if name != "__metadata__"
    }  # fmt: skip


def stored_tensors(folder: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, StoredTensor]:
    """{name: tensor} of a model folder's weights; reads headers only.

    Raises InputError when a file is not whole, a tensor stands in two of them, or the index says otherwise."""
    tensors = {}
    for path in weight_files(folder):
        header = read_header(path, max_header_bytes)
        if twice := header.keys() & tensors.keys():
            raise InputError(f"{path}: {brief(min(twice))} stands in {tensors[min(twice)].file.name} too")
        tensors |= header
    if (folder / INDEX).exists():
        named = read_model_json(folder / INDEX, MAX_INDEX_BYTES)["weight_map"]
        found = {name: tensor.file.name for name, tensor in tensors.items()}
        for name in sorted(named.keys() | found.keys()):
            if named.get(name) != found.get(name):
                where = f"in {found[name]}" if name in found else "in none of its files"
                raise InputError(
                    f"{folder / INDEX}: {brief(name)}: expected {where}, where it lies, found {brief(named.get(name))}"
                )
    return tensors


def indexed_files(index: Path) -> list[Path]:
    """The files that a `model.safetensors.index.json` spreads the weights over.

    Raises InputError when it is malformed, or names a file that is missing, not safetensors or outside its folder."""
    weight_map = read_model_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map, found {brief(weight_map)}")
    if wrong := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise InputError(f"{index}: expected file names, found {brief(wrong[0])}")
    folder, files = index.parent.resolve(), []
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if name != path.name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: expected a .safetensors file of this folder, found {brief(name)}")
        if not os.path.exists(path):  # not path.exists(), which raises for a name that is too long
            raise InputError(f"{index}: names {brief(name)}, which is missing")
        if path.resolve().parent != folder and not _is_of_the_cache(path.resolve(), folder):
            raise InputError(f"{index}: expected a file of this folder, found {brief(name)}, a link out of it")
        files.append(path)
    return files


def _is_of_the_cache(file: Path, folder: Path) -> bool:
    """Whether `folder` is CACHE/MODEL/snapshots/COMMIT of the hub, and `file` lies where its links lead: in MODEL/blobs, or
    from there in CACHE/blobs/XX, which all models share."""
    model = folder.parent.parent
    return folder.parent.name == "snapshots" and (
        file.parent == model / "blobs" or file.parent.parent == model.parent / "blobs"
    )
