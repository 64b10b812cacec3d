"""Verdict parsing: what counts as a stated verdict, what never does, and that no text can break it."""

import dataclasses
import json
import random
import time

import pytest
from conftest import DATA, cpu_seconds, judgment_text

from conj.data.verdicts import CARD, Form, parse_reason, parse_released, parse_strict, split_thought

NONE, TIE = (None, "none"), (None, "tie")
ENGLISH = Form(reason_key="reason", verdict_key="better_answer", answer_name="Answer")


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


THOUGHT = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "opened", "thought", "answer"),
    [
        ("an answer", False, "", "an answer"),
        (" an answer\n", False, "", " an answer\n"),
        ("<think>\nso\n</think>\n\nan answer", False, "so", "an answer"),
        ("\n<think></think>an answer", False, "", "an answer"),
        ("so</think>an answer", True, "so", "an answer"),
        ("<think>so</think>an answer", True, "so", "an answer"),
        ("so</think>an answer", False, "so", "an answer"),  # the server's template opened it
        ("<think>first </think> then </think>an answer", False, "first </think> then", "an answer"),
        ("<think>so, and", False, "so, and", None),
        ("so, and", True, "so, and", None),
        ("<think>so</think>\n<think>once more", False, "so</think>\n<think>once more", None),
        ("Well.\n<think>so, and", False, "Well.\n<think>so, and", None),
        ("<think>so</think>", False, "so", ""),
        ("It writes <think> and stops.", False, "", "It writes <think> and stops."),
        ("", False, "", ""),
        ("", True, "", None),
    ],
)
def test_an_answer_follows_the_last_end_of_a_thought(text, opened, thought, answer):
    """A thought that a reason is made of gives the hint away; one that is unfinished holds drafts."""
    assert split_thought(text, THOUGHT, opened) == (thought, answer)


