"""Evaluation: figures computed by hand, judges whose bias is known, and both orders of the answers."""

import json

import numpy as np
import pytest
from conftest import assert_one_line_error, command
from fake_engine import use_fake_engine

from conj.data.files import read_jsonl, write_jsonl
from conj.data.prompts import judgment_text
from conj.sample.evaluate import EvaluateOptions, evaluate
from conj.sample.scores import bootstrap, compare, figure_ratios, summarize

# Six questions: right twice; right, then wrong; wrong twice; unparsed, then right; unparsed twice; right twice.
CHOICES = np.array([[1, 1], [2, 1], [1, 1], [0, 2], [0, 0], [2, 2]])
LABELS = np.array([1, 2, 2, 2, 1, 2])
LONGER = np.array([1, 1, 1, 0, 2, 2])
BY_HAND = {
    "n": 6,
    "accuracy": (2 + 1 + 0 + 1.5 + 1 + 2) / 12,
    "accuracy_order_1": (1 + 1 + 0 + 0.5 + 0.5 + 1) / 6,
    "accuracy_order_2": (1 + 0 + 0 + 1 + 0.5 + 1) / 6,
    "both_right": 2 / 6,
    "consistency": 3 / 6,
    "unparsed": 3 / 12,
    # As written: 1 2 / 2 2 / 1 2 / - 1 / - - / 2 1
    "first_position_rate": 4 / 9,
    # Of the questions whose answers differ in length: 1 1 / 2 1 / 1 1 / - - / 2 2
    "longer_answer_rate": 7 / 8,
    "accuracy_longer_right": 4 / 4,
    "accuracy_shorter_right": (1 + 0 + 1) / 6,
}


def test_the_figures_are_those_computed_by_hand():
    """The definitions of the README, on every kind of question."""
    summary = summarize(figure_ratios(CHOICES, LABELS, LONGER), 100, 0)
    assert {name: summary[name] for name in BY_HAND} == pytest.approx(BY_HAND)


def test_a_swap_that_is_not_undone_shows():
    """The negative control: verdicts of the second order taken as written give other figures."""
    as_written = CHOICES.copy()
    as_written[:, 1] = np.where(CHOICES[:, 1] == 0, 0, 3 - CHOICES[:, 1])
    summary = summarize(figure_ratios(as_written, LABELS, LONGER), 100, 0)
    for name in ("accuracy", "consistency", "both_right", "first_position_rate"):
        assert summary[name] != pytest.approx(BY_HAND[name]), name


def test_nothing_to_count_is_none():
    """0 of 0 shown as 0 % would read as a finding."""
    summary = summarize(figure_ratios(np.zeros((3, 2), int), np.array([1, 2, 1]), np.zeros(3, int)), 100, 0)
    assert summary["accuracy"] == 0.5 and summary["unparsed"] == 1.0
    for name in ("first_position_rate", "longer_answer_rate", "accuracy_longer_right"):
        assert summary[name] is None and summary[f"{name}_ci95"] is None


def test_intervals_are_those_of_the_normal_approximation():
    """600 independent questions, 70 % right: ±1.96·sqrt(.7·.3/600). Resampling judgments, not questions, would give
    intervals narrower by √2."""
    rights = np.repeat([1, 2], [420, 180])
    summary = summarize(figure_ratios(np.stack([rights] * 2, 1), np.ones(600, int), np.ones(600, int)), 4000, 1)
    low, high = summary["accuracy_ci95"]
    width = 1.96 * np.sqrt(0.7 * 0.3 / 600)
    assert (low, high) == pytest.approx((0.7 - width, 0.7 + width), abs=0.004)


def test_the_same_seed_resamples_the_same_questions_for_both_judges():
    """A judge compared with itself has changed by nothing, with certainty."""
    ratios = figure_ratios(CHOICES, LABELS, LONGER)
    assert compare(ratios, ratios, 200, 3)["accuracy_ci95"] == [0.0, 0.0]
    assert not np.array_equal(bootstrap(ratios, 50, 1)["accuracy"], bootstrap(ratios, 50, 2)["accuracy"])


# ---- The stage ----


