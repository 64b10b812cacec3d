"""Judges as files: what a file may say, that texts are filled as they are, and how judgments are written and read."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from pathlib import Path

import pytest
from conftest import CARD, judge_messages

from conj import InputError
from conj.data.identity import describe_judge, hash_judge
from conj.data.judge_keys import KEYS
from conj.data.judges import FOLDER, Judge, judge_file, judge_prompt, judgment_text, load_judge, shipped_judges
from conj.sample.engines.completion import first_probability

OF_CARD = ["con-j", "gpt-4o", "llama3.1-70b", "llama3.1-8b", "qwen2-7b", "qwen2.5-72b"]
OWN_JUDGES = ["con-j-thinking", "english", "english-thinking"]
OWN = """
user = 'Which is better? {question} | {answer_1} | {answer_2}'
verdict_pattern = 'better: (A|B|neither)'
verdicts = { A = 1, B = 2, neither = 0 }
"""


def write(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text, "utf-8")
    return str(folder / "mine.toml")


def test_the_judges_of_the_cards_table_and_ours_are_shipped():
    assert shipped_judges() == sorted([*OF_CARD, *OWN_JUDGES, "auto-j", "prometheus-2"])


@pytest.mark.parametrize("name", OF_CARD)
def test_the_cards_prompt_is_one_text(name):
    """A second copy of it would drift."""
    judge = load_judge(name)
    assert judge.name == name and judge.model
    for question in "q {answer_1}", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]:
        assert judge_prompt(judge, question, "x", "y") == judge_messages(question, "x", "y")
    assert judge.parse('{"原因": "回答2差", "更好的回答": 1}') == (1, "json")
    assert judge.backend == ("openai" if name == "gpt-4o" else "vllm")
    assert ("作为一个评价专家" in (FOLDER / f"{name}.toml").read_text("utf-8")) == (name == "con-j")


TURNS = [("system", "简短回答"), ("user", "first"), ("assistant", "reply"), ("user", "last"), ("tool", "42")]


@pytest.mark.parametrize(("question", "hashes"), [
    ("问{answer_1}？", ["a0fa38a810ee074b", "a8c72936c78b858b", "16034d6e3e9df551"]),
    ([{"role": role, "content": content} for role, content in TURNS], ["b33deac0702cf49b", "027f16e3a633072b", "60a3a6d66280bc17"]),
])  # fmt: skip
def test_the_cards_prompt_stays_the_same_to_the_byte(question, hashes):
    """Taken from the code before judges were files: another space would be another prompt than the published judge's."""
    for hint, expected in zip((None, 1, 2), hashes):
        messages = judge_prompt(load_judge("con-j"), question, "a{question}", "乙\n", hint)
        found = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
        assert found.startswith(expected), hint