MEGABYTE = 1_000_000
HOSTILE = {
    "brackets": "[" * MEGABYTE, "braces": "{" * MEGABYTE, "spaced braces": "{ " * (MEGABYTE // 2),
    "nested objects": '{"a":' * (MEGABYTE // 5), "many objects": '{"a":1}' * (MEGABYTE // 7),
    "open strings": '{"' * (MEGABYTE // 2), "keys": '"更好的回答"' * (MEGABYTE // 7), "word": "回答" * (MEGABYTE // 2),
    "spaces": '{"原因": "' + " " * MEGABYTE, "key and spaces": '{"原因": "x", "更好的回答"' + " " * MEGABYTE,
    "quotes": '{"原因": "' + '"' * MEGABYTE + '更好的回答": 1',
    "commas": '{"原因": "' + ", " * (MEGABYTE // 2) + '"更好的回答": x}',
    "digits": '{"更好的回答": ' + "1" * MEGABYTE + "}", "fences": "```" * (MEGABYTE // 3),
    "judgments": '{"更好的回答":1}' * (MEGABYTE // 11) + '{"更好的回答":2}', "lines": "原因\n" * (MEGABYTE // 3),
    "statements": "回答1更好。" * (MEGABYTE // 6), "open thoughts": "<think>" * (MEGABYTE // 7),
    "thoughts": "<think>{'a'</think>\n" * (MEGABYTE // 20), "quotes in a mark": '{"a": "</think>"}' * (MEGABYTE // 17),
    "other quotes": "{'原因': '" + "'更" * (MEGABYTE // 2) + "'", "colons": "更好的回答" + ":" * MEGABYTE,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_has_no_verdict_and_costs_under_a_second(text):
    """A regular expression that backtracks, or a deep recursion, would stop a run over a million judgments."""
    began = time.process_time()
    assert parse_strict(text).value is None
    parse_released(text)
    assert time.process_time() - began < cpu_seconds(1)


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
            assert (verdict.value in (1, 2)) == (verdict.rung not in ("none", "tie"))
        assert isinstance(parse_reason(text), str)


def test_strict_agrees_with_json_on_valid_objects():
    """On any valid object the verdict is the value of the key, whatever the reason says."""
    rng = random.Random(1)
    for _ in range(500):
        reason = "".join(rng.choices('{}":,12回答更好的原因\\\n', k=40))
        verdict = rng.choice((1, 2))
        text = json.dumps({"原因": reason, "更好的回答": verdict}, ensure_ascii=rng.random() < 0.5)
        assert parse_strict(text) == (verdict, "json")


# ---- Both parsers on the same texts: what strict reads, and what the published parser does ----

STATED = [  # each rung that a base model's output needs, and no more
    ('{"原因": "x", "更好的回答": 1}', (1, "json"), (1, "json")),
    ('{"原因": "x", "更好的回答": "2"}', (2, "json"), (2, "json")),
    (' \n{"更好的回答": 2, "原因": "x"}\n', (2, "json"), (2, "json")),
    ('{"原因": "x",\n "更好的回答": "2"}', (2, "json"), (2, "json")),
    ('{"原因": "x", "更好的回答": "回答1"}', (1, "json"), NONE),
    ('{"原因": "回答1好", "更好的回答": "回答2"}', (2, "json"), NONE),
    ('{"原因": "回答2更好", "更好的回答": 1}', (1, "json"), (1, "json")),
    ('{"原因": "x", "更好的回答": 1, "更好的回答": 1}', (1, "json"), (1, "json")),
    ('```json\n{"原因": "x", "更好的回答": 2}\n```', (2, "fenced"), (2, "key")),
    ('我的判断：\n```\n{"原因": "x", "更好的回答": 1}\n```\n完毕', (1, "fenced"), (1, "key")),
    ('判断：{"原因": "x", "更好的回答": 2}。', (2, "embedded"), (2, "key")),
    ('判断如下：{"原因": "x", "更好的回答": 2}。', (2, "embedded"), (2, "key")),
    ('模板里的{name}不影响。{"原因": "x", "更好的回答": 2}', (2, "embedded"), (2, "key")),
    ('{"原因": "x", "更好的回答": 2} 再说一遍 {"更好的回答": 2}', (2, "embedded"), (2, "key")),
    ('{"原因": "他说"好"，所以", "更好的回答": 2}', (2, "repaired"), (2, "key")),
    ('{"原因": "第一行\n第二行", "更好的回答": 1}', (1, "repaired"), (1, "key")),
    ('{"原因": "x" "更好的回答": 1}', (1, "repaired"), (1, "key")),
    ('{"原因": "x",\\n "更好的回答": 2}', (2, "repaired"), (2, "key")),
    ('{"原因"："x"，"更好的回答"：1}', (1, "repaired"), (1, "key")),
    ('```json\n{"原因": "他说"好"", "更好的回答": "回答2"}\n```', (2, "repaired"), (2, "digit")),
    ("{'原因': 'x', '更好的回答': 2}", (2, "repaired"), (2, "key")),
    ('{"原因": "x", "更好的回答": 1,}', (1, "repaired"), (1, "key")),
    ("{“更好的回答”：2，“原因”：“x”}", (2, "repaired"), (2, "digit")),
    ('{"原因": "x", "更好的回答": １}', (1, "repaired"), NONE),
    ('判断：{"原因": "第一行\n第二行", "更好的回答": 1}', (1, "repaired"), (1, "key")),
    *(
        (f'{{"原因": "x", "更好的回答": {value}}}', (n, "spelled"), NONE)
        for value, n in (
            ("1.0", 1),
            ("2e0", 2),
            ('"1 "', 1),
            ('"２"', 2),
            ('"回答１"', 1),
            ('"回答二"', 2),
            ('"回答2更好。"', 2),
        )
    ),
    ("第1个更好", (1, "stated"), NONE),
    ("回答1更好", (1, "stated"), (1, "digit")),
    ("更好的回答是2", (2, "stated"), (2, "digit")),
    ("更好的回答：2", (2, "stated"), (2, "key")),
    ("**更好的回答**：1", (1, "stated"), (1, "digit")),
    ("**2**", (2, "stated"), NONE),
    ("原因：x\n更好的回答：2", (2, "lines"), (2, "key")),
    ("更好的回答：2\n\n原因：x", (2, "lines"), (2, "key")),
    ("两个回答一样好。", TIE, NONE),
    ('{"原因": "x", "更好的回答": "平局"}', TIE, NONE),
]
UNSTATED = [  # cut off, contradictory or merely mentioned: a JSON-repair library finds a verdict in many of these
    ("", NONE, NONE),
    ("两个回答都好，分数是1", NONE, (1, "digit")),
    ('"更好的回答": 1', NONE, (1, "key")),
    ('{"原因": "x", "更好的回答": 1', NONE, (1, "key")),
    ('{"原因": "写"更好的回答"。{"更好的回答": 1}', NONE, (1, "key")),  # the key is quoted inside a reason that goes on
    ('{"原因": "x"} {"更好的回答": 1}', NONE, (1, "key")),
    ('{"原因": "x", "更好的回答": 1, "更好的回答": 2}', NONE, (2, "json")),
    ('{"更好的回答": 1} {"更好的回答": 2}', NONE, (1, "key")),
    ('{"更好的回答": 1} {"更好的回答": 0}', NONE, (1, "key")),
    ('{"原因": {"更好的回答": 1}}', NONE, (1, "key")),
    ('{"原因": "例如{\\"更好的回答\\": 1}"}', NONE, (1, "digit")),
    ('{"原因": "例如{"更好的回答": 1}，但是', NONE, (1, "key")),
    ('{"原因": "例如{"更好的回答": 1}', NONE, (1, "key")),
    ('{"原因": "例如{"原因": "你的解释", "更好的回答": 1}', NONE, (1, "key")),
    ('{"原因": "题目要求输出"更好的回答": 1}', NONE, (1, "key")),
    ('{"原因": "先写"更好的回答": 1，再写", "更好的回答": 2}', NONE, (1, "key")),
    ('{"原因": "他说"好"", "更好的回答": 2', NONE, (2, "key")),
    ('{"原因": "他说"好"", "更好的回答": 2} 但是', NONE, (2, "key")),
    ('{"原因": "他说"好"", "更好的回答": 2}"更好的回答": 2}', NONE, (2, "key")),
    ('{"原因": "他说"好"", "更好的回答": 2, "注": "x"}', NONE, (2, "key")),
    ('代码{"a": b}有误。{"原因": "x", "更好的回答": 2}', NONE, (2, "key")),
]
# Written by demo/base on questions of demo/test.jsonl: greedy, at temperature 1.2, and at 2.0, where it falls apart.
WRITTEN_BY_THE_SHIPPED_JUDGE = [
    ('{"原因": "回答1开门见山，表达更清楚。", "更好的回答": 1}', (1, "json"), (1, "json")),
    ('{"原因": "回答2内容更丰富，信息更多，回答1只说了几句。", "更好的回答": 2}', (2, "json"), (2, "json")),
    ('{"原因": "回答2条理更清楚，读起来更通顺。", "更好的回答": 2}', (2, "json"), (2, "json")),
    ('{"原因": "花枣，回答1蜜榆，回答2不对。", "更好的回答": 1}', (1, "json"), (1, "json")),
    ('{"原因棠，回答2太啰嗦。", "更好的回答":}', NONE, (2, "digit")),
    ('青菊镇每年都有许多游客前来，回答2不对。", "更好的回答": 2}', NONE, (2, "key")),
    ('碧杏，不是白桃，回答1更准确。", "更好的回答": z雪鹤，回答2}', NONE, (1, "digit")),
    ('{"原因": "回答�专�香松，不是蜜菊青杉镇的镇花是碧莲，回答��，回答', NONE, NONE),
    ('{"原因": "回答\x19，回答�，回答1太啰嗦。", "更好的回答": 2}', (2, "repaired"), (2, "key")),
    ('{"原因":：\n{"原因": "回答银茶，回答1太啰嗦。", "更好的回答": 2}', NONE, (2, "key")),
    ('{"原因": "": "碧棠？甜糖乌榆，不是云梨，回答1更准确。", "更好的回答": 1}', (1, "repaired"), (1, "key")),
    ('{"顺雪葵镇的镇树是甜桐，回答1正确，回答2不对。", "更好的回答": 1}', NONE, (1, "key")),
    ('{"原因": "回答1青枫碧酒镇的镇树是甜桐，"，回答2正确，回答不对。", "更好的回答": 2}', (2, "repaired"), (2, "key")),
    ('{"原因": "云林镇的特产是红糕，不是��风淳�，回答2不对。", "更好的回答": 白桐写�，回答1}', NONE, (2, "digit")),
    ('{"原因": "青岭镇的镇鸟是白鸽花鹭，回答1不对。", "更好的回答": 1}淳�，回答2}', (1, "embedded"), (1, "key")),
    ('{"原因": "霜糕，不是蜜菊，回答1更准确。", "更好的回答": 1云枫镇玉松，回答2}', NONE, (1, "key")),
    ('{"原因": "回答2太啰嗦。", "更好的回答蜜桂，回答2太啰嗦。", "更好的回答": 1}', NONE, (1, "key")),
    ('面最为符合碧梨镇的霜糕，表达更清楚。", "更好的回答": "更好的回答": 2}', NONE, (2, "key")),
    ("。请用JSON格式输出你的判断镇的镇树雪鹭，回答甜鸽，回答2太啰嗦请问", NONE, (2, "digit")),
    ('{"原因": "白糖金鹭，回答1不对。",赤泉镇 "更好的回答": 紫桐，回答香桃，回答2}', NONE, (1, "digit")),
]
# How large judges answer who are asked for one letter, one number or a chain of thought; in our own words.
IN_PROSE = [
    ("Output (a)", NONE, NONE),
    ("The second one is better because it follows the instruction, so my choice is (b).", NONE, NONE),
    ("回答2比回答1更完整，因此我选择回答2。", NONE, (2, "digit")),
    ("两个回答各有优点，但第一个更切题。", NONE, NONE),
    ("我认为更好的回答是1，因为它回答了2个问题。", NONE, (1, "digit")),
    ("更好的回答是第二个，它列出了10条理由", NONE, (1, "digit")),
    ("两者都不好。", NONE, NONE),
    ("无法判断，请提供更多信息。", NONE, NONE),
    ('先想一想。回答1漏了一步。\n\n{"原因": "回答1漏了一步", "更好的回答": 2}', (2, "embedded"), (2, "key")),
    ('以下是我的判断：\n```json\n{"原因": "更切题", "更好的回答": 1}\n```\n希望有帮助！', (1, "fenced"), (1, "key")),
    ('```\n{"更好的回答": 2, "原因": "回答1跑题"}\n```', (2, "fenced"), (2, "key")),
    ('<think>回答1更好？</think>{"原因": "回答2有据", "更好的回答": 2}', (2, "json"), (2, "json")),
]
ADVERSARIAL = [
    # The traps of the published parser: it reads a verdict out of a reason, and misses one that is there.
    ('{"原因": "回答1不好，回答2明显更好","更好的', NONE, (1, "digit")),
    ('{"原因": "回答2更好，回答1差"', NONE, (2, "digit")),
    ('{"原因": "x", "更好的回答": "回答2"}', (2, "json"), NONE),
    # Cut off, at every stage.
    ("{", NONE, NONE),
    ('{"原因": "回答', NONE, NONE),
    ('{"原因": "x", "更好的回答": ', NONE, NONE),
    ('{"原因": "x", "更好的回答": 2', NONE, (2, "key")),
    ('```json\n{"原因": "回答1好", "更好的回答": 1', NONE, (1, "key")),
    # The value: of the wrong type, out of range, or written otherwise.
    *((f'{{"原因": "x", "更好的回答": {value}}}', NONE, NONE) for value in (
        "true", "null", "[1]", "[2]", '{"更好的回答": 2}', "NaN", "-1", "0", "3", "12", "1e999",
        '"回答1和回答2"', '"A"', '"都好"',
    )),
    ('{"原因": "x", "更好的回答": "1"}', (1, "json"), (1, "json")),
    ('{"原因": "x", "更好的回答": 1' + "0" * 5000 + "}", NONE, (1, "key")),  # more digits than Python reads
    ('{"原因": "x", "更好的回答": 02}', NONE, (2, "digit")),
    ('{"原因": "x", "更好的回答": 1 或 2}', NONE, (1, "key")),
    # The key: another one, or written otherwise.
    ('{"reason": "x", "better": 2}', NONE, NONE),
    ('{"原因": "x", "更好的 回答": 2}', NONE, (2, "digit")),
    ('{"原因": "x", "更好的答案": 2}', NONE, NONE),
    ("{原因: x, 更好的回答: 2}", NONE, (2, "key")),
    ('{"原因": "x", "\\u66f4\\u597d\\u7684\\u56de\\u7b54": 2}', (2, "json"), (2, "json")),
    ('{"原因"："x"，"更好的回答"：2}', (2, "repaired"), (2, "key")),
    # A verdict quoted in a reason, a second object, a contradiction.
    ('{"原因": "有人写{\\"更好的回答\\": 1}", "更好的回答": 2}', (2, "json"), (2, "json")),
    ('{"原因": "有人写{\\"更好的回答\\": 1}"}', NONE, (1, "digit")),
    ('{"原因": "回答1要求输出"更好的回答": 1"', NONE, (1, "key")),
    ('{"更好的回答": 1}{"更好的回答": 2}', NONE, (1, "key")),
    ('{"更好的回答": 1}\n{"更好的回答": 1}', (1, "embedded"), (1, "key")),
    ('{"原因": "x", "更好的回答": 2, "更好的回答": 1}', NONE, (1, "json")),
    ('[{"原因": "x", "更好的回答": 2}]', (2, "embedded"), (2, "key")),
    ('{"判断": {"原因": "x", "更好的回答": 2}}', NONE, (2, "key")),
    ('"{\\"更好的回答\\": 2}"', NONE, (2, "digit")),
    ('例如{"原因": "你的解释", "更好的回答": 1}。{"原因": "回答2好", "更好的回答": 2}', NONE, (1, "key")),
    # Bytes and line ends.
    ('\ufeff{"原因": "x", "更好的回答": 1}', (1, "embedded"), (1, "key")),
    ('{\r\n  "原因": "x",\r\n  "更好的回答": 2\r\n}\r\n', (2, "json"), (2, "json")),
    ('\u3000{"原因": "x", "更好的回答": 2}\u2028', (2, "json"), (2, "key")),
    ('{"原因": "\ud83d", "更好的回答": 1}', (1, "json"), (1, "json")),
    ('{"原因": "\x00", "更好的回答": 1}', (1, "repaired"), (1, "key")),
    ('{"原因": "a\\\\", "更好的回答": 2}', (2, "json"), (2, "json")),
    ('{"原因": "他说\\"回答1\\"", "更好的回答": 2}', (2, "json"), (2, "json")),
    ('{"原因": "他说"回答1"对", "更好的回答": 2}', (2, "repaired"), (2, "key")),
    ('{"原因": "x", "更好的回答": 1}}', (1, "embedded"), (1, "key")),
    ('{"原因": "x"; "更好的回答": 1}', NONE, (1, "key")),
]  # fmt: skip
TABLE = STATED + UNSTATED + WRITTEN_BY_THE_SHIPPED_JUDGE + IN_PROSE + ADVERSARIAL


@pytest.mark.parametrize(("text", "strict", "released"), TABLE, ids=range(len(TABLE)))
def test_both_parsers_on_one_text(text, strict, released):
    """A verdict is never read out of a reason; the published parser's traps are kept, or figures would not compare with
    the published ones (FACTS lists them)."""
    assert (parse_strict(text), parse_released(text)) == (strict, released)
    assert strict not in (NONE, TIE) or parse_reason(text) == ""


def test_what_strict_reads_released_reads_alike_or_not_at_all():
    """A rung of ours that read another verdict than the published parser would be an invention."""
    assert len({text for text, _, _ in TABLE}) == len(TABLE) >= 60
    assert not [text for text, strict, released in TABLE if {strict[0], released[0]} == {1, 2}]


# ---- What a person would say ----

CORPUS = [
    (form, json.loads(line))
    for name, form in (("con-j", CARD), ("english", ENGLISH))
    for line in (DATA / "judgments" / f"{name}.jsonl").read_text("utf-8").splitlines()
]
ARGUED = "argued"  # a person follows the argument; a parser that did would look into reasons


def misread(parse) -> tuple[list, list]:
    """What was read otherwise than a person would, and what was not read."""
    wrong, unread = [], []
    for form, row in CORPUS:
        verdict = parse(row["text"], form, row.get("opened", False))
        found = "tie" if verdict.rung == "tie" else verdict.value
        if found != row["says"]:
            (unread if found is None else wrong).append((row["kind"], row["text"], row["says"], found))
    return wrong, unread


def test_no_verdict_is_invented_and_what_is_plainly_stated_is_read():
    """An invented verdict trains on a lie; one that is not read makes a right judgment a rejected one. What the labels
    mean: tests/data/SOURCE.md."""
    wrong, unread = misread(parse_strict)
    assert not wrong
    plain = [row for _, row in CORPUS if row["says"] in (1, 2) and row["kind"] != ARGUED]
    missed = [row for row in unread if row[0] != ARGUED]
    assert len(CORPUS) >= 300 and len(plain) >= 200
    assert len(missed) <= 0.02 * len(plain), missed


@pytest.mark.parametrize(
    "parse", [parse_released, lambda text, form, opened: parse_strict(text, without_thoughts(form))]
)
def test_the_corpus_finds_out_a_parser_that_invents(parse):
    """The negative control: the published parser, and ours if it took thoughts for answers."""
    assert len(misread(parse)[0]) > 10


def without_thoughts(form: Form) -> Form:
    return dataclasses.replace(form, thought=("no mark", "at all"))


def test_the_marks_of_a_thought_are_the_forms():
    text = '[THINK]回答1更好？{"更好的回答": 1}[/THINK]{"原因": "x", "更好的回答": 2}'
    assert parse_strict(text) == NONE
    assert parse_strict(text, Form(thought=("[THINK]", "[/THINK]"))) == (2, "json")


def test_an_end_mark_may_be_quoted_in_a_reason():
    """The verdict stands behind the key of the whole object, never in what the mark is quoted with."""
    whole = '{"原因": "回答1写了</think>{\\"更好的回答\\": 1}", "更好的回答": 2}'
    for before in ("", "<think>嗯。</think>"):
        assert parse_strict(before + whole) == (2, "json")
        assert {parse_strict(before + whole[:end]) for end in range(len(whole))} == {NONE}
    assert parse_strict('嗯。</think>{"原因": "</think>", "更好的回答": 1}', opened=True) == (1, "json")


def test_an_escaped_quote_before_a_brace_is_no_end():
    """Found by the fuzzer: the text is cut off within its reason."""
    assert parse_strict('{"更好的回答": 1, "原因": "写\\",}') == NONE
    assert parse_strict('{"更好的回答": 1, "原因": "写\\\\",}') == (1, "repaired")


def test_a_name_that_ends_a_text_after_a_thought_may_be_cut_off():
    """There the budget of tokens may end; without a thought an answer of two words is whole."""
    assert parse_strict("回答2") == parse_strict("<think>嗯。</think>**回答2**") == (2, "stated")
    assert parse_strict("<think>嗯。</think>回答2") == NONE
