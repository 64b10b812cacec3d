"""A judge's text to its verdict, and by which rung of the ladder it was found.

`parse_strict`, the default, reads a verdict only where the judge states one: under its key in a JSON object. It never
looks into a reason, and where several objects contradict each other, or one is cut off, there is no verdict.
`parse_released` reproduces what the published Con-J parser does, for figures that must compare with its own; its last
rung takes the first 1 or 2 after the word 回答, wherever that stands.

Both take any text, never raise, and need time linear in its length.
"""

import json
import re
from typing import NamedTuple

import json_repair

from conj.data.prompts import REASON_KEY, VERDICT_KEY

VALUES = {1: 1, 2: 2, "1": 1, "2": 2, "回答1": 1, "回答2": 2}
OBJECT_START = re.compile(r'\{\s*["“\']')  # a brace in prose, as in {name}, starts no object
REASON_START = re.compile(r'\{\s*"' + REASON_KEY + r'"\s*[:：]\s*"?')
# What must follow the last quoted verdict key of an object that is mended; Chinese models slip into full-width punctuation.
LAST_VALUE = re.compile(r'\s*[:：]\s*("?)((?:回答)?[12])\1\s*\}')
RELEASED_VALUE = re.compile(VERDICT_KEY + r'["\']?\s*[:：]\s*["\']?([12])')
QUOTED_KEY = f'"{VERDICT_KEY}"'
MAX_MENDED = 20_000  # characters; json-repair takes a tenth of a second for as many, and more than in proportion


class Verdict(NamedTuple):
    value: int | None  # 1, 2, or None: unparsed; of a judge that may say so, 0: a tie
    rung: str  # json, fenced, embedded, repaired, none; released: json, key, digit, none; of a judge's pattern: pattern


class Judgment(NamedTuple):
    verdict: Verdict
    reason: str


UNPARSED = Judgment(Verdict(None, "none"), "")


def parse_strict(text: str) -> Verdict:
    """The verdict a judge states under its key in a JSON object.

    Rungs: `json`, the text is that object; `fenced`, it stands in a ``` block; `embedded`, it stands among prose;
    `repaired`, the text starts and ends as that object and states the verdict last, but its reason breaks JSON."""
    return _judge(text).verdict


def parse_reason(text: str) -> str:
    """The reason of a judgment that `parse_strict` can read; "" if there is none."""
    return _judge(text).reason


def _judge(text: str) -> Judgment:
    text = text.strip()
    judgments = _find_judgments(text)
    if judgments is None:
        return _mend(text)
    values = {_value(content[VERDICT_KEY]) for content, _, _ in judgments}
    if len(values) != 1 or None in values:
        return UNPARSED
    content, start, end = judgments[0]
    fenced = text[:start].rstrip().endswith(("```", "```json")) and text[end:].lstrip().startswith("```")
    rung = "json" if (start, end) == (0, len(text)) else "fenced" if fenced else "embedded"
    reason = content.get(REASON_KEY)
    return Judgment(Verdict(values.pop(), rung), reason if isinstance(reason, str) else "")


def _find_judgments(text: str) -> list[tuple[dict, int, int]] | None:
    """The outermost JSON objects with the verdict key, each with start and end; None if what stands beside them may be
    the inside of a reason: after a broken object, one with a reason and no verdict, or where the key is quoted."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_contradiction)
    judgments, end, num_quoted = [], 0, text.count(QUOTED_KEY)
    while opening := OBJECT_START.search(text, end):
        try:
            content, end = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            return None
        num_quoted -= text.count(QUOTED_KEY, opening.start(), end)
        if VERDICT_KEY in content:
            judgments.append((content, opening.start(), end))
        elif REASON_KEY in content:
            return None
    return None if num_quoted else judgments


def _without_contradiction(pairs: list[tuple[str, object]]) -> dict:
    """An object in which a verdict stated twice with different values is no verdict."""
    content = dict(pairs)
    if len(content) < len(pairs) and len({_value(value) for key, value in pairs if key == VERDICT_KEY}) > 1:
        content[VERDICT_KEY] = None
    return content


def _value(value) -> int | None:
    return VALUES.get(value) if type(value) in (int, str) else None


def _mend(text: str) -> Judgment:
    """Reads an object that its reason broke (unescaped quotes, a raw newline, a missing comma), by json-repair. On its
    own that library finds verdicts in prose, so the text must be one object from its first to its last character, with
    the reason first and the only mention of the verdict key last: no text that was cut off passes."""
    body = text.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    head, *tail = body.split(QUOTED_KEY)
    opening = REASON_START.match(head)
    closing = LAST_VALUE.fullmatch(tail[0]) if len(tail) == 1 else None
    if opening is None or closing is None or len(OBJECT_START.findall(body)) > 1 or len(body) > MAX_MENDED:
        return UNPARSED
    reason = head[opening.end() :].rstrip().removesuffix("\\n")  # the model card's sample has a literal \n here
    if not reason.endswith(('"', ",", "，")):
        return UNPARSED
    # The frame is written anew, since models slip into full-width punctuation that the library takes for text.
    value = VALUES[closing[2]]
    mended = json_repair.loads(f'{{"{REASON_KEY}": "{reason.rstrip(",，")}, "{VERDICT_KEY}": {value}}}')
    if not isinstance(mended, dict) or mended.get(VERDICT_KEY) != value:
        return UNPARSED
    reason = mended.get(REASON_KEY)
    return Judgment(Verdict(value, "repaired"), reason if isinstance(reason, str) else "")


def parse_released(text: str) -> Verdict:
    """The verdict as the published parser gives it: the JSON value of the key (nothing else is tried once the text is
    JSON with the key), else a digit written behind the key, else the first 1 or 2 after the first 回答."""
    try:
        value = str(json.loads(text)[VERDICT_KEY])
        return Verdict(int(value), "json") if value in ("1", "2") else UNPARSED.verdict
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    if stated := RELEASED_VALUE.search(text):
        return Verdict(int(stated[1]), "key")
    word = text.find("回答")
    digit = re.compile("[12]").search(text, word) if word >= 0 else None
    return Verdict(int(digit[0]), "digit") if digit else UNPARSED.verdict


PARSERS = {"strict": parse_strict, "released": parse_released}
