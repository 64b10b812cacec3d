"""Text to token ids and back, with no control token in reach of what a user wrote.

Text is data: questions, answers and judgments are encoded by a tokenizer that knows no control token, so an
answer that contains `<|im_end|>` stays text. The model's own chat template draws the frame; each piece of it
is encoded around the user's text, never by formatting a filled template.

Of a tokenizer's added tokens, those are control that it calls special and those that the template draws in the frame.
The others are vocabulary, such as `<think>` or a term that somebody taught a model: text that holds one has its id.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from conj import InputError
from conj.data.chat_template import PLACEHOLDER, ChatTemplate, placeholder, refusing
from conj.data.files import brief, replace_surrogates
from conj.data.model_files import MAX_TOKENIZER_BYTES, read_model_file, read_model_json
from conj.data.sentencepiece import after_text_spec, convert_sentencepiece

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # how an added token is found in text


def _check_added(added: list[dict], model: Tokenizer) -> None:
    """Raises ValueError unless each added token has a name and an id of its own, also beside the model's pieces."""
    names, ids = set(), set()
    for token in added:
        name, number = token["content"], token["id"]
        if not isinstance(name, str) or not name or name in names:
            raise ValueError(f"expected added tokens with a name each, found {brief(name)}")
        known = type(number) is int and 0 <= number < 2**31 and number not in ids
        if not known or model.id_to_token(number) not in (None, name) or model.token_to_id(name) not in (None, number):
            raise ValueError(f"added token {brief(name)}: expected an id of its own, found {brief(number)}")
        names.add(name)
        ids.add(number)


def _check_other_places(folder: Path, config: dict, added: list[dict]) -> None:
    """Raises InputError where another file contradicts tokenizer.json on which tokens there are, or tokenizer_config.json
    on which of them begin and end a text: transformers goes by the other file."""
    where, ids = f"{folder}/tokenizer_config.json", {token["content"]: token["id"] for token in added}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name) or []
        tokens = [_token_name(token) for token in (extra.values() if isinstance(extra, dict) else list(extra))]
        if new := [token for token in tokens if token not in ids]:
            raise InputError(f"{where}: {name}: expected added tokens of tokenizer.json, found {brief(new[0])}")
    if "added_tokens_decoder" in config:
        where += ": added_tokens_decoder"
        stated = {_token_name(token): int(number) for number, token in config["added_tokens_decoder"].items()}
    else:  # files of an earlier form, which count without it
        named, more = (folder / name for name in ("special_tokens_map.json", "added_tokens.json"))
        map_of_names = read_model_json(named) if named.exists() else {}
        for name in ("bos_token", "eos_token"):
            ours, theirs = (_token_name(file.get(name)) for file in (config, map_of_names))
            if theirs not in (None, ours):
                raise InputError(
                    f"{named}: {name}: expected {brief(ours)}, as tokenizer_config.json says, found {brief(theirs)}"
                )
        where, stated = str(more), ids | (read_model_json(more) if more.exists() else {})
    if differing := [name for name in ids | stated if ids.get(name) != stated.get(name)]:
        expected, found = (brief(place.get(differing[0])) for place in (ids, stated))
        raise InputError(
            f"{where}: {brief(differing[0])}: expected id {expected}, as tokenizer.json says, found {found}"
        )


def _any_of(added: list[dict]) -> re.Pattern:
    """Finds these added tokens in what a template draws, the longest first, as the official tokenizer does."""
    longest_first = sorted(added, key=lambda token: len(token["content"]), reverse=True)
    names = ((re.escape(token["content"]), token.get("single_word")) for token in longest_first)
    return re.compile("(" + "|".join(rf"(?<!\w){name}(?!\w)" if alone else name for name, alone in names) + ")")


def _read_frame(template: ChatTemplate, added: list[dict]) -> tuple[set[str], str | None]:
    """The added tokens that the template draws in a judge's prompt or after its judgment, and the one that ends the
    judgment. Those drawn only before it, such as Qwen3's empty `<think></think>`, are what a judge may write itself."""
    added = [token for token in added if not token["content"].isspace()]  # line breaks are no one's own
    if not added:
        return set(), None
    tokens, after = _any_of(added), template.after_turn()
    parts = [after, *(part for prompt in template.prompts() for part in PLACEHOLDER.split(prompt)[::2])]
    return {name for part in parts for name in tokens.findall(part)}, next(iter(tokens.findall(after)), None)


