"""A sentencepiece `tokenizer.model`, as Llama-2 and Mistral have it, as the `tokenizer.json` that `transformers` makes of it.

A model of another kind is refused: one without byte fallback would lose characters without a word.
"""

import json
import tempfile
from pathlib import Path

from conj.data.chat_template import refusing
from conj.data.model_files import MAX_CONFIG_BYTES, read_model_file

# Of a sentencepiece model; the largest in use (Gemma's) has 4.2 MB and 256,000 pieces, the longest of them 31 characters.
MAX_PIECES_BYTES, MAX_PIECES, MAX_PIECE_LENGTH = 6_000_000, 600_000, 512


def convert_sentencepiece(folder: Path) -> tuple[dict, dict[str, str | None]]:
    """The tokenizer.json that `transformers` makes of a sentencepiece `tokenizer.model` as Llama-2 and Mistral have it,
    and the folder's bos_token and eos_token.

    Raises InputError for a model of another kind: one without byte fallback would lose characters without a word."""
    path = folder / "tokenizer.model"
    configs = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    bounds = {path.name: MAX_PIECES_BYTES} | dict.fromkeys(configs, MAX_CONFIG_BYTES)
    with refusing(f"{path}: cannot be converted"), tempfile.TemporaryDirectory() as beside:
        from transformers import LlamaTokenizer  # seconds to import
        from transformers.convert_slow_tokenizer import SentencePieceExtractor

        for name, max_bytes in bounds.items():  # transformers sees these files only, and none that is too large
            if (folder / name).exists():
                Path(beside, name).write_bytes(read_model_file(folder / name, max_bytes))
        model = SentencePieceExtractor(f"{beside}/{path.name}").proto
        pieces = model.pieces
        if len(pieces) > MAX_PIECES or any(len(piece.piece) > MAX_PIECE_LENGTH for piece in pieces):
            raise ValueError(f"expected at most {MAX_PIECES:,} pieces of {MAX_PIECE_LENGTH} characters")
        is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
        if not is_bpe or sum(piece.type == piece.BYTE for piece in pieces) != 256:
            raise ValueError("expected a BPE model with byte fallback, as Llama-2 and Mistral have")
        tokenizer = LlamaTokenizer.from_pretrained(beside, local_files_only=True)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    # sentencepiece never makes a control piece out of text; the merges that transformers makes up for it may.
    added = {token["content"] for token in spec["added_tokens"]}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) not in added]
    return spec, {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


def after_text_spec(spec: dict) -> dict:
    """The spec for text that does not start the prompt, where `transformers` puts no space before the first word."""
    words = spec.get("pre_tokenizer")
    if isinstance(words, dict) and words.get("type") == "Metaspace" and words.get("prepend_scheme") == "first":
        return spec | {"pre_tokenizer": words | {"prepend_scheme": "never"}}
    return spec