def test_a_text_is_filled_in_one_pass(tmp_path):
    """Filled one place after the other, an answer would put the other answer, or the question, where it likes;
    str.format would fail on any brace."""
    judge = load_judge(write(tmp_path, OWN + "system = 'S {question}'"))
    system, user = judge_prompt(judge, "{answer_1}{{x}}", "{answer_2} {0} %s", "{question} \\1 \\g<0>")
    assert user["content"] == "Which is better? {answer_1}{{x}} | {answer_2} {0} %s | {question} \\1 \\g<0>"
    assert system == {"role": "system", "content": "S {question}"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert "? 用户：a\n助手：b\n用户：c | x" in judge_prompt(judge, turns, "x", "y")[-1]["content"]
    assert [m["role"] for m in judge_prompt(load_judge(write(tmp_path, OWN)), "q", "x", "y")] == ["user"]


@pytest.mark.parametrize(("text", "verdict"), [
    ("better: A", 1), ("better: B, not better: A", 1), ("better: A. No: better: B", 2), ("better: neither", 0),
    ("better: C", None), ("", None), ("Better: A", None),
])  # fmt: skip
def test_the_last_match_of_a_pattern_counts(text, verdict, tmp_path):
    """A judge weighs before it decides."""
    judge = load_judge(write(tmp_path, OWN))
    assert judge.parse(text) == (verdict, "none" if verdict is None else "pattern")


AUTO_J = {
    "...The final decision is Response 1.": 1, "the final decision is response 2": 2, "final decision is Tie": 0,
    "the final decision is Response 1. Then again, the final decision is Response 2.": 2,
    "final decision is Response 1, but the final decision is hard": None, "Response 1 is better": None,
    "final decision is Response 3": None, "final decision is Response": None, "综上，最终决定是回应1。": 1,
    "最终决定是回应 2": 2, "最终决定是平局": 0, "最终决定是": None, "": None,
}  # fmt: skip


def test_auto_j_is_read_as_it_writes(tmp_path):
    """Its text is its authors': from a file, and without one the error says so."""
    with pytest.raises(InputError, match="auto-j.toml: user: found no text; the prompt of auto-j is not ours to ship"):
        load_judge("auto-j")
    (tmp_path / "text").write_text("{question}\n[1] {answer_1}\n[2] {answer_2}\n", "utf-8")
    judge = load_judge("auto-j", tmp_path / "text")
    assert judge_prompt(judge, "q", "a", "b") == [{"role": "user", "content": "q\n[1] a\n[2] b"}]
    assert {text: judge.parse(text).value for text in AUTO_J} == AUTO_J
    assert judge.verdict_place[1:] == ("1", "2")
    assert (judge.max_length, judge.backend) == (4096, "vllm")


PROMETHEUS = {
    "Feedback: A is fine, B is better. [RESULT] B": 2, "[RESULT] A": 1, "[RESULT]A\n": 1, "[RESULT] (A or B)": None,
    "[RESULT] A or B": None, "[RESULT] Apple": None, "[RESULT] A ... [RESULT] B": 2, "[RESULT] C": None,
    "Feedback: B": None,
}  # fmt: skip


def test_prometheus_takes_its_text_from_its_package_and_runs_none_of_it(tmp_path, monkeypatch):
    """The package's own imports want half a dozen others; constants are all there is to read."""
    if not any(d.name == "prometheus-eval" for d in importlib.metadata.distributions()):
        with pytest.raises(InputError, match="pip install --no-deps prometheus-eval"):
            load_judge("prometheus-2")
    (tmp_path / "prometheus_eval").mkdir()
    (tmp_path / "prometheus_eval-9.dist-info").mkdir()
    (tmp_path / "prometheus_eval-9.dist-info" / "METADATA").write_text("Name: prometheus-eval\nVersion: 9\n")
    (tmp_path / "prometheus_eval" / "prompts.py").write_text(
        'raise SystemExit("this was run")\nREL_SYSTEM_PROMPT = "Be fair."\nHELPFULNESS_RUBRIC = """\n[{helps}?]\n""".strip()\n'
        'RELATIVE_PROMPT_WO_REF = """T {instruction} A {response_A} B {response_B} R {rubric} {other} """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = load_judge("prometheus-2")
    assert judge_prompt(judge, "q", "{response_B}", "{answer_1}") == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "T q A {response_B} B {answer_1} R [{helps}?] {other} "},
    ]
    assert {text: judge.parse(text).value for text in PROMETHEUS} == PROMETHEUS
    (tmp_path / "prometheus_eval" / "prompts.py").write_text("RELATIVE_PROMPT = ''")
    with pytest.raises(InputError, match="expected REL_SYSTEM_PROMPT, RELATIVE_PROMPT_WO_REF, HELPFULNESS_RUBRIC in"):
        load_judge("prometheus-2")


PROMPT = 'prompt = "con-j"\n'
TEXTS = "user = '{question}{answer_1}{answer_2}'\n"


