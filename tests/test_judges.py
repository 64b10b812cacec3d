"""Judges as files: what a file may say, that texts are filled as they are, and how verdicts are read."""

import importlib.metadata
import math
from pathlib import Path

import pytest

from conj import InputError
from conj.data.prompts import judge_messages
from conj.sample.engines.completion import CARD_VERDICT, first_probability
from conj.sample.evaluation.judges import FOLDER, judge_prompt, load_judge, shipped_judges

CARD = ["con-j", "gpt-4o", "llama3.1-70b", "llama3.1-8b", "qwen2-7b", "qwen2.5-72b"]
OWN = """
user = 'Which is better? {question} | {answer_1} | {answer_2}'
verdict_pattern = 'better: (A|B|neither)'
verdicts = { A = 1, B = 2, neither = 0 }
"""


def write(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text, "utf-8")
    return str(folder / "mine.toml")


def test_the_judges_of_the_cards_table_are_shipped():
    assert shipped_judges() == sorted([*CARD, "auto-j", "prometheus-2"])


@pytest.mark.parametrize("name", CARD)
def test_the_cards_prompt_is_one_text(name):
    """A second copy of it would drift."""
    judge = load_judge(name)
    assert judge.name == name and judge.model
    for question in "q {answer_1}", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]:
        assert judge_prompt(judge, question, "x", "y") == judge_messages(question, "x", "y")
    assert judge.parse('{"原因": "回答2差", "更好的回答": 1}') == (1, "json")
    assert judge.backend == ("openai" if name == "gpt-4o" else "vllm")
    assert "作为一个评价专家" not in (FOLDER / f"{name}.toml").read_text("utf-8")


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


@pytest.mark.parametrize(("text", "message"), [
    ("", "mine.toml: user: found no text"),
    (PROMPT + "user = '{question}{answer_1}{answer_2}'", "expected prompt or user, found both"),
    (PROMPT + "system = 'x'", "system: expected none beside prompt"),
    ("user = '{question} {answer_1}'", r"user: expected {answer_2} in the text"),
    (PROMPT + "colour = 1", "colour: no key of a judge; expected one of name, model"),
    ("prompt = 'another'", "prompt: expected con-j, found 'another'"),
    ("prompt = ['con-j']", "prompt: expected con-j"),
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


def test_an_endpoint_has_a_price():
    """By hand: 2 million prompt tokens at 2.50 and half a million written ones at 10."""
    assert load_judge("gpt-4o").dollars(2_000_000, 500_000) == 10.0
    assert load_judge("con-j").dollars(1, 1) is None


# ---- The probability of a verdict, from its token ----


def probability(tokens: list[str], tops: dict[int, dict[str, float]], place=CARD_VERDICT) -> float | None:
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
