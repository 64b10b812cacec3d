"""A judge's text to its verdict, and by which rung of the ladder it was found.

`parse_strict`, the default, reads a verdict only where the judge states one: under its key in a JSON object, in lines
that begin with its keys, or in a short text that says nothing else. It never looks into a reason or a thought; where
statements contradict each other, or a text is cut off, there is no verdict. A tie is recognised and is no verdict.
`parse_released` reproduces what the published Con-J parser does, for figures that must compare with its own; its last
rung takes the first 1 or 2 after the word 回答, wherever that stands.

Both take any text, never raise, and need time linear in its length.
"""

import functools
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from conj.data.statements import Stated, stated, stated_value
from conj.data.surroundings import FENCE_BEFORE, NEAR, TAKEN_BACK, is_introduced

QUOTES = "\"'“”‘’「」『』＂"
QUOTE = f"[{QUOTES}]"
CLOSING = {"“": "”“", "‘": "’‘", "「": "」", "『": "』"}  # of others: the same
COLON = r"\s*[:：]\s*"
OBJECT_START = re.compile(rf"[{{｛]\s*{QUOTE}")  # a brace in prose, as in {name}, starts no object
FENCE = re.compile(r"\s*(?:```|~~~)")
GOES_ON = re.compile(r"[^\S\n]*[,，、]?[^\S\n]*\w")  # the sentence that an object stands in
GOES_ON_AFTER_MARK = re.compile(r"[^\S\n]*(?:[,，、]\s*|[”’」』\"'`]+[,，、]?[^\S\n]*)\w")
COMPARES = re.compile(r"[更较优胜选]|better|best|win|prefer|choose|verdict|平局|\btie\b", re.IGNORECASE)
RELEASED_KEY = "更好的回答"
RELEASED_VALUE = re.compile(RELEASED_KEY + r'["\']?\s*[:：]\s*["\']?([12])')
ESCAPED = re.compile(r'\\(u[0-9a-fA-F]{4}|["\'\\/bfnrt])')


@dataclass(frozen=True)
class Form:
    """How a judgment is written: the keys of its JSON object, what an answer is called in it, and the marks between
    which the judge may think before it."""

    reason_key: str = "原因"
    verdict_key: str = "更好的回答"
    answer_name: str = "回答"
    thought: tuple[str, str] = ("<think>", "</think>")

    @cached_property
    def exact_values(self) -> set:
        return {1, 2, "1", "2"} | {f"{self.answer_name}{gap}{n}" for gap in ("", " ") for n in (1, 2)}

    @cached_property
    def quoted_key(self) -> re.Pattern:
        return re.compile(QUOTE + re.escape(self.verdict_key) + QUOTE)

    @cached_property
    def reason_opening(self) -> re.Pattern:
        return re.compile(QUOTE + re.escape(self.reason_key) + QUOTE + COLON + f"({QUOTE}?)")

    @cached_property
    def verdict(self) -> re.Pattern:
        """The verdict key with its value, which is short; quoted or a number."""
        return re.compile(
            rf"{self.quoted_key.pattern}{COLON}({QUOTE}[^{QUOTES}{{}}｛｝\n]{{0,40}}{QUOTE}|[\d.]{{1,9}})"
        )

    @cached_property
    def reason_line(self) -> re.Pattern:
        names = f"(?:{re.escape(self.reason_key)}|原因|理由|reason)"
        return re.compile(rf"\W*{names}(?:\W*[:：]|\W*\Z)", re.IGNORECASE)

    @cached_property
    def verdict_word(self) -> re.Pattern:
        """The verdict key as it is written outside of JSON."""
        return re.compile(re.escape(self.verdict_key).replace("_", "[_ -]"), re.IGNORECASE)


CARD = Form()


