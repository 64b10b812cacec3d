"""The keys of a judge's file: what a value must be, and how an error says it."""

import math
import re
from pathlib import Path

from conj import InputError
from conj.data.files import brief
from conj.data.prompts import ROLES

PLACES = ("question", "answer_1", "answer_2")
TEXTS = ("user", "hint_1", "hint_2")  # with the three places


def _choice(*choices: str) -> tuple:
    return lambda value: value in choices, " or ".join(choices)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


TEXT = (lambda value: isinstance(value, str) and value != "", "a text")
COUNT = (lambda value: type(value) is int and value >= 1, "a number from 1 up")
AMOUNT = (lambda value: _is_number(value) and value >= 0, "a number from 0 up")
KEYS = {  # of a file: what a value must be, and how an error says it
    "name": TEXT, "model": TEXT, "prompt": _choice("con-j", "english"), "system": (lambda v: isinstance(v, str), "a text"),
    **dict.fromkeys((*TEXTS, "reason_key", "verdict_key", "answer_name", "verdict_pattern", "judgment", "chat_template"), TEXT),
    "reason_start": (
        lambda v: isinstance(v, str) and v == v.strip() and set(re.findall(r"{\w+}", v)) in ({"{verdict}"}, {"{verdict}", "{other}"}),
        "a text with {verdict} and, if it is to name the other answer, {other}; no white space at its ends",
    ),
    "roles": (
        lambda v: isinstance(v, dict) and v.keys() == ROLES.keys() and all(isinstance(text, str) for text in v.values()),
        f"a table of texts, {', '.join(ROLES)}",
    ),
    "language": _choice("zh", "en"), "parser": _choice("strict", "released"), "backend": _choice("vllm", "openai"),
    "verdicts": (
        lambda v: isinstance(v, dict) and all(type(value) is int and value in (0, 1, 2) for value in v.values()),
        "a table from texts to 1, 2 or 0",
    ),
    "thought": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(mark, str) and mark.strip() for mark in v),
        "two texts, before and behind a thought",
    ),
    "max_new_tokens": COUNT, "max_length": COUNT, "top_k": COUNT, "temperature": AMOUNT,
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 up to 1"),
    "prompt_dollars": AMOUNT, "completion_dollars": AMOUNT,
}  # fmt: skip


def check_keys(content: dict, path: Path) -> None:
    """Raises InputError for a key that a judge has not, or a value of another type."""
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(f"{path}: {key}: no key of a judge; expected one of {', '.join((*KEYS, 'text'))}")
        holds, expected = KEYS[key]
        if not holds(value):
            raise InputError(f"{path}: {key}: expected {expected}, found {brief(value)}")
