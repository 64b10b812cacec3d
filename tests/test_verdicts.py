"""Verdict parsing: what counts as a stated verdict, what never does, and that no text can break it."""

import json
import random
import time

import pytest

from conj.data.prompts import judgment_text
from conj.data.verdicts import parse_reason, parse_released, parse_strict

STATED = {
    '{"原因": "x", "更好的回答": 1}': (1, "json"),
    ' \n{"更好的回答": 2, "原因": "x"}\n': (2, "json"),
    '{"原因": "x",\n "更好的回答": "2"}': (2, "json"),
    '{"原因": "x", "更好的回答": "回答1"}': (1, "json"),
    '{"原因": "回答2更好", "更好的回答": 1}': (1, "json"),
    '{"原因": "x", "更好的回答": 1, "更好的回答": 1}': (1, "json"),
    '```json\n{"原因": "x", "更好的回答": 2}\n```': (2, "fenced"),
    '我的判断：\n```\n{"原因": "x", "更好的回答": 1}\n```\n完毕': (1, "fenced"),
    '判断如下：{"原因": "x", "更好的回答": 2}。': (2, "embedded"),
    '模板里的{name}不影响。{"原因": "x", "更好的回答": 2}': (2, "embedded"),
    '{"原因": "x", "更好的回答": 2} 再说一遍 {"更好的回答": 2}': (2, "embedded"),
    '{"原因": "他说"好"，所以", "更好的回答": 2}': (2, "repaired"),
    '{"原因": "第一行\n第二行", "更好的回答": 1}': (1, "repaired"),
    '{"原因": "x" "更好的回答": 1}': (1, "repaired"),
    '{"原因": "x",\\n "更好的回答": 2}': (2, "repaired"),
    '{"原因"："x"，"更好的回答"：1}': (1, "repaired"),
    '```json\n{"原因": "他说"好"", "更好的回答": "回答2"}\n```': (2, "repaired"),
}
UNSTATED = [
    "",
    "回答1更好",
    "更好的回答是2",
    '"更好的回答": 1',
    '{"原因": "回答1不好，回答2明显更好","更好的',
    '{"原因": "回答2更好，回答1差"',
    '{"原因": "x", "更好的回答": 1',
    '{"原因": "x", "更好的回答": 3}',
    '{"原因": "写"更好的回答"。{"更好的回答": 1}',  # the key is quoted inside a reason that goes on
    '{"原因": "x"} {"更好的回答": 1}',
    '{"原因": "x", "更好的回答": true}',
    '{"原因": "x", "更好的回答": 1.0}',
    '{"原因": "x", "更好的回答": null}',
    '{"原因": "x", "更好的回答": [1]}',
    '{"原因": "x", "更好的回答": "回答1和回答2"}',
    '{"原因": "x", "更好的回答": 1, "更好的回答": 2}',
    '{"更好的回答": 1} {"更好的回答": 2}',
    '{"更好的回答": 1} {"更好的回答": 0}',
    '{"原因": {"更好的回答": 1}}',
    '{"原因": "例如{\\"更好的回答\\": 1}"}',
    '{"原因": "例如{"更好的回答": 1}，但是',
    '{"原因": "例如{"更好的回答": 1}',
    '{"原因": "例如{"原因": "你的解释", "更好的回答": 1}',
    '{"原因": "题目要求输出"更好的回答": 1}',
    '{"原因": "先写"更好的回答": 1，再写", "更好的回答": 2}',
    '{"原因": "他说"好"", "更好的回答": 2} 但是',
    '{"原因": "他说"好"", "更好的回答": 2}"更好的回答": 2}',
    '{"原因": "他说"好"", "更好的回答": 2, "注": "x"}',
    '代码{"a": b}有误。{"原因": "x", "更好的回答": 2}',
]


@pytest.mark.parametrize("text", STATED)
def test_stated_verdict_is_read_with_its_rung(text):
    """Each rung that a base model's output needs, and no more."""
    assert parse_strict(text) == STATED[text]


@pytest.mark.parametrize("text", UNSTATED)
def test_verdict_is_never_read_out_of_a_reason(text):
    """Cut off, contradictory or merely mentioned: a JSON-repair library finds a verdict in many of these."""
    assert parse_strict(text) == (None, "none")
    assert parse_reason(text) == ""