@pytest.mark.parametrize(("text", "message"), [
    ("", "mine.toml: user: expected a text, or prompt = "),
    (TEXTS + "reason_key = 'a_b'\nverdict_key = 'a-b'", "expected keys and marks with which its judgments for 1 and 2"),
    (TEXTS + "thought = ['{', '}']", "read as None and None"),
    (PROMPT + "user = '{question}{answer_1}{answer_2}'", "expected prompt or user, found both"),
    (PROMPT + "system = 'x'", "expected prompt or system, found both"),
    (PROMPT + "reason_key = 'x'", "expected prompt or reason_key, found both"),
    (TEXTS + "hint_1 = '{question}{answer_1}{answer_2}'", "expected hint_1 and hint_2, or neither"),
    (TEXTS + "hint_1 = '{question}'\nhint_2 = '{answer_1}'", "hint_1: expected {answer_1}, {answer_2} in the text"),
    (TEXTS + "roles = { user = 'U: ' }", "roles: expected a table of texts, system, user, assistant, tool"),
    (TEXTS + "language = 'fr'", "language: expected zh or en"),
    (TEXTS + "thought = ['<think>']", "thought: expected two texts, before and behind a thought"),
    (TEXTS + "thought = ['|', '|']", "expected two marks of a thought, and two keys of a judgment, that differ"),
    (TEXTS + "reason_key = 'x'\nverdict_key = 'x'", "two keys of a judgment, that differ"),
    (TEXTS + "verdict_key = 'x'\nparser = 'released'", "parser: released reads 更好的回答 alone, found x"),
    (TEXTS + "reason_start = 'Because'", "reason_start: expected a text with {verdict} and, if"),
    (TEXTS + "reason_start = '{verdict} as '", "no white space at its ends, found '{verdict} as '"),
    (TEXTS + "reason_start = '{verdict} beats {answer_2}'", "reason_start: expected a text with {verdict} and, if"),
    (TEXTS + "reason_start = '<think>{verdict}'", "mine.toml: reason_start: expected a text without a mark"),
    (TEXTS + """reason_start = '{"原因": "{verdict}'""", "nothing that is read as a judgment or another verdict"),
    (TEXTS + "parser = 'released'\nreason_start = '与回答{other}相比，回答{verdict}更好'", "another verdict; found '与回答2"),
    (OWN + "judgment = '{reason} better: {verdict}'\nreason_start = 'It is better: {verdict}'", "read as a judgment"),
    (OWN + "judgment = 'better: {verdict} {reason}'\nreason_start = 'B: {other}. better: {other}? {verdict}'", "found 'B: B."),
    (TEXTS + "judgment = '{reason} {verdict}'", "judgment: expected none without a verdict_pattern"),
    (OWN + "judgment = 'better: {verdict}'", "judgment: expected a text with {reason} and {verdict}"),
    (OWN + "judgment = '{reason} {verdict}'", "read as None and None"),
    (PROMPT + "temperature = -1", "temperature: expected a number from 0 up"),
    (PROMPT + "top_p = 0", "top_p: expected a number above 0 up to 1"),
    (PROMPT + "top_k = 0", "top_k: expected a number from 1 up"),
    ("user = '{question} {answer_1}'", r"user: expected {answer_2} in the text"),
    (PROMPT + "colour = 1", "colour: no key of a judge; expected one of name, model, prompt"),
    ("prompt = 'another'", "prompt: expected con-j or english, found 'another'"),
    ("prompt = ['con-j']", "prompt: expected con-j or english"),
    (PROMPT + "parser = 'lenient'", "parser: expected strict or released"),
    (PROMPT + "backend = 'http'", "backend: expected vllm or openai"),
    (PROMPT + "backend = 'openai'", "model: expected the name that the endpoint knows"),
    (PROMPT + "backend = 'openai'\nmodel = 'x'\nchat_template = 'x'", "chat_template: expected none"),
    (PROMPT + "max_length = 0", "max_length: expected a number from 1 up, found 0"),
    (PROMPT + "max_new_tokens = true", "max_new_tokens: expected a number from 1 up, found True"),
    (PROMPT + "prompt_dollars = nan", "prompt_dollars: expected a number from 0 up"),
    (PROMPT + "prompt_dollars = 'x'", "prompt_dollars: expected a number from 0 up"),
    (PROMPT + "model = 3", "model: expected a text, found 3"),
    (PROMPT + "verdict_pattern = '(a)'", "expected verdict_pattern and verdicts, or neither"),
    (PROMPT + "verdict_pattern = '('\nverdicts = {A = 1, B = 2}", "verdict_pattern: expected a regular expression"),
    (PROMPT + "verdict_pattern = 'A|B'\nverdicts = {A = 1, B = 2}", r"verdict_pattern: expected one \(group\), found 0"),
    (PROMPT + "verdict_pattern = '(a)'\nverdicts = {A = 1}", "verdicts: expected texts for 1 and for 2"),
    (PROMPT + "verdict_pattern = '(a)'\nverdicts = {A = 1, B = 3}", "verdicts: expected a table"),
    (PROMPT + "verdict_pattern = '(a)'\nverdicts = {A = true, B = 2}", "verdicts: expected a table"),
    (PROMPT + "verdict_pattern = '(a)'\nverdicts = {A = 1, a = 2}", "differ in more than case"),
    (PROMPT + "text = 3", "text: expected package, file, system, user, fill"),
    ("prompt = ", "mine.toml: cannot be read"),
])  # fmt: skip
def test_a_file_that_is_no_judge_is_refused_by_its_key(text, message, tmp_path):
    """A misspelt key would leave a default in its place, and the figures would be another judge's."""
    with pytest.raises(InputError, match=message):
        load_judge(write(tmp_path, text))


