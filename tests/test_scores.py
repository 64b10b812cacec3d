"""Figures computed by hand or by brute force: votes, calibration, paired tests, ties and orders that were not judged."""

from itertools import combinations

import numpy as np
import pytest

from conj.sample.evaluation.aggregation import Section, section_value
from conj.sample.evaluation.scores import (
    NOT_JUDGED,
    TIE,
    UNPARSED,
    bootstrap,
    calibrate,
    compare,
    figure_ratios,
    majority,
    summarize,
    vote_curve,
)


def figures(choices, labels, longer=None) -> dict:
    choices, labels = np.array(choices), np.array(labels)
    return summarize(figure_ratios(choices, labels, np.zeros(len(labels), int) if longer is None else longer), 50, 0)


def test_an_order_that_was_not_judged_counts_in_nothing():
    """Published judgments may have one order: taken for unparsed, every one of them would give half a point."""
    one_order = figures([[1, NOT_JUDGED], [2, NOT_JUDGED], [1, NOT_JUDGED]], [1, 1, 1])
    assert one_order["accuracy"] == one_order["accuracy_order_1"] == pytest.approx(2 / 3)
    for name in ("accuracy_order_2", "both_right", "consistency"):
        assert one_order[name] is None
    assert figures([[1, UNPARSED], [2, UNPARSED], [1, UNPARSED]], [1, 1, 1])["accuracy"] == pytest.approx(3.5 / 6)


def test_a_tie_is_right_where_the_label_is_one_and_else_decides_nothing():
    """A judge that says tie has chosen neither: counted as wrong, it would do better to write nothing."""
    found = figures([[TIE, TIE], [TIE, 1], [1, 2]], [TIE, 1, TIE], np.array([1, 1, 1]))
    assert found["accuracy"] == pytest.approx(3.5 / 6) and found["unparsed"] == 0
    assert found["first_position_rate"] == pytest.approx(2 / 3)  # order 2 shows answer 2 first
    assert found["accuracy_longer_right"] == pytest.approx(1.5 / 2)  # of the only question with a better answer
    strict = figure_ratios(np.array([[TIE, UNPARSED]]), np.array([1]), np.array([0]), undecided_points=0.0)
    assert strict["accuracy"][0] == 0


def test_questions_drawn_by_kind_are_questions_drawn_one_by_one():
    """The shortcut must not change the distribution: mean and width of every figure, against plain resampling."""
    rng = np.random.default_rng(0)
    choices, labels, longer = rng.integers(0, 3, (300, 2)), rng.integers(1, 3, 300), rng.integers(0, 3, 300)
    ratios = figure_ratios(choices, labels, longer)
    fast = bootstrap(ratios, 4000, 1)
    for name, (numerator, denominator) in ratios.items():
        drawn = rng.integers(300, size=(4000, 300))
        plain = numerator[drawn].sum(1) / denominator[drawn].sum(1)
        assert fast[name].mean() == pytest.approx(plain.mean(), abs=4 * plain.std() / 4000**0.5 * 2**0.5), name
        assert fast[name].std() == pytest.approx(plain.std(), rel=0.06), name


def test_the_p_value_is_that_of_all_sign_flips():
    """Five questions, all better: of 32 equally likely flips 2 are as extreme, 1/16. Nothing changed: 1."""
    labels = np.ones(5, int)
    worse, better = (figure_ratios(np.full((5, 2), c), labels, np.zeros(5, int)) for c in (2, 1))
    found = compare(worse, better, 20_000, 0)
    assert found["accuracy"] == 1 and found["p_value"] == pytest.approx(1 / 16, abs=0.006)
    assert compare(better, better, 500, 0)["p_value"] == 1


def test_subsets_are_drawn_apart_and_a_section_has_the_width_of_independent_draws():
    """Weights 3 and 1, 400 and 100 rows: the variance is (.75² · .7·.3/400) + (.25² · .6·.4/100)."""
    right = np.concatenate([np.repeat([1.0, 0.0], [280, 120]), np.repeat([1.0, 0.0], [60, 40])])
    of_a = np.arange(500) < 400
    ratios = {name: (right * of, of.astype(float)) for name, of in (("a", of_a), ("b", ~of_a))}
    drawn = bootstrap(ratios, 4000, 0, stratified=True)
    section = section_value(Section("s", {"a": 3, "b": 1}, False, 500), drawn)
    deviation = (0.75**2 * 0.21 / 400 + 0.25**2 * 0.24 / 100) ** 0.5
    assert section.mean() == pytest.approx(0.75 * 0.7 + 0.25 * 0.6, abs=0.002)
    assert section.std() == pytest.approx(deviation, rel=0.06)
    assert section_value(Section("s", {}, True, 0), drawn) is None