def make_benchmark(path, count: int = 12):
    """Right answers say `right`; the longer answer is right in a third of the pairs."""
    pairs = [("right" + " so" * (5 * (i % 3 == 0)), "wrong" + " no" * (i % 3 > 0)) for i in range(count)]
    write_jsonl(path, [{"prompt": f"q{i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)])
    return str(path)


def first_and_second(prompt: str) -> tuple[str, str]:
    first, second = prompt.rpartition("\n回答1：")[2].split("\n回答2：")
    return first, second.removesuffix("\nassistant\n")


def judge_with(write, model, folder, monkeypatch) -> dict:
    use_fake_engine(monkeypatch, write)
    evaluate(EvaluateOptions(run=folder, model=model, data=(make_benchmark(folder / "test.jsonl"),), num_resamples=50))
    return json.loads((folder / "report.json").read_text())["base"]


def test_a_judge_that_knows_is_right_in_both_orders(tied_model, tmp_path, monkeypatch):
    """Any mix-up of orders, labels or answers on the way makes a perfect judge imperfect."""
    know = lambda prompt: judgment_text("r", 1 if first_and_second(prompt)[0].startswith("right") else 2)  # noqa: E731
    scores = judge_with(know, tied_model, tmp_path, monkeypatch)
    assert (scores["accuracy"], scores["consistency"], scores["both_right"], scores["unparsed"]) == (1, 1, 1, 0)
    assert scores["first_position_rate"] == 0.5
    assert {row["choice"] == row["label"] for row in read_jsonl(tmp_path / "judgments_base.jsonl")} == {True}


def test_a_judge_that_takes_the_first_answer_is_never_consistent(tied_model, tmp_path, monkeypatch):
    """Both orders must differ in the prompt, and be told apart in the score."""
    scores = judge_with(lambda prompt: judgment_text("r", 1), tied_model, tmp_path, monkeypatch)
    assert (scores["accuracy"], scores["consistency"], scores["first_position_rate"]) == (0.5, 0, 1)


def test_a_judge_that_takes_the_longer_answer_is_found_out(tied_model, tmp_path, monkeypatch):
    """The bias that the demo trains away must be what the report shows."""

    def longer(prompt: str) -> str:
        first, second = first_and_second(prompt)
        return judgment_text("r", 1 if len(first) > len(second) else 2)

    scores = judge_with(longer, tied_model, tmp_path, monkeypatch)
    assert (scores["consistency"], scores["longer_answer_rate"]) == (1, 1)
    assert (scores["accuracy_longer_right"], scores["accuracy_shorter_right"]) == (1, 0)
    assert scores["accuracy"] == pytest.approx(1 / 3)


def test_a_prompt_that_does_not_fit_counts_as_unparsed_and_is_reported(tied_model, tmp_path, monkeypatch):
    """Left out of the figures, it would raise them."""
    use_fake_engine(monkeypatch, lambda prompt: judgment_text("r", 1 if "right" in first_and_second(prompt)[0] else 2))
    rows = [{"prompt": "q", "chosen": "right", "rejected": "no"}]
    rows += [{"prompt": "p", "chosen": "right " * 2000, "rejected": "no"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    evaluate(EvaluateOptions(run=tmp_path, model=tied_model, data=(str(tmp_path / "test.jsonl"),), num_resamples=50))
    scores = json.loads((tmp_path / "report.json").read_text())["base"]
    assert (scores["n"], scores["accuracy"], scores["unparsed"], scores["overlong"]) == (2, 0.75, 0.5, 1)


def test_the_trained_model_is_judged_beside_the_base(tied_model, tmp_path, monkeypatch):
    """`make demo` ends in this comparison; judgments that are there are not made again."""
    options = dict(run=tmp_path, model=tied_model, data=(make_benchmark(tmp_path / "test.jsonl"),), num_resamples=50)
    asked = use_fake_engine(monkeypatch, lambda prompt: judgment_text("r", 1))
    evaluate(EvaluateOptions(**options))
    assert len(asked) == 24 and "trained" not in json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "model").symlink_to(tied_model)
    know = lambda prompt: judgment_text("r", 1 if first_and_second(prompt)[0].startswith("right") else 2)  # noqa: E731
    asked = use_fake_engine(monkeypatch, know)
    evaluate(EvaluateOptions(**options))
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(asked) == 24
    assert (report["base"]["accuracy"], report["trained"]["accuracy"], report["change"]["accuracy"]) == (0.5, 1, 0.5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--model", "nowhere"], ["nowhere", "no such model folder"]),
        (["--max-shown", "0"], ["--max-shown", "1 or more", "0"]),
    ],
)
def test_bad_input_ends_in_one_line(tied_model, tmp_path, arguments, parts):
    """Before the engine starts, naming what is wrong."""
    data = make_benchmark(tmp_path / "test.jsonl")
    done = command("conj.sample.evaluate", "--run", tmp_path, "--model", tied_model, "--data", data, *arguments)
    assert_one_line_error(done, *parts)