@pytest.mark.parametrize(("judge", "message"), [
    (["conj"], "expected a .toml file or one of auto-j, con-j"), (["nowhere.toml"], "nowhere.toml: no such file"),
    (["auto-j", Path("nowhere")], "nowhere: no such file"),
])  # fmt: skip
def test_an_unknown_name_lists_the_known_ones(judge, message):
    with pytest.raises(InputError, match=message):
        load_judge(*judge)


def test_every_key_of_a_file_is_one_of_a_judge():
    """A key that is checked and then not read would be a setting without a meaning."""
    assert KEYS.keys() - {"prompt"} == {field.name for field in dataclasses.fields(Judge)}


@pytest.mark.parametrize("name", [*(name for name in OF_CARD if name != "gpt-4o"), *OWN_JUDGES])
def test_the_file_in_a_models_folder_is_the_whole_judge(name, tmp_path):
    """It needs no other file, and names no model: another one would be asked than the one that it lies beside."""
    judge = load_judge(name)
    copy = load_judge(write(tmp_path, judge_file(judge)))
    assert copy == dataclasses.replace(judge, model=None)
    for question in "q", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]:
        for hint in None, 1, 2:
            assert judge_prompt(copy, question, "a", "b", hint) == judge_prompt(judge, question, "a", "b", hint)


def test_a_judges_hash_is_that_of_what_decides_its_judgments(tmp_path):
    """Whatever it is called, wherever its text is from, and whatever it costs; not where any text or its decoding differ."""
    card, named = (
        load_judge("con-j"),
        load_judge(write(tmp_path, PROMPT + "prompt_dollars = 1\ncompletion_dollars = 2")),
    )
    assert hash_judge(card) == hash_judge(named) == hash_judge(load_judge("qwen2-7b"))
    assert describe_judge(card) == f"judge con-j {hash_judge(card)}"
    others = [load_judge(name) for name in ("english", "con-j-thinking", "gpt-4o")]
    others += [
        load_judge(write(tmp_path, PROMPT + line)) for line in ("max_new_tokens = 9", "thought = ['<a>', '</a>']")
    ]
    others += [dataclasses.replace(card, hint_2=card.hint_2 + " ")]
    assert len({hash_judge(judge) for judge in (card, *others)}) == 1 + len(others)


ENGLISH = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}]


def test_the_english_judge_asks_writes_and_reads_english():
    """A Chinese word in its prompt or its judgments would be what English models stumble over."""
    judge = load_judge("english")
    for hint in None, 1, 2:
        system, user = judge_prompt(judge, ENGLISH, "x {question}", "y", hint)
        assert system == {"role": "system", "content": ""} and user["content"].isascii()
        assert user["content"].endswith(
            "Question: User: a\nAssistant: b\nTool: c\n\nAnswer 1: x {question}\n\nAnswer 2: y"
        )
        assert hint is None or f"explain why answer {hint} is better than answer {3 - hint}" in user["content"].lower()
    text = judgment_text(judge, 'says "é"', 2)
    assert text == '{"reason": "says \\"é\\"", "better_answer": 2}'
    assert (judge.parse(text), judge.reason(text)) == ((2, "json"), 'says "é"')
    assert judgment_text(judge, None, 1) == '{"better_answer": 1}'
    assert judge.parse(judgment_text(CARD, "r", 2)).value is None
    thinking = load_judge("english-thinking")
    assert judge_prompt(thinking, "q", "a", "b") == judge_prompt(judge, "q", "a", "b")
    assert thinking.max_new_tokens > judge.max_new_tokens and thinking.temperature > 0 == judge.temperature


WRITES = (
    OWN
    + "judgment = '{reason}. So better: {verdict}!'\nhint_1 = '{question}{answer_1}{answer_2}'\nhint_2 = 'H2 {question}{answer_1}{answer_2}'"
)


