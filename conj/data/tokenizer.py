"""Text to token ids and back, with no control token in reach of what a user wrote.

Text is data: questions, answers and judgments are encoded by a tokenizer that knows no special tokens, so an
answer that contains `<|im_end|>` stays text. The model's own chat template draws the frame; each piece of it
is encoded around the user's text, never by formatting a filled template.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from conj import InputError
from conj.data.files import brief, first_line, replace_surrogates
from conj.data.model_files import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, read_model_file, read_model_json

PLACEHOLDER = re.compile(r"conj(\d+)placeholder")
# Of a sentencepiece model; the largest in use (Gemma's) has 4.2 MB and 256,000 pieces, the longest of them 31 characters.
MAX_PIECES_BYTES, MAX_PIECES, MAX_PIECE_LENGTH = 6_000_000, 600_000, 512


def _placeholder(i: int) -> str:
    return f"conj{i}placeholder"


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a library raises on a malformed file becomes an InputError; a panic of its Rust code is no Exception."""
    try:
        yield
    except InputError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise InputError(f"{what}: {first_line(e)}") from None
        raise


def _control_tokens(added: list[dict], plain: Tokenizer) -> dict[str, int]:
    """{token: id} of a tokenizer's added tokens. Raises ValueError when they could not be told from text."""
    special = {}
    for token in added:
        name, number = token["content"], token["id"]
        if not isinstance(name, str) or not name or name in special:
            raise ValueError(f"expected added tokens with a name each, found {brief(name)}")
        if type(number) is not int or not 0 <= number < 2**31 or plain.id_to_token(number) not in (None, name):
            raise ValueError(f"added token {brief(name)}: expected an id of its own, found {brief(number)}")
        special[name] = number
    for name in special:
        if not set(special.values()).isdisjoint(plain.encode(replace_surrogates(name), add_special_tokens=False).ids):
            raise ValueError(f"the text {brief(name)} would become a control token")
    return special


def _convert_sentencepiece(folder: Path) -> tuple[dict, dict[str, str | None]]:
    """The tokenizer.json that `transformers` makes of a sentencepiece `tokenizer.model` as Llama-2 and Mistral have it,
    and the folder's bos_token and eos_token.

    Raises InputError for a model of another kind: one without byte fallback would lose characters without a word."""
    path = folder / "tokenizer.model"
    configs = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    bounds = {path.name: MAX_PIECES_BYTES} | dict.fromkeys(configs, MAX_CONFIG_BYTES)
    with _refusing(f"{path}: cannot be converted"), tempfile.TemporaryDirectory() as beside:
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


def _after_text(spec: dict) -> dict:
    """The spec for text that does not start the prompt, where `transformers` puts no space before the first word."""
    words = spec.get("pre_tokenizer")
    if isinstance(words, dict) and words.get("type") == "Metaspace" and words.get("prepend_scheme") == "first":
        return spec | {"pre_tokenizer": words | {"prepend_scheme": "never"}}
    return spec


