"""Control tokens written into questions, answers and judgments: how many change the prompt's structure?

Every added token of a tokenizer, control or vocabulary, is put into every text that a judge reads or writes, at every
place in it; what is compared is the sequence of control-token ids, with that of the same prompt without the attack.
conj's encoding stands beside what chat templating does by itself. Places that a template has no room for, such as a
system message with Mistral's, are left out.

    python scripts/control_tokens.py --tokenizer demo/base ../shared/data/qwen2-tokenizer
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError

from conj import InputError
from conj.data.chat_template import fixed_date
from conj.data.judges import judge_prompt, judgment_text, load_judge
from conj.data.tokenizer import JudgeTokenizer

CARD = load_judge("con-j")
TEXT = "天空 is blue。\n好"  # a text to be attacked


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a judge reads and, unless that is still to come, writes."""

    messages: list[dict]
    judgment: str | None = None


Encoding = Callable[[Conversation], list[int]]

PLACES: dict[str, Callable[[str], Conversation]] = {
    "question": lambda text: Conversation(messages=judge_prompt(CARD, text, "a", "b")),
    "answer 1": lambda text: Conversation(messages=judge_prompt(CARD, "q", text, "b")),
    "answer 2": lambda text: Conversation(messages=judge_prompt(CARD, "q", "a", text)),
    "answer 2, hinted": lambda text: Conversation(messages=judge_prompt(CARD, "q", "a", text, hint=1)),
    "turn of a conversation": lambda text: Conversation(
        messages=judge_prompt(CARD, _turns("assistant", text), "a", "b")
    ),
    "role of a turn": lambda text: Conversation(messages=judge_prompt(CARD, _turns(text, "reply"), "a", "b")),
    "message of a chat": lambda text: Conversation(messages=_turns("assistant", text)),
    "judgment": lambda text: Conversation(
        messages=judge_prompt(CARD, "q", "a", "b"), judgment=judgment_text(CARD, text, 1)
    ),
    "judgment, not JSON": lambda text: Conversation(messages=judge_prompt(CARD, "q", "a", "b"), judgment=text),
}


def _turns(role: str, content: str) -> list[dict]:
    turns = [("system", "s"), ("user", "first"), (role, content), ("user", "last")]
    return [{"role": role, "content": content} for role, content in turns]


def attack_texts(token: str, end: str) -> Iterator[str]:
    """Texts with `token` in them: alone, doubled, at every offset, beside line breaks, spaces and quotes, in a forged
    turn, and cut at every character by a token that a filter would take out (`end` ends a turn)."""
    yield from (token, token * 2, f"\n{token}", f"{token}\n", f"\n{token}\n", f" {token} ", f'"{token}"', token + end)
    yield from (TEXT[:i] + token + TEXT[i:] for i in range(len(TEXT) + 1))
    yield f"{TEXT}{end}\n{token}system\n{TEXT}"
    for inner in {token, end}:
        yield from (token[:i] + inner + token[i:] for i in range(1, len(token)))


def places(tokenizer: JudgeTokenizer) -> dict[str, Callable[[str], Conversation]]:
    """The places that the tokenizer's template has."""

    def has(put: Callable[[str], Conversation]) -> bool:
        try:
            return bool(by_conj(tokenizer)(put(TEXT)))
        except InputError:
            return False

    return {place: put for place, put in PLACES.items() if has(put)}


def attacks(tokenizer: JudgeTokenizer) -> Iterator[tuple[str, str, Conversation]]:
    """Each attack as (place, text, conversation): every added token, every text with it, every place."""
    found = places(tokenizer)
    for token in (*tokenizer.special, *tokenizer.words):
        for text in dict.fromkeys(attack_texts(token, tokenizer.turn_end)):
            for place, put in found.items():
                yield place, text, put(text)


def structure(ids: list[int], tokenizer: JudgeTokenizer) -> list[int]:
    """The control tokens among ids, in order."""
    control = set(tokenizer.special.values())
    return [i for i in ids if i in control]


def by_conj(tokenizer: JudgeTokenizer) -> Encoding:
    """conj's ids, of sampling and of training."""

    def encode(conversation: Conversation) -> list[int]:
        ids = tokenizer.prompt_ids(conversation.messages)
        return ids if conversation.judgment is None else ids + tokenizer.completion_ids(conversation.judgment)

    return encode


def by_template(folder: Path, **kwargs) -> Encoding:
    """The ids of `apply_chat_template`: the template is filled first and tokenized afterwards."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)

    def encode(conversation: Conversation) -> list[int]:
        messages, asks = conversation.messages, conversation.judgment is None
        if not asks:
            messages = [*messages, {"role": "assistant", "content": conversation.judgment}]
        settings = {"add_generation_prompt": asks, "strftime_now": fixed_date}
        settings |= {"return_dict": False, "tokenizer_kwargs": kwargs}
        try:
            return reference.apply_chat_template(messages, **settings)
        except TemplateError:  # Mistral's templates refuse a system message, also one that says nothing
            return reference.apply_chat_template([m for m in messages if m["content"]], **settings)

    return encode


def count_changed(tokenizer: JudgeTokenizer, encode: Encoding) -> tuple[int, int, int]:
    """(attacks, those that change the structure, places where a benign text has another one than by conj's encoding)."""
    found = places(tokenizer)
    expected = {place: structure(by_conj(tokenizer)(put(TEXT)), tokenizer) for place, put in found.items()}
    wrong = sum(structure(encode(put(TEXT)), tokenizer) != expected[place] for place, put in found.items())
    changed = [structure(encode(attack), tokenizer) != expected[place] for place, _, attack in attacks(tokenizer)]
    return len(changed), sum(changed), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True, help="model or tokenizer folders")
    for folder in parser.parse_args().tokenizer:
        report(folder)


def report(folder: Path) -> None:
    """Prints a table of one tokenizer."""
    tokenizer = JudgeTokenizer.load(folder)
    num_places = len(places(tokenizer))
    encodings = {
        "conj": by_conj(tokenizer),
        "`apply_chat_template`": by_template(folder),
        "`apply_chat_template`, `split_special_tokens=True`": by_template(folder, split_special_tokens=True),
    }
    added = f"{len(tokenizer.special)} control tokens and {len(tokenizer.words)} of the vocabulary"
    print(f"\n{folder}: {added} in {num_places} places\n")
    print("| encoding | attacks | change the structure | benign prompts whose structure is wrong |\n|---|---|---|---|")
    for name, encode in encodings.items():
        tried, changed, wrong = count_changed(tokenizer, encode)
        print(f"| {name} | {tried:,} | {changed:,} ({100 * changed / tried:.1f} %) | {wrong} of {num_places} |")


if __name__ == "__main__":
    main()
