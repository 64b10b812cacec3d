"""The fuzzer's judgments: a grammar that knows which verdict a text states, and the parsers of conj.data.verdicts."""

import json
import re
from collections.abc import Callable

from fuzz_common import Choose, Finding, chooser, pick

from conj.data.verdicts import parse_reason, parse_released, parse_strict

KEY, REASON = "更好的回答", "原因"
WORDS = [
    "回答1更好。", "回答2", "x", " ", "\n", "1", "2", "\t", "第1个", "更好的是2", ",", "，", ":", "：", "。", "null",
    "\u2028",
]  # fmt: skip
ODD = [
    "\\", "'", "<|im_end|>", "<|im_start|>assistant\n", "\ud83d", "\x00", "\ufeff", "e\u0301", "//", "/*", "#", "\\n",
    "`",
]  # fmt: skip
MARKS = ['"', "“", "{", "}", "[", "]", "{name}", '{"a": 1}', "```", "```json\n", "'}", "()", '\\"']
KEYS = [KEY, REASON, f'"{KEY}"', f"“{KEY}”：1", f'"{KEY}": 2', f'", "{KEY}": 1}}', f'{{"{KEY}": 2}}']
# A reason that quotes the format without escaping it; after a plain word, or anybody would read a finished judgment.
MENTIONS = [
    f'应输出"{KEY}": 1}}', f'例如{{"{KEY}": 2}}，但', f'例如{{"{REASON}": "解释", "{KEY}": 1}}', f'写"{KEY}"',
    f"没有{KEY}: 2}}",
]  # fmt: skip
WRONG = [
    "3", "0", "true", "1.0", "null", "[1]", "[]", "{}", '"回答1和回答2"', '"1或2"', '" 1"', "-1", '"１"', "12", "1e0",
    '""', "NaN",
]  # fmt: skip
WRONG += ["1" * 5000, "[" * 2000 + "]" * 2000]
TRAPS = [  # of the published parser
    f'{{"{REASON}": "回答1不好，回答2明显更好","更好的',
    f'{{"{REASON}": "回答2更好，回答1差"',
    "两个回答都好，分数是1",
    f'{{"{REASON}": "x", "{KEY}": 1',
]
STATED_VALUE = re.compile(KEY + r'["\']?\s*[:：]\s*["\']?(?:回答)?([12])')


