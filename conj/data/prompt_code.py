"""A judge's prompt to read and as code, for the card of a model."""

import json
import re

from conj.data.judges import PLACES, Judge, judge_prompt


def prompt_messages(judge: Judge) -> list[dict]:
    """The messages with {question}, {answer_1} and {answer_2} where the texts go."""
    return judge_prompt(judge, *(f"{{{place}}}" for place in PLACES))


def prompt_code(judge: Judge) -> list[dict]:
    """The messages as Python: of each the role, and the lines of an expression for its content."""
    found = []
    for message in judge_prompt(judge, *(f"\0{place}\0" for place in PLACES)):
        parts = [piece for part in message["content"].split("\0") for piece in _sentences(part)]
        lines, before = [], ""
        for part in parts:
            code = part if part in PLACES else _literal(part)
            if lines and {part, before} & set(PLACES):
                lines[-1] += f" + {code}"
            else:  # literals below each other are one
                lines.append(code)
            before = part
        found.append({"role": message["role"], "lines": lines or ['""']})
    return found


def _literal(text: str) -> str:
    return repr(text) if '"' in text else json.dumps(text, ensure_ascii=False)


def _sentences(text: str) -> list[str]:
    """A text in pieces that are easy to read, each up to a full stop."""
    return [piece for piece in re.split(r"(?<=。)|(?<=\. )", text) if piece]