class Verdict(NamedTuple):
    value: int | None  # 1, 2, or None: unparsed, or a tie; of a judge whose file says so, 0: a tie
    # json, fenced, embedded, spelled, repaired, lines, stated, tie, none; released: json, key, digit, none; of a judge's
    # pattern: pattern
    rung: str


class Judgment(NamedTuple):
    verdict: Verdict
    reason: str


UNPARSED = Judgment(Verdict(None, "none"), "")


def split_thought(text: str, marks: tuple[str, str], opened: bool = False) -> tuple[str, str | None]:
    """What a judge thought, and its answer: what follows the last end mark. While a thought is unfinished, all is thought
    and the answer is None.

    `opened`: the prompt ends within the thought, so no start mark is written. An end mark ends a thought also where
    none was seen to start, since a server's chat template may have opened it. Text without a mark is all answer."""
    start, end = marks
    thought, ended, answer = text.rpartition(end)
    if (opened and not ended) or any(line.lstrip().startswith(start) for line in answer.split("\n")):
        thought, answer = text, None
    elif ended:
        answer = answer.lstrip()
    return thought.strip().removeprefix(start).strip(), answer


def parse_strict(text: str, form: Form = CARD, opened: bool = False) -> Verdict:
    """The verdict a judge states in what follows its thought. `opened`: the prompt ends within that thought.

    Rungs: `json`, the text is a JSON object with the verdict under its key; `fenced`, it stands in a ``` block;
    `embedded`, it stands among prose; `spelled`, wherever it stands, its key or value is written otherwise (1.0, "１",
    "回答一"); `repaired`, the text ends as that object, which is not JSON: other quotes or punctuation, a comma too many
    or too few, a reason that is not escaped; `lines`, the keys begin lines; `stated`, the whole text is a short
    statement; `tie`, by any of these neither answer is better; `none`."""
    return _judge(text, form, opened).verdict


def parse_reason(text: str, form: Form = CARD, opened: bool = False) -> str:
    """The reason of a JSON judgment that `parse_strict` can read; "" if there is none."""
    return _judge(text, form, opened).reason


def _judge(text: str, form: Form, opened: bool) -> Judgment:
    answer = _answer(text, form, opened).strip()
    opening = OBJECT_START.search(answer)
    if form.thought[0] in answer[: opening and opening.start()]:  # a thought in mid line: nobody knows where it ends
        return UNPARSED
    judgments = _find_judgments(answer, form)
    if judgments is None:
        return _mend(answer, form) or _lines(answer, form) or UNPARSED
    if not judgments:
        # After a thought a text may be short because there was no more room.
        maybe_cut = len(answer) < len(text.strip())
        value = stated(answer, form.answer_name, form.verdict_key, maybe_cut=maybe_cut)
        return _judgment(value, "stated") or _lines(answer, form) or UNPARSED
    values = {_value(_under(form.verdict_key, content), form) for content, _, _ in judgments}
    value = values.pop() if len(values) == 1 else None
    if value is None or _says_otherwise(answer, judgments, value, form):
        return UNPARSED
    content, start, end = judgments[0]
    exact = content.get(form.verdict_key)
    if type(exact) not in (int, str) or exact not in form.exact_values:
        rung = "spelled"
    elif (start, end) == (0, len(answer)):
        rung = "json"
    else:
        rung = "fenced" if FENCE_BEFORE.search(answer[:start][-40:]) and FENCE.match(answer, end) else "embedded"
    return _judgment(value, rung, _under(form.reason_key, content))


def _judgment(value: Stated | None, rung: str, reason: object = "") -> Judgment | None:
    if value is None or value == "tie":
        return value and Judgment(Verdict(None, "tie"), "")
    return Judgment(Verdict(value, rung), reason if isinstance(reason, str) else "")