def _token_name(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


@dataclass(frozen=True, kw_only=True)
class JudgeTokenizer:
    """A tokenizer in two halves: `plain` encodes text and knows no special token; `special` holds their ids."""

    plain: Tokenizer
    inner: Tokenizer  # the same for text that something stands before; another one for sentencepiece only
    special: dict[str, int]  # control token -> id
    chat_template: str
    eos: str  # the token that ends the assistant's turn
    bos: str | None  # the token that templates may start with
    fingerprint: str  # sha256 over everything that decides the ids

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> "JudgeTokenizer":
        """Reads `tokenizer.json`, or a sentencepiece `tokenizer.model` where there is none, and `tokenizer_config.json`
        (with `chat_template.jinja`) of a Hugging Face model folder. `chat_template` takes the place of the folder's own.

        Raises InputError when a file is missing or malformed, or when there is no chat template or end token."""
        folder = Path(folder)
        if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
            spec, names = read_model_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES), {}
        else:
            spec, names = _convert_sentencepiece(folder)
        config = read_model_json(folder / "tokenizer_config.json") | names
        template = config.get("chat_template") if chat_template is None else chat_template
        bos, eos = _token_name(config.get("bos_token")), _token_name(config.get("eos_token"))
        with _refusing(f"{folder}: tokenizer cannot be read"):
            if chat_template is None and (folder / "chat_template.jinja").exists():
                template = read_model_file(folder / "chat_template.jinja").decode()
                template = template.replace("\r\n", "\n").replace("\r", "\n")
            # Truncation and padding would cut or fill every text without a word.
            left_out = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            plain = inner = Tokenizer.from_str(json.dumps(spec | left_out))
            if (after_text := _after_text(spec)) is not spec:
                inner = Tokenizer.from_str(json.dumps(after_text | left_out))
            special = _control_tokens(spec.get("added_tokens"), plain)
        if not isinstance(template, str):
            raise InputError(f"{folder}: no chat template in tokenizer_config.json or chat_template.jinja")
        for name, token in ("eos_token", eos), *([] if bos is None else [("bos_token", bos)]):
            if not isinstance(token, str) or token not in special:
                raise InputError(f"{folder}: {name} {brief(token)} is not an added token of tokenizer.json")
        identity = [spec, template, eos] + ([] if bos is None else [bos])
        identity = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        fingerprint = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
        halves = {"plain": plain, "inner": inner, "special": special}
        tokenizer = cls(**halves, chat_template=template, eos=eos, bos=bos, fingerprint=fingerprint)
        with _refusing(f"{folder}: the chat template cannot be rendered"):
            shown = tokenizer._render([{"role": "system", "content": ""}, {"role": "user", "content": _placeholder(1)}])
        stretches = [PLACEHOLDER.findall(stretch) for stretch in tokenizer._control.split(shown)]
        if [number for numbers in stretches for number in numbers] != ["1"]:
            raise InputError(f"{folder}: the chat template does not show the user's message once")
        return tokenizer

    @cached_property
    def _control(self) -> re.Pattern:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode_text(self, text: str, *, after_text: bool = False) -> list[int]:
        """Token ids of text; control tokens in it stay text, and lone surrogates become U+FFFD."""
        tokenizer = self.inner if after_text else self.plain
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            return tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def _render(self, messages: list[dict]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template  # seconds to import

        settings = {"chat_template": self.chat_template, "add_generation_prompt": True, "eos_token": self.eos}
        settings |= {} if self.bos is None else {"bos_token": self.bos}
        return render_jinja_template(conversations=[messages], **settings)[0][0]

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Ids of the chat template filled with `messages`, up to the point where the assistant starts to write.

        The template is rendered with placeholders and split at its control tokens; each stretch between them is
        encoded in one piece with the user's text in it, as the official template's own ids are."""
        # A placeholder per message, empty ones aside: templates may treat an empty system text in their own way. White
        # space around a text is shown, since templates may cut it off.
        texts = [message["content"].strip() for message in messages]
        shown = [
            {**m, "content": m["content"].replace(text, _placeholder(i)) if text else m["content"]}
            for i, (m, text) in enumerate(zip(messages, texts))
        ]
        ids = []
        for stretch in self._control.split(self._render(shown)):
            if stretch in self.special:
                ids.append(self.special[stretch])
                continue
            pieces = PLACEHOLDER.split(stretch)
            filled = "".join(p if k % 2 == 0 else texts[int(p)] for k, p in enumerate(pieces))
            if filled:
                ids += self.encode_text(filled, after_text=bool(ids))
        return ids

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a judgment that ends: its text, then the token that ends the turn."""
        return [*self.encode_text(text, after_text=True), self.special[self.eos]]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are left out."""
        control = set(self.special.values())
        return self.plain.decode([i for i in ids if i not in control], skip_special_tokens=False)
