"""--structured-output: what it allows is a judgment, all judgments are allowed, and where it cannot hold it is refused."""

import dataclasses
import re

import pytest
from conftest import make_run, open_thoughts
from fake_engine import use_fake_engine
from hypothesis import given
from hypothesis import strategies as st

from conj import InputError
from conj.data.judges import judgment_text, load_judge
from conj.sample.engines.vllm import judgment_regex
from conj.sample.evaluation.evaluate import EvaluateOptions
from conj.sample.hinted import HintedOptions
from conj.sample.judge import judge
from conj.sample.repeated import RepeatedOptions, sample_repeated
from conj.sample.stage import object_form

JUDGES = [load_judge(name) for name in ("con-j", "english")]
STARTING = dataclasses.replace(JUDGES[1], reason_start='"{verdict}" (not {other})')
PATTERN = 'user = "{question} {answer_1} {answer_2}"\nverdict_pattern = "better: (A|B)"\nverdicts = {A = 1, B = 2}\n'


@pytest.mark.parametrize("judge", JUDGES, ids=["con-j", "english"])
@given(data=st.data(), reason=st.text() | st.just('"}\\{</think>\x00'), verdict=st.sampled_from((1, 2)))
def test_it_allows_judgments_alone_and_all_of_them(judge, data, reason, verdict):
    """A judgment that it does not allow could not be written by a model that was trained to."""
    allowed = re.compile(judgment_regex(object_form(judge, True)))
    for text in judgment_text(judge, reason, verdict), judgment_text(judge, None, verdict):
        assert allowed.fullmatch(text) and judge.parse(text) == (verdict, "json")
        assert not allowed.fullmatch(text + " ") and not allowed.fullmatch("<think></think>" + text)
    written = data.draw(st.from_regex(allowed, fullmatch=True))
    assert judge.parse(written).rung == "json"


def test_stage_2_asks_for_a_reason(tied_model, tmp_path, monkeypatch):
    """A small base that may leave it out does: pairs of such judgments teach no reasons."""
    asked = []
    monkeypatch.setattr("conj.sample.stage.write_judgments", lambda *_, decoding, **others: asked.append(decoding))
    options = {"run_dir": make_run(tmp_path, 1), "model": tied_model, "judge": "english"}
    sample_repeated(RepeatedOptions(**options, structured_output=True))
    assert [(decoding.object_form, decoding.needs_reason) for decoding in asked] == [
        (object_form(JUDGES[1], True), True)
    ]
    allowed = re.compile(judgment_regex(asked[0].object_form, needs_reason=True))
    for reason, holds in (
        ('It says "what" was asked.', True),
        ("语", True),
        ("", False),
        (None, False),
    ):
        assert bool(allowed.fullmatch(judgment_text(JUDGES[1], reason, 2))) == holds


@pytest.mark.parametrize("needed", [False, True])
@given(data=st.data(), reason=st.text(min_size=1) | st.just('"}\\{</think>\x00'), verdict=st.sampled_from((1, 2)))
def test_a_reason_begins_as_those_for_its_verdict_do(needed, data, reason, verdict):
    """A small model's verdict contradicts its reason, where it may."""
    allowed = re.compile(judgment_regex(object_form(STARTING, True), needed))
    right, wrong = (
        judgment_text(STARTING, start + reason, verdict) for start in STARTING.reason_starts[:: 3 - 2 * verdict]
    )
    assert allowed.fullmatch(right) and not allowed.fullmatch(wrong)
    assert not allowed.fullmatch(judgment_text(STARTING, "So " + reason, verdict))
    assert bool(allowed.fullmatch(judgment_text(STARTING, None, verdict))) != needed
    written = STARTING.parse(text := data.draw(st.from_regex(allowed, fullmatch=True)))
    assert written.rung == "json"
    reason = STARTING.reason(text)
    assert reason.startswith(STARTING.reason_starts[written.value - 1]) or (not reason and not needed)


def test_a_judge_that_is_read_by_a_pattern_is_refused(tmp_path):
    """Before anything starts: it writes no JSON."""
    (tmp_path / "p.toml").write_text(PATTERN)
    asked = {"judge": str(tmp_path / "p.toml"), "model": tmp_path, "structured_output": True}
    said = "--structured-output: expected a judge whose judgments are JSON; those of p are read by a pattern"
    with pytest.raises(InputError, match=said):
        RepeatedOptions(run_dir=tmp_path, **asked)
    with pytest.raises(InputError, match=said):
        EvaluateOptions(run_dir=tmp_path, data=("x",), **asked)
    with pytest.raises(InputError, match=said):
        judge(question="q", answer_1="1", answer_2="2", **asked)


def test_a_prompt_that_ends_within_a_thought_is_refused(model_copy, tmp_path, monkeypatch):
    """An object would be written into the thought, and be no verdict."""
    open_thoughts(model_copy)
    use_fake_engine(monkeypatch, lambda prompt: "")
    options = RepeatedOptions(run_dir=make_run(tmp_path / "run", 1), model=model_copy, structured_output=True)
    with pytest.raises(InputError, match="--structured-output: the model's prompts begin a thought"):
        sample_repeated(options)


def test_reasons_for_a_hint_are_never_asked_for_as_judgments():
    """A hint asks for a reason alone; its verdict is written by conj."""
    assert "structured_output" not in {field.name for field in HintedOptions.__dataclass_fields__.values()}
    assert object_form(JUDGES[1], False, opened=True) is None
    assert object_form(JUDGES[1], True)[:2] == ("reason", "better_answer")