def test_a_pattern_judge_writes_what_it_reads(tmp_path):
    """A reason that holds the places or a verdict changes nothing of what stands behind it."""
    judge = load_judge(write(tmp_path, WRITES))
    text = judgment_text(judge, "{verdict} better: A", 2)
    assert text == "{verdict} better: A. So better: B!"
    assert (judge.parse(text), judge.reason(text)) == ((2, "pattern"), "{verdict} better: A. So")
    assert judge_prompt(judge, "q", "a", "b", 2)[-1]["content"] == "H2 qab"
    assert load_judge(write(tmp_path, judge_file(judge))) == judge


THOUGHTS = [  # text, whether the prompt opened the thought, verdict and rung
    ('<think>{"reason": "d", "better_answer": 1}</think>\n{"reason": "r", "better_answer": 2}', False, (2, "json")),
    ('<think>so far: {"reason": "d", "better_answer": 1}', False, (None, "unfinished")),
    ('draft {"reason": "d", "better_answer": 1}', True, (None, "unfinished")),
    ('draft {"reason": "d", "better_answer": 1}</think>{"reason": "r", "better_answer": 2}', True, (2, "json")),
    ('{"reason": "r", "better_answer": 2}', False, (2, "json")),
    ("<think>1 is better</think>", False, (None, "none")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), THOUGHTS)
def test_a_draft_in_a_thought_is_no_verdict(text, opened, expected, tmp_path):
    """A model weighs both answers before it decides; one that was cut off has not decided."""
    judge = load_judge("english-thinking")
    assert judge.parse(text, opened) == expected
    assert judge.reason(text, opened) == ("r" if expected[0] else "")


def test_a_pattern_does_not_look_into_a_thought(tmp_path):
    judge = load_judge(write(tmp_path, OWN + "thought = ['[T]', '[/T]']"))
    assert judge.parse("[T]better: A[/T] better: B") == (2, "pattern")
    assert judge.parse("[T]better: A") == (None, "unfinished")
    assert judge.parse("better: A", opened=True) == (None, "unfinished")
    assert judge.parse("[T]better: A[/T]") == (None, "none")


def test_a_thought_that_begins_in_mid_line_gives_no_verdict(tmp_path):
    """Nobody knows where it ends. A reason may name the mark."""
    judge = load_judge(write(tmp_path, OWN))
    assert judge.parse("Okay. <think>better: A") == judge.parse("a</think> b <think> better: A") == (None, "none")
    english = load_judge("english")
    assert english.parse('Okay. <think>{"reason": "d", "better_answer": 1}') == (None, "none")
    assert english.parse('{"reason": "Answer 1 has a stray <think> tag", "better_answer": 2}') == (2, "json")


def test_the_documentations_example_is_a_whole_judge(tmp_path):
    """Who copies it has a judge for all stages; with the pattern in place of the keys, too."""
    page = (Path(__file__).parents[1] / "docs" / "judges.md").read_text("utf-8")
    whole, pattern = re.findall("```toml\n(.*?)```", page, re.DOTALL)
    judge = load_judge(write(tmp_path, whole))
    assert judge.hint_1 and judge.hint_2 and judge.can_write
    assert judge.parse(judgment_text(judge, "r", 2)) == (2, "json")
    keys = ("reason_key", "verdict_key", "answer_name")
    rest = "".join(line for line in whole.splitlines(keepends=True) if not line.startswith(keys))
    judge = load_judge(write(tmp_path, rest + pattern))
    assert judge.parse(judgment_text(judge, "r", 2)) == (2, "pattern") and judge.hint_2


def test_an_endpoint_has_a_price():
    """By hand: 2 million prompt tokens at 2.50 and half a million written ones at 10."""
    assert load_judge("gpt-4o").dollars(2_000_000, 500_000) == 10.0
    assert load_judge("con-j").dollars(1, 1) is None


# ---- The probability of a verdict, from its token ----


def probability(tokens: list[str], tops: dict[int, dict[str, float]], place=CARD.verdict_place) -> float | None:
    """`tops`: place -> token -> probability, the one that was written first; elsewhere it must not be looked at."""
    return first_probability(
        "".join(tokens), place, len(tokens), lambda count: len("".join(tokens[:count])),
        lambda i: [(token, math.log(p)) for token, p in tops[i].items()],
    )  # fmt: skip