def test_questions_of_one_text_are_drawn_together():
    """RM-Bench asks each prompt nine times: taken for independent, its intervals would be a third as wide as they are.
    So would the p value be too small."""
    right = np.repeat(np.random.default_rng(0).random(130) < 0.6, 9).astype(int)
    choices = np.stack([2 - right] * 2, axis=1)
    ratios = figure_ratios(choices, np.ones(1170, int), np.zeros(1170, int))
    clusters = np.repeat(np.arange(130), 9)
    widths = [bootstrap(ratios, 3000, 0, of)["accuracy"].std() for of in (None, clusters)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.1)
    cells = {f"{i}": tuple(part * (np.arange(1170) % 9 == i) for part in ratios["accuracy"]) for i in range(9)}
    drawn = bootstrap(cells, 3000, 0, clusters, stratified=True)  # each cell a subset, all cells of a prompt together
    assert sum(drawn.values()).std() / 9 == pytest.approx(widths[1], rel=0.1)
    other = figure_ratios(np.full((1170, 2), 1), np.ones(1170, int), np.zeros(1170, int))
    few = slice(0, 45)
    pair = [{name: (n[few], d[few]) for name, (n, d) in r.items()} for r in (ratios, other)]
    together, apart = (compare(*pair, 4000, 0, of)["p_value"] for of in (clusters[few], None))
    assert together > 0.05 > apart


# ---- Votes ----


def test_the_majority_decides_and_a_draw_is_no_verdict():
    samples = np.array([[1, 1, 2], [1, 2, 0], [0, 0, 2], [0, 0, 0], [TIE, TIE, 1], [NOT_JUDGED] * 3])
    assert majority(samples).tolist() == [1, UNPARSED, 2, UNPARSED, TIE, NOT_JUDGED]


def test_the_curve_of_votes_is_the_mean_over_all_ways_to_pick_the_samples():
    """Against brute force. Taking the first k samples instead would depend on their order."""
    rng = np.random.default_rng(3)
    samples, labels = rng.integers(0, 3, (6, 2, 5)), rng.integers(1, 3, 6)
    curve = vote_curve(samples, labels, 20, 0)
    for k, point in enumerate(curve, 1):
        points = []
        for picked in combinations(range(5), k):
            choices = majority(samples[:, :, picked])
            points.append(np.where(choices == UNPARSED, 0.5, choices == labels[:, None]).mean())
        assert point["num_samples"] == k and point["accuracy"] == pytest.approx(np.mean(points))


def test_votes_help_a_judge_that_is_right_more_often_than_not():
    rng = np.random.default_rng(0)
    samples = np.where(rng.random((400, 2, 9)) < 0.7, 1, 2)
    accuracies = [point["accuracy"] for point in vote_curve(samples, np.ones(400, int), 20, 0)]
    assert accuracies[0] == pytest.approx(0.7, abs=0.02) and accuracies[8] == pytest.approx(0.901, abs=0.02)
    assert accuracies[::2] == sorted(accuracies[::2])


# ---- Probabilities ----


def test_calibration_finds_the_temperature_of_an_overconfident_judge():
    """Its log odds are three times what they should be: the temperature is 3, and the error nearly goes."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 1.5, 4000)
    labels = np.where(rng.random(4000) < 1 / (1 + np.exp(-odds)), 1, 2)
    found = calibrate(1 / (1 + np.exp(-3 * odds)), labels)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["ece_raw"] > 0.1 and found["ece"] < 0.03 and found["brier"] < found["brier_raw"]
    honest = calibrate(1 / (1 + np.exp(-odds)), labels)
    assert honest["temperature"] == pytest.approx(1, rel=0.1) and honest["ece_raw"] < 0.03


def test_a_temperature_is_not_fitted_on_what_it_is_measured_on():
    """A judge whose probabilities mean nothing: fitted on themselves, few questions would look better than chance."""
    rng = np.random.default_rng(1)
    briers = [calibrate(rng.random(20), rng.integers(1, 3, 20))["brier"] for _ in range(200)]
    assert np.mean(briers) >= 0.25


def test_questions_without_a_probability_or_a_better_answer_are_left_out():
    probability, labels = np.full(12, np.nan), np.ones(12, int)
    assert calibrate(probability, labels) is None
    probability[:8], labels[:2] = 0.9, TIE
    assert calibrate(probability, labels)["num"] == 6


def test_a_judge_that_is_always_right_has_no_best_temperature():
    """Every larger confidence fits better: the bound that the search ends at is no finding."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 3, 50)
    found = calibrate(np.where(labels == 1, 0.8, 0.2), labels)
    assert found["temperature"] is None and found["brier"] < 0.001


def test_a_probability_of_one_half_names_neither_answer():
    """Half right, whichever is: counted as the second answer's, a judge of no opinion would look wrong or right."""
    for label in (1, 2):
        assert calibrate(np.full(10, 0.5), np.full(10, label))["ece_raw"] == 0