def _answer(text: str, form: Form, opened: bool) -> str:
    """The text behind the thought; "" if that is unfinished. The last end mark may also be quoted in an object, which was
    then begun behind an earlier end mark, or where no thought was: everything from there on is the answer."""
    _, answer = split_thought(text, form.thought, opened)
    start, end = form.thought
    last = text.rfind(end)
    begun = position = text.find(end) + len(end) if opened or text.lstrip().startswith(start) else 0
    while opening := OBJECT_START.search(text, position, max(last, 0)):
        try:
            _, position = json.JSONDecoder().raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            return text[begun:]
        if position > last:
            return text[begun:]
    return answer or ""


# ---- Objects that are JSON ----


def _find_judgments(text: str, form: Form) -> list[tuple[dict, int, int]] | None:
    """The outermost JSON objects with the verdict key, each with start and end; None if what stands beside them may be
    the inside of a reason: after a broken object, one with a reason and no verdict, or where the key is quoted."""
    decoder = json.JSONDecoder(object_pairs_hook=functools.partial(_without_contradiction, form))
    judgments, end, num_quoted = [], 0, len(form.quoted_key.findall(text))
    while opening := OBJECT_START.search(text, end):
        try:
            content, end = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            return None
        num_quoted -= len(form.quoted_key.findall(text, opening.start(), end))
        if any(_same_key(key, form.verdict_key) for key in content):
            judgments.append((content, opening.start(), end))
        elif any(_same_key(key, form.reason_key) for key in content):
            return None
    return None if num_quoted else judgments


def _without_contradiction(form: Form, pairs: list[tuple[str, object]]) -> dict:
    """An object in which a verdict stated twice with different values is no verdict."""
    values = [_value(value, form) for key, value in pairs if _same_key(key, form.verdict_key)]
    contradicts = len(values) > 1 and len(set(values)) > 1
    return {key: None if contradicts and _same_key(key, form.verdict_key) else value for key, value in pairs}


def _same_key(key: str, wanted: str) -> bool:
    return key == wanted or _spelling(key) == _spelling(wanted)


@functools.lru_cache(maxsize=1000)
def _spelling(key: str) -> str:
    return key[:100].casefold().replace("_", " ").replace("-", " ")


def _under(wanted: str, content: dict) -> object:
    return next((value for key, value in content.items() if _same_key(key, wanted)), None)


def _value(value: object, form: Form) -> Stated | None:
    if isinstance(value, str):
        return stated_value(value, form.answer_name, form.verdict_key)
    return int(value) if type(value) in (int, float) and value in (1, 2) else None


def _says_otherwise(text: str, judgments: list[tuple[dict, int, int]], value: Stated, form: Form) -> bool:
    """Whether an object is only quoted, or what stands around them takes the verdict back or states another."""
    last_end = 0
    for _, start, end in judgments:
        before = text[last_end:start]
        fenced = FENCE_BEFORE.search(before[-40:])
        line = before.rpartition("\n")[2]
        goes_on = GOES_ON if re.search(r"\w", line) else GOES_ON_AFTER_MARK
        if not fenced and (line.lstrip().startswith(">") or goes_on.match(text, end)):
            return True
        if not (is_introduced(before) or _states(before, value, form)):
            return True
        last_end = end
    around = [text[: judgments[0][1]][-NEAR:], text[last_end : last_end + NEAR]]
    sentences = [sentence for part in around for sentence in re.split(r"(?<=[。.!！;；\n])", part)]
    others = {stated(x, form.answer_name, form.verdict_key) for x in sentences if COMPARES.search(x)} - {None, value}
    return bool(others) or TAKEN_BACK.search(around[1]) is not None


def _states(before: str, value: Stated, form: Form) -> bool:
    """Whether the line before an object states its verdict."""
    lines = FENCE_BEFORE.sub("", before[-NEAR:]).strip().rsplit("\n", 1)
    return stated(re.split("[,，]", lines[-1].rstrip(" :："))[-1], form.answer_name, form.verdict_key) == value


# ---- What is not JSON ----