def test_no_prefix_of_a_judgment_has_a_verdict():
    """Sampling cuts judgments off at any token; one that mentions the format must not turn into a verdict."""
    text = judgment_text('回答1写"更好的回答": 2}，而{"更好的回答": 1}是对的。1 2 }', 2)
    assert parse_strict(text) == (2, "json")
    assert {parse_strict(text[:end]) for end in range(len(text))} == {(None, "none")}


@pytest.mark.parametrize("reason", ["", "回答1更好。", '他说"好"', "a\nb\tc", "{name} \\ \u2028 \ud83d", "e\u0301"])
def test_judgment_gives_back_its_reason_and_verdict(reason):
    """What `judgment_text` writes is what `parse_reason` and `parse_strict` read."""
    assert parse_reason(judgment_text(reason, 2)) == reason
    assert parse_strict(judgment_text(reason, 2)) == (2, "json")


def test_reason_of_a_repaired_judgment_is_its_text():
    """`conj.sample.judge` shows it."""
    assert parse_reason('{"原因": "他说"好"\n所以",\n "更好的回答": 2}') == '他说"好"\n所以'
    assert parse_reason('{"原因": 3, "更好的回答": 2}') == ""


RELEASED = {
    '{"原因": "x", "更好的回答": 1}': (1, "json"),
    '{"原因": "x", "更好的回答": "2"}': (2, "json"),
    '{"原因": "回答1好", "更好的回答": "回答2"}': (None, "none"),
    '判断：{"原因": "x", "更好的回答": 2}。': (2, "key"),
    '{"原因": "他说"好"", "更好的回答": 2': (2, "key"),
    '{"原因": "回答1不好，回答2明显更好","更好的': (1, "digit"),
    '{"原因": "回答2更好，回答1差"': (2, "digit"),
    "两个回答都好，分数是1": (1, "digit"),
    "第1个更好": (None, "none"),
}


@pytest.mark.parametrize("text", RELEASED)
def test_released_parser_keeps_its_published_traps(text):
    """Figures comparable with the published ones need its mistakes, too (FACTS lists them)."""
    assert parse_released(text) == RELEASED[text]


MEGABYTE = 1_000_000
HOSTILE = {
    "brackets": "[" * MEGABYTE,
    "braces": "{" * MEGABYTE,
    "spaced braces": "{ " * (MEGABYTE // 2),
    "nested objects": '{"a":' * (MEGABYTE // 5),
    "many objects": '{"a":1}' * (MEGABYTE // 7),
    "open strings": '{"' * (MEGABYTE // 2),
    "keys": '"更好的回答"' * (MEGABYTE // 7),
    "word": "回答" * (MEGABYTE // 2),
    "spaces": '{"原因": "' + " " * MEGABYTE,
    "key and spaces": '{"原因": "x", "更好的回答"' + " " * MEGABYTE,
    "quotes": '{"原因": "' + '"' * MEGABYTE + '更好的回答": 1',
    "commas": '{"原因": "' + ", " * (MEGABYTE // 2) + '"更好的回答": x}',
    "digits": '{"更好的回答": ' + "1" * MEGABYTE + "}",
    "fences": "```" * (MEGABYTE // 3),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_has_no_verdict_and_costs_under_a_second(text):
    """A regular expression that backtracks, or a deep recursion, would stop a run over a million judgments."""
    began = time.process_time()
    assert parse_strict(text).value is None
    parse_released(text)
    assert time.process_time() - began < 1


def test_mutilated_judgments_never_raise():
    """Random cuts, doublings and insertions of everything the parsers look for."""
    rng, pieces = random.Random(0), ["{", "}", '"', ":", ",", "```json\n", "\\", "更好的回答", "原因", "回答", "1", "2"]
    for _ in range(5000):
        text = list(judgment_text("回答1不如回答2", rng.choice((1, 2))))
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(4)] = [rng.choice(pieces)] * rng.randrange(3)
        text = "".join(text)
        for verdict in (parse_strict(text), parse_released(text)):
            assert (verdict.value in (1, 2)) == (verdict.rung != "none")
        assert isinstance(parse_reason(text), str)


def test_strict_agrees_with_json_on_valid_objects():
    """On any valid object the verdict is the value of the key, whatever the reason says."""
    rng = random.Random(1)
    for _ in range(500):
        reason = "".join(rng.choices('{}":,12回答更好的原因\\\n', k=40))
        verdict = rng.choice((1, 2))
        text = json.dumps({"原因": reason, "更好的回答": verdict}, ensure_ascii=rng.random() < 0.5)
        assert parse_strict(text) == (verdict, "json")