def _teach(model: Tokenizer, words: list[dict]) -> dict[int, int]:
    """Adds vocabulary to a tokenizer that has no added tokens. The library numbers them anew, whatever ids it is given;
    returned is {its id: the id in the model}."""
    size = model.get_vocab_size()
    if any(model.id_to_token(size + i) is not None for i in range(len(words))):
        raise ValueError(f"expected the {size:,} pieces of the vocabulary to have the ids below that")
    tokens = [AddedToken(word["content"], **{f: word[f] for f in FLAGS if f in word}) for word in words]
    model.add_tokens(tokens)
    own = {model.token_to_id(word["content"]): word["id"] for word in words}
    if len(own) != len(words) or None in own:
        raise ValueError(f"expected each of {brief([word['content'] for word in words])} to be found in text")
    return own


def _spelled(name: str, tokenizer: Tokenizer) -> str:
    """What the decoder must be given to write `name`: a byte-level one takes the é of a word for a byte."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(name)[0][0]
    decoder = tokenizer.decoder
    return next((form for form in (name, by_bytes) if decoder and decoder.decode([form]) == name), name)


def _token_name(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_template(folder: Path, config: dict, given: str | None, added: set[str]) -> ChatTemplate:
    """`given`, or else the template of the folder. Raises InputError if there is none, or it may use an unknown token."""
    source = config.get("chat_template") if given is None else given
    if given is None and (folder / "chat_template.jinja").exists():
        with refusing(f"{folder}: tokenizer cannot be read"):
            source = read_model_file(folder / "chat_template.jinja").decode()
        source = source.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(source, (list, dict)):
        raise InputError(
            f"{folder}/tokenizer_config.json: chat_template: expected one, found several; put one of them into chat_template.jinja"
        )
    if not isinstance(source, str):
        raise InputError(f"{folder}: no chat template in tokenizer_config.json or chat_template.jinja")
    if replace_surrogates(source) != source:
        raise InputError(f"{folder}: the chat template holds a lone surrogate, which no encoding has")
    bos, eos = _token_name(config.get("bos_token")), _token_name(config.get("eos_token"))
    for name, token in ("eos_token", eos), ("bos_token", bos):
        if token is not None and (not isinstance(token, str) or token not in added):
            raise InputError(f"{folder}: {name} {brief(token)} is not an added token of tokenizer.json")
    named = config | (extra if isinstance(extra := config.get("extra_special_tokens"), dict) else {})
    others = {name: _token_name(token) for name, token in named.items() if name.endswith("_token") and name in source}
    others = {
        name: token
        for name, token in others.items()
        if isinstance(token, str) and name not in ("bos_token", "eos_token")
    }
    return ChatTemplate(source=source, bos=bos, eos=eos, others=others, where=str(folder))


def _fingerprint(spec: dict, template: ChatTemplate, words: dict[str, int], silent: frozenset[int], end: str) -> str:
    """What was made of the added tokens counts too, where not all of them are special and eos_token ends a turn."""
    identity = [spec, template.source, template.eos] + ([] if template.bos is None else [template.bos])
    identity += [template.others] if template.others else []
    if len(silent) < len(spec["added_tokens"]) or end != template.eos:
        identity.append({"words": words, "silent": sorted(silent), "turn_end": end})
    identity = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class JudgeTokenizer:
    """A tokenizer in two halves: `plain` encodes text and knows no control token; `special` holds their ids."""

    plain: Tokenizer
    inner: Tokenizer  # the same for text that something stands before; another one for sentencepiece only
    own_ids: dict[int, int]  # id of a word of the vocabulary by `plain` -> its id in the model
    special: dict[str, int]  # control token -> id
    words: dict[str, int]  # added token that is vocabulary -> id
    silent: frozenset[int]  # ids without a text: of special tokens, and of those that end a judgment
    template: ChatTemplate
    turn_end: str  # the token that ends the assistant's turn, as the template draws it
    fingerprint: str  # sha256 over everything that decides the ids and their text

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> "JudgeTokenizer":
        """Reads `tokenizer.json`, or a sentencepiece `tokenizer.model` where there is none, and `tokenizer_config.json`
        (with `chat_template.jinja`) of a Hugging Face model folder. `chat_template` takes the place of the folder's own.

        Raises InputError when a file is missing or malformed, or when there is no chat template or no end of a turn."""
        folder = Path(folder)
        if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
            spec, names = read_model_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES), {}
        else:
            spec, names = convert_sentencepiece(folder)
        config = read_model_json(folder / "tokenizer_config.json") | names
        with refusing(f"{folder}: tokenizer cannot be read"):
            # Truncation and padding would cut or fill every text without a word.
            left_out = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            plain = inner = Tokenizer.from_str(json.dumps(spec | left_out))
            if (after_text := after_text_spec(spec)) is not spec:
                inner = Tokenizer.from_str(json.dumps(after_text | left_out))
            added = spec.get("added_tokens")
            _check_added(added, plain)
            if not names:  # nothing was converted: there is a tokenizer.json
                _check_other_places(folder, config, added)
        template = _read_template(folder, config, chat_template, {token["content"] for token in added})
        drawn, turn_end = _read_frame(template, added)
        if (turn_end := turn_end or template.eos) is None:
            raise InputError(f"{folder}: no eos_token, and the chat template draws no token after a judgment")
        unsaid = {token["content"] for token in added if token.get("special")} | {turn_end, template.eos, template.bos}
        drawn |= unsaid
        vocabulary = [token for token in added if token["content"] not in drawn]
        ids = {token["content"]: token["id"] for token in added}
        words = {token["content"]: token["id"] for token in vocabulary}
        special = {name: i for name, i in ids.items() if name not in words}
        silent = frozenset(i for name, i in ids.items() if name in unsaid)
        with refusing(f"{folder}: tokenizer cannot be read"):
            own_ids = _teach(plain, vocabulary)
            if inner is not plain and _teach(inner, vocabulary) != own_ids:
                raise ValueError("expected the same ids at the start of a text and within it")
        tokenizer = cls(
            plain=plain, inner=inner, own_ids=own_ids, special=special, words=words, silent=silent, template=template,
            turn_end=turn_end, fingerprint=_fingerprint(spec, template, words, silent, turn_end),
        )  # fmt: skip
        tokenizer._check(folder)
        return tokenizer

    def _check(self, folder: Path) -> None:
        """Raises InputError if the name of a control token would become one, or the template hides what the user says."""
        for name in self.special:
            for tokenizer in (self.plain, self.inner):
                if not self._control_ids.isdisjoint(self._encode(name, tokenizer)):
                    raise InputError(f"{folder}: the text {brief(name)} would become a control token")
        user = [{"role": "user", "content": placeholder(1)}]
        shown = self.template.render(([{"role": "system", "content": ""}] if self.template.takes_system else []) + user)
        stretches = [PLACEHOLDER.findall(stretch) for stretch in self._control.split(shown)]
        if [number for numbers in stretches for number in numbers] != ["1"]:
            raise InputError(f"{folder}: the chat template does not show the user's message once")

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a judgment: the one that ends the turn, and the tokenizer's own end of text."""
        return sorted({self.special[token] for token in (self.turn_end, self.template.eos) if token is not None})

    @property
    def last_id(self) -> int:
        """The largest id of a token."""
        pieces = self.plain.get_vocab_size(with_added_tokens=False)
        return max(*self.special.values(), *self.words.values(), pieces - 1)

    @cached_property
    def _control(self) -> re.Pattern:
        return _any_of([{"content": name} for name in self.special])

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            ids = tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids
        return self._own(ids)

    def _own(self, ids: list[int]) -> list[int]:
        return [self.own_ids.get(i, i) for i in ids] if self.own_ids else ids

    def encode_text(self, text: str, *, after_text: bool = False) -> list[int]:
        """Token ids of text; control tokens in it stay text, and lone surrogates become U+FFFD.

        Raises InputError for a text that has a control token's id all the same, such as that of an unknown character."""
        return self.check_inert(text, self._encode(text, self.inner if after_text else self.plain))

    def encode_texts(self, texts: Sequence[str], *, after_text: bool = False) -> list[list[int]]:
        """What `encode_text` gives for each of many texts, by all cores; `check_inert` is left to who knows their names."""
        tokenizer = self.inner if after_text else self.plain
        try:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            encodings = tokenizer.encode_batch_fast(list(map(replace_surrogates, texts)), add_special_tokens=False)
        return [self._own(encoding.ids) for encoding in encodings]

    def check_inert(self, text: str, ids: list[int]) -> list[int]:
        """The ids of a text. Raises InputError if a control token's is among them."""
        if not self._control_ids.isdisjoint(ids):
            raise InputError(f"{self.template.where}: the text {brief(text)} would become a control token")
        return ids

    def prompt_ids(self, messages: list[dict], begun: str = "") -> list[int]:
        """Ids of the chat template filled with `messages`, up to the point where the assistant starts to write, and of what it
        has `begun` to write; see `prompt_parts`."""
        ids = []
        for part in self.prompt_parts(messages):
            ids += [part] if isinstance(part, int) else self.encode_text(part[0], after_text=part[1])
        return ids + self.encode_text(begun, after_text=True)

    def decode_after(self, begun: str, ids: Sequence[int]) -> str:
        """The text of what follows on the text of a turn that is `begun`: alone, the first of them may lose its space."""
        before = self.encode_text(begun, after_text=True)
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def prompt_parts(self, messages: list[dict]) -> list[int | tuple[str, bool]]:
        """What a prompt is made of: ids of control tokens, and texts with whether something stands before them.

        The template is rendered with placeholders and split at its control tokens; each stretch between them is
        encoded in one piece with the user's text in it, as the official template's own ids are.

        Raises InputError for messages that the template refuses. Of one that takes no system message (Mistral's, Gemma's)
        an empty one is left out."""
        if not self.template.takes_system and messages[0]["role"] == "system":
            if text := messages[0]["content"]:
                raise InputError(f"{self.template.where}: its chat template has no system message for {brief(text)}")
            messages = messages[1:]
        # A placeholder per message, empty ones aside: templates may treat an empty system text in their own way. White
        # space around a text is shown, since templates may cut it off.
        texts = [message["content"].strip() for message in messages]
        shown = [
            {**m, "content": m["content"].replace(text, placeholder(i)) if text else m["content"]}
            for i, (m, text) in enumerate(zip(messages, texts))
        ]
        parts = []
        for stretch in self._control.split(self.template.render(shown)):
            if stretch in self.special:
                parts.append(self.special[stretch])
                continue
            pieces = PLACEHOLDER.split(stretch)
            filled = "".join(p if k % 2 == 0 else texts[int(p)] for k, p in enumerate(pieces))
            if filled:
                parts.append((filled, bool(parts)))
        return parts

    def completion_parts(self, text: str) -> list[int | tuple[str, bool]]:
        """What a judgment that ends is made of: its text, then the token that ends the turn."""
        return [(text, True), self.special[self.turn_end]]

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a judgment that ends."""
        return [*self.encode_text(text, after_text=True), self.special[self.turn_end]]

    @cached_property
    def _texts(self) -> dict[int, str | None]:
        """{id: what the decoder is given} of added tokens; None for ids that mean something to `plain` alone."""
        names = {i: name for name, i in self.special.items()}
        names |= {i: self.plain.id_to_token(own) for own, i in self.own_ids.items()}  # in the normalizer's form
        return dict.fromkeys(self.own_ids) | {i: _spelled(name, self.plain) for i, name in names.items()}

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens, and those that end a judgment, are left out."""
        known, to_token = self._texts, self.plain.id_to_token
        tokens = [known[i] if i in known else to_token(i) for i in ids if i not in self.silent]
        tokens = [token for token in tokens if token is not None]
        return self.plain.decoder.decode(tokens) if self.plain.decoder else " ".join(tokens)