def _mend(text: str, form: Form) -> Judgment | None:
    """Reads the verdict of an object that is not JSON. A library that repairs JSON finds verdicts in prose and in what
    was cut off; so the object must be the only one and end the text or its fence, name the verdict key once, and be the
    reason and then the verdict, or the other way round. What the reason says is not looked at."""
    opening, verdict = OBJECT_START.search(text), form.verdict.search(text)
    if opening is None or verdict is None or OBJECT_START.search(text, opening.end()):
        return None
    before, end = text[: opening.start()][-NEAR:], len(text)
    if (fenced := FENCE_BEFORE.search(before)) and (closing := text.rfind(fenced[0][:3], opening.end())) >= 0:
        end = closing
    body, num_named = (
        text[:end].rstrip(" \t\r\n。."),
        len(re.findall(r"(?<!\\)" + QUOTE + re.escape(form.verdict_key), text)),
    )
    if body[-1:] not in ("}", "｝") or num_named != 1 or not is_introduced(before):
        return None
    start, body = opening.end() - 1, _without_comma(body[:-1])
    if (reason := form.reason_opening.match(body, start)) and verdict.end() == len(body):
        # A literal \n stands here in the card's sample.
        written = _without_comma(body[reason.end() : verdict.start()].rstrip().removesuffix("\\n"))
    elif verdict.start() == start and (reason := form.reason_opening.match(body, _after_comma(body, verdict.end()))):
        written = body[reason.end() :]
    else:
        return None
    escaped = (len(written) - 1 - len(written[:-1].rstrip("\\"))) % 2  # a quote behind a backslash ends no reason
    if escaped or not written.endswith(tuple(CLOSING.get(reason[1], reason[1] or QUOTES))):
        return None
    return _judgment(_value(verdict[1].strip(QUOTES), form), "repaired", _unescaped(written[:-1]))


def _without_comma(text: str) -> str:
    text = text.rstrip()
    return text[:-1].rstrip() if text.endswith((",", "，")) else text


def _after_comma(text: str, at: int) -> int:
    return re.compile(r"\s*[,，]?\s*").match(text, at).end()


def _unescaped(written: str) -> str:
    return ESCAPED.sub(lambda escape: "'" if escape[1] == "'" else json.loads(f'"{escape[0]}"'), written)


def _lines(text: str, form: Form) -> Judgment | None:
    """The keys at the beginnings of lines, without an object: the reason and then, in the last line, the verdict, or the
    verdict in the first line and then the reason."""
    lines = [line for line in text.split("\n") if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(rf"\W*{form.verdict_word.pattern}", line, re.IGNORECASE)]
    reasons = [i for i, line in enumerate(lines) if form.reason_line.match(line)]
    if len(named) != 1 or len(form.verdict_word.findall(text)) != 1 or OBJECT_START.search(text) or not reasons:
        return None
    if reasons[0] == 0:
        stating = lines[named[0] :]
    elif named[0] == 0:
        stating = lines[: reasons[0]]
    else:
        return None
    return _judgment(stated("\n".join(stating), form.answer_name, form.verdict_key), "lines")


def parse_released(text: str, form: Form = CARD, opened: bool = False) -> Verdict:
    """The verdict as the published parser gives it: the JSON value of the key (nothing else is tried once the text is
    JSON with the key), else a digit written behind the key, else the first 1 or 2 after the first 回答. The keys are the
    published ones; of `form` only the marks of a thought are read, which is cut off first."""
    text = _answer(text, form, opened)
    try:
        value = str(json.loads(text)[RELEASED_KEY])
        return Verdict(int(value), "json") if value in ("1", "2") else UNPARSED.verdict
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    if named := RELEASED_VALUE.search(text):
        return Verdict(int(named[1]), "key")
    word = text.find("回答")
    digit = re.compile("[12]").search(text, word) if word >= 0 else None
    return Verdict(int(digit[0]), "digit") if digit else UNPARSED.verdict


PARSERS = {"strict": parse_strict, "released": parse_released}