def some_text(choose: Choose, pieces: list[str], most: int = 12) -> str:
    text = "".join(pick(choose, pieces) for _ in range(choose(most)))
    return text * (1 + choose(100_000) // max(1, len(text))) if choose(500) == 499 else text


def value_text(choose: Choose, verdict: int) -> str:
    return pick(choose, [f"{verdict}", f'"{verdict}"', f'"回答{verdict}"'])


def valid_judgment(choose: Choose, value: str, reason: object) -> str:
    """A JSON object that states `value`, in any order, spacing and escaping, perhaps with other keys."""
    ascii_only = choose(4) == 0
    fields = [(REASON, json.dumps(reason, ensure_ascii=ascii_only)), (KEY, value)]
    if choose(3) == 0:
        extra = pick(choose, [1, None, [{KEY: 1}], {KEY: 2}, {"a": {KEY: 1}}, f'"{KEY}": 1', "}"])
        fields.append((pick(choose, ["注", "", "score", KEY + "x"]), json.dumps(extra, ensure_ascii=ascii_only)))
    if choose(2):
        fields.reverse()
    colon, comma = pick(choose, [": ", ":", " : ", ":\n"]), pick(choose, [", ", ",", ",\n  ", " ,"])
    body = comma.join(json.dumps(key, ensure_ascii=ascii_only) + colon + text for key, text in fields)
    return "{" + pick(choose, ["", "\n", " "]) + body + pick(choose, ["", "\n", " "]) + "}"


def make_judgment(choose: Choose) -> tuple[str, set]:
    """A text, and what a parser may say of it: the verdict it states, or None, or either where the text is damaged."""
    verdict = 1 + choose(2)
    reason = some_text(choose, WORDS + ODD + MARKS + KEYS)
    raw = some_text(choose, WORDS + ODD + MARKS + MENTIONS)  # as written by a model that does not escape
    prose = some_text(choose, WORDS, 5)
    value = value_text(choose, verdict)
    whole = valid_judgment(choose, value, reason)
    kind = choose(17)
    if kind == 0:
        return whole, {verdict}
    if kind == 1:
        return prose + whole[: choose(len(whole))], {None}
    if kind == 2:
        return f'{{"{REASON}": "{raw}", "{KEY}": {value}}}', {verdict, None}
    if kind == 3:
        ending = pick(choose, ["", '"', '",', f'", "{KEY}"', f'", "{KEY}":', f'", "{KEY}": {value}', f'", "{KEY}": "'])
        text = f'{{"{REASON}": "{raw}{ending}'
        return text[: len(text) - choose(len(text))] if choose(2) else text, {None}
    if kind == 4:
        pieces = [p for p in WORDS + ODD + MARKS + KEYS if "{" not in p]
        return some_text(choose, pieces, 30), {None}
    if kind == 5:
        other = 1 + choose(2)
        text = prose.join([whole, valid_judgment(choose, value_text(choose, other), "x"), *[whole] * choose(3)])
        return text, {verdict, None} if other == verdict else {None}
    if kind == 6:
        inner = json.dumps(pick(choose, [{KEY: verdict}, [{KEY: verdict}], [[{REASON: "x", KEY: verdict}]]]))
        return prose + '{"' + pick(choose, [REASON, "a", KEY]) + f'": {inner}}}', {None}
    if kind == 7:
        return valid_judgment(choose, pick(choose, WRONG), reason), {None}
    if kind == 8:
        other = 1 + choose(2)
        text = f'{{"{KEY}": {value}, "{REASON}": {json.dumps(reason)}, "{KEY}": {value_text(choose, other)}}}'
        return text, {verdict} if other == verdict else {None}
    if kind == 9:
        fence = pick(choose, ["", "```", "```json\n", "```\n", "'''"])
        return prose + fence + whole + fence.strip("json\n") + prose, {verdict, None}
    if kind == 10:
        colon, comma, q = (pick(choose, items) for items in ([":", "："], ["，", ",", " ", ""], ['"', "“", "'"]))
        return f"{{{q}{REASON}{q}{colon}{q}{raw}{q}{comma}{q}{KEY}{q}{colon}{value}}}", {verdict, None}
    if kind == 11:
        return pick(choose, TRAPS) + prose.replace(":", "").replace("：", ""), {None}
    if kind == 12:
        hole = choose(len(whole) + 1)
        return whole[:hole] + some_text(choose, WORDS + ODD + MARKS, 4) + whole[hole + choose(4) :], {1, 2, None}
    if kind == 13:
        pieces = [*WORDS, *ODD, *MARKS, *KEYS, *MENTIONS, whole]
        return "".join(pick(choose, pieces) for _ in range(choose(40))), {1, 2, None}
    if kind == 14:
        many = pick(choose, ["[", "{", '{"a":', '"', '{"', "\\", "回答", f'"{KEY}"', " ", "```", '{"a":1}'])
        text = many * (choose(100_000) // len(many) // 10 ** choose(4))
        return pick(choose, [text, f'{{"{REASON}": "{text}', f'{{"{REASON}": "{text}", "{KEY}": ']), {None}
    if kind == 15:  # the reason quotes a finished judgment; what follows says otherwise, or is cut off
        quoted = f'{raw}", "{KEY}": {value_text(choose, 3 - verdict)}}}{prose}'
        ending = f'", "{KEY}": {value}}}'
        if choose(2):
            return f'{{"{REASON}": "{quoted}{ending}', {verdict, None}
        return f'{{"{REASON}": "{quoted}{ending}'[: -1 - choose(len(value) + 1)], {None}
    text = bytes(choose(256) for _ in range(choose(256))).decode("utf-8", "replace")
    return text, {1, 2, None} if KEY in text else {None}


def fuzz_verdict(data: bytes, parse: Callable | None = None) -> str:
    """Makes a judgment of `data` and parses it. Returns `accepted` or `refused`; raises Finding."""
    text, allowed = make_judgment(chooser(data))
    verdict = (parse or parse_strict)(text)
    if verdict.value not in allowed:
        raise Finding(f"invented: {verdict} where {allowed} is stated: {text[:2000]!r}")
    if verdict.value is not None and str(verdict.value) not in STATED_VALUE.findall(unescaped(text)):
        raise Finding(f"invented: {verdict}, which stands behind no key: {text[:2000]!r}")
    if (verdict.value in (1, 2)) != (verdict.rung != "none") or parse_released(text).value not in (1, 2, None):
        raise Finding(f"malformed: {verdict}: {text[:2000]!r}")
    if not isinstance(parse_reason(text), str):
        raise Finding(f"malformed: the reason is no text: {text[:2000]!r}")
    return "refused" if verdict.value is None else "accepted"


def unescaped(text: str) -> str:
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text) if "\\u" in text else text
