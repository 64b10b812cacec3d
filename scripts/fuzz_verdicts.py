"""The fuzzer's judgments: a grammar that knows which verdict a text states, and the parsers of conj.data.verdicts.

Both forms, the card's and the English one; one in three texts has a thought before it, finished or not."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from fuzz_common import Choose, Finding, chooser, pick

from conj.data.verdicts import CARD, Form, parse_reason, parse_released, parse_strict

ODD = [
    "\\", "'", "<|im_end|>", "<|im_start|>assistant\n", "\ud83d", "\x00", "\ufeff", "e\u0301", "//", "/*", "#", "\\n",
    "`", "<think>", "</think>", "\n<think>\n",
]  # fmt: skip
MARKS = ['"', "“", "{", "}", "[", "]", "{name}", '{"a": 1}', "```", "```json\n", "'}", "()", '\\"']
WRONG = [
    "3", "0", "true", "null", "[1]", "[]", "{}", "-1", "12", '""', "NaN", "1.5", '"A"', '"-1"', '"1?"', '"不是1"', '"not 1"',
    '"1或2"', '"1 or 2"', '"tie"', '"平局"', '"回答1和回答2"', '"answer 1 and answer 2"', '"回答3"', '"回答12"',
]  # fmt: skip
WRONG += ["1" * 5000, "[" * 2000 + "]" * 2000]
START, END = CARD.thought


@dataclass(frozen=True)
class Words:
    """What a form's texts are made of. `statements`: whole texts in which # is the better answer and % the other one;
    `silent`: the same words, stating nothing."""

    form: Form
    words: list[str]
    names: list[str]
    statements: list[str]
    silent: list[str]
    traps: list[str]

    @functools.cached_property
    def keys(self) -> list[str]:
        key, reason = self.form.verdict_key, self.form.reason_key
        return [key, reason, f'"{key}"', f"“{key}”：1", f'"{key}": 2', f'", "{key}": 1}}', f'{{"{key}": 2}}']

    @functools.cached_property
    def mentions(self) -> list[str]:
        """A reason that quotes the format without escaping it; after a plain word, or anybody would read a finished judgment."""
        key, reason = self.form.verdict_key, self.form.reason_key
        return [
            f'写"{key}": 1}}', f'例如{{"{key}": 2}}，但', f'例如{{"{reason}": "解释", "{key}": 1}}', f'写"{key}"', f"没有{key}: 2}}",
        ]  # fmt: skip


CHINESE = Words(
    form=CARD,
    words=["回答1更好。", "回答2", "x", " ", "\n", "1", "2", "\t", "第1个", "更好的是2", ",", "，", ":", "：", "。", "null", "\u2028"],
    names=["回答#", "回答 #"],
    statements=[
        "#", "回答#", "回答#更好。", "第#个回答更好", "更好的回答：#", "**更好的回答**：回答#", "我选择回答#。", "综上所述，回答#更好。",
        "回答#明显优于回答%。", "回答#比回答%更好", "【#】", "原因：x\n更好的回答：#", "更好的回答：#\n原因：回答%不对。",
    ],
    silent=[
        "回答#不更好。", "回答#更好吗？", "如果回答#更好。", "回答#和回答%。", "回答#：回答%更好。", "不是回答#", "回答#更好。回答%更好。",
        "> 回答#更好。", "回答#写着“更好的回答：#”", "更好的回答：#或%", "#. 准确\n%. 完整", "原因：回答#更好。", "回答#：8分", "回答#因为",
    ],
    traps=[
        '{"原因": "回答1不好，回答2明显更好","更好的', '{"原因": "回答2更好，回答1差"', "两个回答都好，分数是1",
        '{"原因": "x", "更好的回答": 1',
    ],
)  # fmt: skip
ENGLISH = Words(
    form=Form(reason_key="reason", verdict_key="better_answer", answer_name="Answer"),
    words=["Answer 1 is better. ", "Answer 2", "x", " ", "\n", "1", "2", "\t", "the first one", "is better", ",", ":", ".", "null", "not "],
    names=["Answer #", "answer #", "Answer #."],
    statements=[
        "#", "Answer #", "Answer # is better.", "The better answer is #.", "better_answer: #", "**Better answer:** #",
        "I prefer answer #.", "Overall, Answer # is better.", "Answer # is clearly better than Answer %.", "[[#]]",
        "Reason: x\nBetter answer: #", "Better answer: #\nReason: answer % is wrong.",
    ],
    silent=[
        "Answer # is not better.", "Is answer # better?", "If answer # is better.", "Answer # and answer %.", "Not answer #",
        "Answer # is better. Answer % is better.", "> Answer # is better.", 'Answer # says "answer # is better".', "Answer # is",
        "Better answer: # or %", "#. Accurate\n%. Complete", "Reason: answer # is better.", "Answer #: 8/10", "Answer # is better in style",
    ],
    traps=[
        '{"reason": "Answer 1 is bad, Answer 2 much better","better_', '{"reason": "Answer 2 is better, Answer 1 is bad"',
        "Both are good, the score is 1", '{"reason": "x", "better_answer": 1',
    ],
)  # fmt: skip


def some_text(choose: Choose, pieces: list[str], most: int = 12) -> str:
    text = "".join(pick(choose, pieces) for _ in range(choose(most)))
    return text * (1 + choose(100_000) // max(1, len(text))) if choose(500) == 499 else text


def value_text(choose: Choose, verdict: int, names: list[str]) -> str:
    name = pick(choose, names).replace("#", str(verdict))
    spelled = [
        f"{verdict}.0",
        f'" {verdict}"',
        f'"{"１２"[verdict - 1]}"',
        f'"{"一二"[verdict - 1]}"',
        f'"**{verdict}**"',
    ]
    return pick(choose, [f"{verdict}", f'"{verdict}"', f'"{name}"', pick(choose, spelled)])


def valid_judgment(choose: Choose, value: str, reason: object, form: Form) -> str:
    """A JSON object that states `value`, in any order, spacing and escaping, perhaps with other keys."""
    key, ascii_only = form.verdict_key, choose(4) == 0
    fields = [(form.reason_key, json.dumps(reason, ensure_ascii=ascii_only)), (key, value)]
    if choose(3) == 0:
        extra = pick(choose, [1, None, [{key: 1}], {key: 2}, {"a": {key: 1}}, f'"{key}": 1', "}"])
        fields.append((pick(choose, ["注", "", "score", key + "x"]), json.dumps(extra, ensure_ascii=ascii_only)))
    if choose(2):
        fields.reverse()
    colon, comma = pick(choose, [": ", ":", " : ", ":\n"]), pick(choose, [", ", ",", ",\n  ", " ,"])
    body = comma.join(json.dumps(key, ensure_ascii=ascii_only) + colon + text for key, text in fields)
    return "{" + pick(choose, ["", "\n", " "]) + body + pick(choose, ["", "\n", " "]) + "}"


def make_answer(choose: Choose, w: Words) -> tuple[str, set]:
    """A text, and what a parser may say of it: the verdict it states, or None, or either where the text is damaged."""
    key, reason_key = w.form.verdict_key, w.form.reason_key
    verdict = 1 + choose(2)
    reason = some_text(choose, w.words + ODD + MARKS + w.keys)
    raw = some_text(choose, w.words + ODD + MARKS + w.mentions)  # as written by a model that does not escape
    prose = some_text(choose, w.words, 5)
    value = value_text(choose, verdict, w.names)
    whole = valid_judgment(choose, value, reason, w.form)
    kind = choose(21)
    if kind == 0:
        return whole, {verdict}
    if kind == 1:
        return prose + whole[: 1 + choose(len(whole) - 1)], {None}
    if kind == 2:
        return f'{{"{reason_key}": "{raw}", "{key}": {value}}}', {verdict, None}
    if kind == 3:
        ending = pick(choose, ["", '"', '",', f'", "{key}"', f'", "{key}":', f'", "{key}": {value}', f'", "{key}": "'])
        text = f'{{"{reason_key}": "{raw}{ending}'
        return text[: len(text) - choose(len(text))] if choose(2) else text, {None}
    if kind == 4:
        pieces = [p for p in w.words + ODD + MARKS + w.keys if "{" not in p]
        return some_text(choose, pieces, 30) + "x", {None}
    if kind == 5:
        other = 1 + choose(2)
        second = valid_judgment(choose, value_text(choose, other, w.names), "x", w.form)
        text = prose.join([whole, second, *[whole] * choose(3)])
        return text, {verdict, None} if other == verdict else {None}
    if kind == 6:
        inner = json.dumps(pick(choose, [{key: verdict}, [{key: verdict}], [[{reason_key: "x", key: verdict}]]]))
        return prose + '{"' + pick(choose, [reason_key, "a", key]) + f'": {inner}}}', {None}
    if kind == 7:
        return valid_judgment(choose, pick(choose, WRONG), reason, w.form), {None}
    if kind == 8:
        other = 1 + choose(2)
        again = value_text(choose, other, w.names)
        text = f'{{"{key}": {value}, "{reason_key}": {json.dumps(reason)}, "{key}": {again}}}'
        return text, {verdict} if other == verdict else {None}
    if kind == 9:
        fence = pick(choose, ["", "```", "```json\n", "```\n", "'''"])
        return prose + fence + whole + fence.strip("json\n") + prose, {verdict, None}
    if kind == 10:
        colon, comma, q = (pick(choose, items) for items in ([":", "："], ["，", ",", " ", ""], ['"', "“", "'"]))
        return f"{{{q}{reason_key}{q}{colon}{q}{raw}{q}{comma}{q}{key}{q}{colon}{value}}}", {verdict, None}
    if kind == 11:
        return pick(choose, w.traps) + prose.replace(":", "").replace("：", ""), {None}
    if kind == 12:
        hole = choose(len(whole) + 1)
        return whole[:hole] + some_text(choose, w.words + ODD + MARKS, 4) + whole[hole + choose(4) :], {1, 2, None}
    if kind == 13:
        pieces = [*w.words, *ODD, *MARKS, *w.keys, *w.mentions, whole]
        return "".join(pick(choose, pieces) for _ in range(choose(40))), {1, 2, None}
    if kind == 14:
        pieces = [
            "[",
            "{",
            '{"a":',
            '"',
            '{"',
            "\\",
            w.form.answer_name,
            f'"{key}"',
            " ",
            "```",
            '{"a":1}',
            whole,
            "\n",
            "1\n",
            END,
        ]
        many = pick(choose, pieces)
        text = many * (choose(100_000) // len(many) // 10 ** choose(4))
        allowed = {verdict, None} if many == whole else {1, None} if many == "1\n" else {None}
        return pick(choose, [(text, allowed), (f'{{"{reason_key}": "{text}', {None})])
    if kind == 15:  # the reason quotes a finished judgment; what follows says otherwise, or is cut off
        quoted = f'{raw}", "{key}": {value_text(choose, 3 - verdict, w.names)}}}{prose}'
        ending = f'", "{key}": {value}}}'
        if choose(2):
            return f'{{"{reason_key}": "{quoted}{ending}', {verdict, None}
        return f'{{"{reason_key}": "{quoted}{ending}'[: -1 - choose(len(value) + 1)], {None}
    if kind == 16:
        text = bytes(choose(256) for _ in range(choose(256))).decode("utf-8", "replace")
        return text, {1, 2, None} if key in text or len(text) < 9 else {None}
    if kind == 17:  # JSON as models write it
        q, comma = pick(choose, ["'", '"', "“"]), pick(choose, [",", "，", ""])
        plain = some_text(choose, [*w.words, "不", "'", "“", "it's", "(", "[", "`"])
        fields = [f"{q}{reason_key}{q}: {q}{plain}{q}", f"{q}{key}{q}: {verdict}"]
        if choose(2):
            fields.reverse()
        text = "{" + ", ".join(fields) + comma + "}"
        cut = text[: 1 + choose(len(text) - 1)]
        return pick(choose, [(text, {verdict}), (cut, {None})])
    if kind in (18, 19):
        text = pick(choose, w.statements if kind == 18 else w.silent)
        text = text.replace("#", str(verdict)).replace("%", str(3 - verdict))
        return text, {verdict} if kind == 18 else {None}
    return f"{prose}x\n{whole}\nx{prose}", {verdict, None}


def make_judgment(choose: Choose) -> tuple[str, set, Form, bool]:
    """As make_answer, perhaps after a thought; with the form, and whether the prompt opened that thought."""
    w, kind, opened = pick(choose, [CHINESE, ENGLISH]), choose(9), choose(2) == 1
    text, allowed = make_answer(choose, w)
    if kind > 2:
        return text, allowed, w.form, False
    draft = pick(choose, [some_text(choose, w.words + ODD + MARKS + w.keys), make_answer(choose, w)[0]])
    start = "" if opened else pick(choose, ["", "\n", " "]) + START
    if kind == 0:  # unfinished
        return start + (draft + text).replace(END, ""), {None}, w.form, opened
    # A bare name may be cut off there; a mark within the thought may be quoted, and a verdict behind it too.
    certain = END not in draft and text not in ("回答1", "回答2", "Answer 1", "Answer 2")
    return f"{start}{draft}{END}\n{text}", allowed if certain else allowed | {None}, w.form, opened


def fuzz_verdict(data: bytes, parse: Callable | None = None) -> str:
    """Makes a judgment of `data` and parses it. Returns `accepted` or `refused`; raises Finding."""
    text, allowed, form, opened = make_judgment(chooser(data))
    verdict = (parse or parse_strict)(text, form, opened)
    shown = f"{'opened ' * opened}{text[:2000]!r}"
    if verdict.value not in allowed:
        raise Finding(f"invented: {verdict} where {allowed} is stated: {shown}")
    if verdict.value is not None and verdict.rung != "stated" and not behind_key(text, verdict.value, form):
        raise Finding(f"invented: {verdict}, which stands behind no key: {shown}")
    found = verdict.rung not in ("none", "tie")
    if (verdict.value in (1, 2)) != found or parse_released(text, form, opened).value not in (1, 2, None):
        raise Finding(f"malformed: {verdict}: {shown}")
    reason = parse_reason(text, form, opened)
    if not isinstance(reason, str) or (reason and parse is None and not found):
        raise Finding(f"malformed: a reason that is no text or has no verdict: {shown}")
    return "refused" if verdict.value is None else "accepted"


def behind_key(text: str, value: int, form: Form) -> bool:
    key = re.escape(form.verdict_key).replace("_", "[_ ]")
    text = re.sub(r"[^\w\s\\:,{}.-]", "", text)  # as markup
    unescaped = re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text) if "\\u" in text else text
    stated = re.findall(key + r"\W*(?:回答|answer)?\W*([12１２一二])", unescaped, re.IGNORECASE)
    return any(number in ("1１一", "2２二")[value - 1] for number in stated)