def test_the_probability_is_read_at_the_verdicts_token():
    """Digits of the reason stand before it, or, where the verdict comes first, behind it."""
    reason_first = ['{"原因": "回答', "1", '差"', ', "更好的回答": ', "2", "}"]
    assert probability(reason_first, {4: {"2": 0.6, "1": 0.2, "x": 0.2}}) == pytest.approx(0.25)
    verdict_first = ['{"更好', '的回答"', ": ", "1", ', "原因": "回答', "2", '差"}']
    assert probability(verdict_first, {3: {"1": 0.6, "2": 0.2}}) == pytest.approx(0.75)
    joined = ['{"原因": "x", "更好的回答"', ": 2}"]
    assert probability(joined, {1: {": 2}": 0.5, ":1}": 0.2, ": 1": 0.05, " 12": 0.1}}) == pytest.approx(1 / 3)
    assert probability(['"更好的回答": "', "回答", "1", '"}'], {2: {"1": 0.5, "2": 0.5}}) == pytest.approx(0.5)


def test_an_answer_that_is_not_listed_is_no_likelier_than_the_last_one_listed():
    """Taken for 0, it would make a judge sure that is not."""
    assert probability(['"更好的回答": ', "1"], {1: {"1": 0.8, "x": 0.1, "y": 0.05}}) == pytest.approx(0.8 / 0.85)
    # The written token comes beside the 20 likeliest, however unlikely it was.
    top = {"1": 0.001} | {f"x{i}": 0.04 - i * 0.001 for i in range(20)}
    assert probability(['"更好的回答": ', "1"], {1: top}) == pytest.approx(0.001 / (0.001 + 0.021))


@pytest.mark.parametrize(
    "tokens", [[], ["回答1"], ["更好的回答是", "1"], ['"更好的回答": ', "3"], ['"更好的回答": 回', "答1"]]
)
def test_without_a_token_that_names_an_answer_there_is_no_probability(tokens):
    """Read off another token it would be the probability of something else."""
    assert probability(tokens, {i: {token: 0.9} for i, token in enumerate(tokens)}) is None


def test_the_probability_of_a_pattern_is_read_at_its_letter(tmp_path):
    """Response 1 and Response 2 differ in their digit, and there the judge decides."""
    text = OWN.replace("A|B|neither", "Answer A|Answer B").replace(", neither = 0", "")
    auto_j = load_judge(write(tmp_path, text.replace("A = 1, B", "'Answer A' = 1, 'Answer B'")))
    tokens = ["better: ", "Answer", " A", ". So better: ", "Answer", " B"]
    assert probability(tokens, {5: {" B": 0.6, " A": 0.3, "A": 0.1}}, auto_j.verdict_place) == pytest.approx(0.4)
    own = load_judge(write(tmp_path, OWN))
    assert probability(["better: ", "neither"], {1: {"neither": 1.0}}, own.verdict_place) is None


# ---- How reasons begin ----


def test_a_reason_begins_with_the_names_of_both_answers(tmp_path):
    own = OWN + "judgment = '{reason} So better: {verdict}'\nreason_start = '{verdict} beats {other}:'\n"
    judge = load_judge(write(tmp_path, own))
    assert judge.reason_starts == ("A beats B:", "B beats A:")
    assert load_judge(write(tmp_path, judge_file(judge))) == judge
    assert load_judge("english").reason_starts == ("", "")
    english = load_judge(write(tmp_path, 'prompt = "english"\nreason_start = "{verdict}, as it"'))
    assert english.reason_starts == ("1, as it", "2, as it") and english.user == load_judge("english").user


def test_where_reasons_begin_with_the_verdict_its_probability_is_read_there(tmp_path):
    """The judge has decided; the token at the end is sure, whatever it was before."""
    judge = load_judge(write(tmp_path, """prompt = "english"\nreason_start = '"{verdict}" (not {other}): it'"""))
    tokens = ['{"reason": "', '\\"', "1", '\\" (not ', "2", "): it", ' is.", "better_answer": ', "1", "}"]
    assert probability(tokens, {2: {"1": 0.6, "2": 0.2}}, judge.verdict_place) == pytest.approx(0.75)
