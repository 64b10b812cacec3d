"""Figures of a judge from its choices, with bootstrap intervals. Pure functions on arrays: no model, no files.

A question is judged in both orders of its answers. Its two choices (1 or 2 in the order of the data, TIE, UNPARSED, or
NOT_JUDGED where published judgments have one order only) stand in a row of `choices`. An unparsed judgment counts as
half right, and so does one that calls a tie where there is a better answer; without a verdict it is consistent with nothing.
Of several samples the majority counts, a draw half. Questions of one text (RM-Bench has nine each) are drawn together.

Dimensions: Q questions, C clusters of them, B resamples, F figures.
"""

import math
from functools import cache

import numpy as np

UNPARSED, TIE, NOT_JUDGED = 0, 3, -1
CONFIDENCE = 0.95
LEAST_SCALE, MOST_SCALE = 1e-3, 1e3  # of log odds
NUM_FOLDS = 5  # of the questions, for calibration: a temperature is never fitted on what it is measured on
Ratios = dict[str, tuple[np.ndarray, np.ndarray]]  # figure -> numerators (Q,) and denominators (Q,)


def figure_ratios(
    choices: np.ndarray,  # (Q, 2) int: answer 1 or 2 of the data, or one of the above; columns: original, swapped order
    labels: np.ndarray,  # (Q,) int: the better answer, 1 or 2, or TIE
    longer: np.ndarray,  # (Q,) int: the longer answer, 1 or 2, or 0 for equal lengths
    undecided_points: float = 0.5,  # for no verdict, and for a tie where there is a better answer
) -> Ratios:
    """Each figure as numerators and denominators per question: the figure is the ratio of their sums."""
    judged = choices != NOT_JUDGED
    parsed = judged & (choices != UNPARSED)
    took = parsed & (choices != TIE)
    right = choices == labels[:, None]
    points = np.where(right, 1, np.where(took, 0, undecided_points)) * judged
    both, num_judged = judged.all(1), judged.sum(1)
    # In the swapped order the data's second answer stands first.
    first = np.stack([choices[:, 0] == 1, choices[:, 1] == 2], axis=1)
    differ = longer != 0
    longer_right, shorter_right = (differ & (labels == answer) for answer in (longer, 3 - longer))
    return {
        "accuracy": (points.sum(1), num_judged), "accuracy_order_1": (points[:, 0], judged[:, 0]),
        "accuracy_order_2": (points[:, 1], judged[:, 1]), "both_right": (right.all(1), both),
        "consistency": (parsed.all(1) & (choices[:, 0] == choices[:, 1]), both),
        "unparsed": ((judged & ~parsed).sum(1), num_judged), "first_position_rate": (first.sum(1), took.sum(1)),
        "longer_answer_rate": ((choices == longer[:, None]).sum(1) * differ, took.sum(1) * differ),
        "accuracy_longer_right": (points.sum(1) * longer_right, num_judged * longer_right),
        "accuracy_shorter_right": (points.sum(1) * shorter_right, num_judged * shorter_right),
        # Of no judge, but of the questions: how right one is who always takes the longer answer.
        "longer_is_right": (np.where(differ, longer_right, 0.5), np.ones(len(labels))),
    }  # fmt: skip


def bootstrap(
    ratios: Ratios, num_resamples: int, seed: int, clusters: np.ndarray | None = None, *, stratified: bool = False
) -> dict[str, np.ndarray]:
    """Each figure on `num_resamples` draws of the questions with replacement, (B,); NaN where nothing is counted.

    `clusters` (Q,) int: questions that are drawn together; each by itself if not given. `stratified`: as many are drawn as
    there are of those that count in the same figures (the subsets of a benchmark, which fixes their sizes). Clusters that
    count alike are drawn at once, by a multinomial: the same distribution as one by one, for a hundredth of the time."""
    values = np.array([part for ratio in ratios.values() for part in ratio], dtype=float).T  # (Q, 2F)
    if clusters is not None:
        values = _sum_by(clusters, values)  # (C, 2F)
    strata = np.zeros(len(values), int)
    if stratified:
        strata = np.unique(values[:, 1::2] > 0, axis=0, return_inverse=True)[1].reshape(-1)
    rng, sums = np.random.default_rng(seed), 0
    for stratum in range(strata.max() + 1):
        kinds, counts = np.unique(values[strata == stratum], axis=0, return_counts=True)
        sums = sums + rng.multinomial(counts.sum(), counts / counts.sum(), size=num_resamples) @ kinds  # (B, 2F)
    with np.errstate(invalid="ignore"):
        figures = sums[:, 0::2] / sums[:, 1::2]  # (B, F)
    return dict(zip(ratios, figures.T))


def _sum_by(clusters: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(Q, …) to (C, …)."""
    places = np.unique(clusters, return_inverse=True)[1]
    sums = np.zeros((places.max() + 1, *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums


def summarize(ratios: Ratios, num_resamples: int, seed: int, clusters: np.ndarray | None = None) -> dict:
    """Each figure and its interval (`accuracy`, `accuracy_ci95`, …; None where nothing counts), and `n`, of questions."""
    resampled = bootstrap(ratios, num_resamples, seed, clusters)
    summary = {"n": len(ratios["accuracy"][0])}
    for name, ratio in ratios.items():
        summary |= {name: figure(ratio), f"{name}_ci95": interval(resampled[name])}
    return summary


def interval(resampled: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled figures, (B,); None if all are NaN."""
    if np.isnan(resampled).all():
        return None
    tail = 50 * (1 - CONFIDENCE)
    return [float(x) for x in np.nanpercentile(resampled, [tail, 100 - tail])]


def figure(ratio: tuple[np.ndarray, np.ndarray]) -> float | None:
    numerator, denominator = ratio
    return float(numerator.sum() / denominator.sum()) if denominator.sum() else None


def compare(base: Ratios, other: Ratios, num_resamples: int, seed: int, clusters: np.ndarray | None = None) -> dict:
    """`other` minus `base` on the same questions: differences with intervals over the questions, and the p value of the
    accuracies' difference by flipping its sign cluster by cluster (two-sided, `num_resamples` random flips)."""
    joint = {f"{i}{name}": ratio for i, ratios in enumerate((base, other)) for name, ratio in ratios.items()}
    drawn = bootstrap(joint, num_resamples, seed, clusters)  # of both at once: the same questions for both
    changes = {"n": len(base["accuracy"][0])}
    for name in ("accuracy", "consistency", "unparsed"):
        before, after = (figure(ratios[name]) for ratios in (base, other))
        changes[name] = None if before is None or after is None else after - before
        changes[f"{name}_ci95"] = interval(drawn[f"1{name}"] - drawn[f"0{name}"])
    differences = other["accuracy"][0] / other["accuracy"][1] - base["accuracy"][0] / base["accuracy"][1]
    if clusters is not None:
        differences = _sum_by(clusters, differences)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    kept = np.random.default_rng(seed).binomial(counts, 0.5, size=(num_resamples, len(counts)))
    flipped = np.abs((2 * kept - counts) @ sizes)
    as_extreme = (flipped >= abs(differences.sum()) - 1e-9).sum()
    return changes | {"p_value": float((1 + as_extreme) / (1 + num_resamples))}


# ---- Several samples of one judgment ----


def majority(samples: np.ndarray) -> np.ndarray:
    """The choice that most of the samples (…, n) make, (…): of those that make one; UNPARSED where two come first."""
    counts = np.stack([(samples == choice).sum(-1) for choice in (1, 2, TIE)], axis=-1)
    ranked = np.sort(counts, axis=-1)
    choice = np.array([1, 2, TIE])[counts.argmax(-1)]
    choice = np.where(ranked[..., -1] == ranked[..., -2], UNPARSED, choice)
    return np.where((samples == NOT_JUDGED).all(-1), NOT_JUDGED, choice)


def vote_curve(
    samples: np.ndarray, labels: np.ndarray, num_resamples: int, seed: int, clusters: np.ndarray | None = None
) -> list[dict]:
    """Accuracy of the majority of k of the n samples (Q, 2, n), k = 1 … n: the mean over all ways to pick k of them.

    A draw counts half. Wrong choices count together, so for labels and verdicts of a tie it is a lower bound."""
    num_samples = samples.shape[-1]
    right = (samples == labels[:, None, None]).sum(-1)  # (Q, 2)
    none = (samples == UNPARSED).sum(-1)
    judged = (samples != NOT_JUDGED).all(-1)
    curve = []
    for k in range(1, num_samples + 1):
        points = np.array([[_vote(k, num_samples, int(r), int(u)) for r, u in zip(*row)] for row in zip(right, none)])
        ratios = {"accuracy": ((points * judged).sum(1), judged.sum(1))}
        figures = summarize(ratios, num_resamples, seed, clusters)
        curve.append({"num_samples": k} | {name: figures[name] for name in ("accuracy", "accuracy_ci95")})
    return curve


@cache
def _vote(k: int, num_samples: int, right: int, none: int) -> float:
    """Expected points of k of the samples, drawn without replacement: 1 where right ones lead, half at a draw."""
    wrong, points = num_samples - right - none, 0.0
    for r in range(min(k, right) + 1):
        for w in range(min(k - r, wrong) + 1):
            ways = math.comb(right, r) * math.comb(wrong, w) * math.comb(none, k - r - w)
            points += ways * (1.0 if r > w else 0.5 if r == w else 0.0)
    return points / math.comb(num_samples, k)


# ---- Probabilities ----


def calibrate(probability: np.ndarray, labels: np.ndarray) -> dict | None:
    """How far the stated probabilities (Q,) that answer 1 is better, NaN for none, can be believed: Brier score and
    expected calibration error, raw and with a temperature fitted on the other folds (arXiv 1706.04599); the bins of the
    calibrated ones as [mean confidence, share right, count]. None where fewer than NUM_FOLDS questions have one; no
    temperature where none is best: all verdicts are right, or they mean nothing.

    With both orders' probabilities averaged, the two classes are alike: one number, no bias, is all there is to fit."""
    known = ~np.isnan(probability) & (labels != TIE)
    if known.sum() < NUM_FOLDS:
        return None
    odds = np.clip(probability[known], 1e-6, 1 - 1e-6)
    odds, better = np.log(odds / (1 - odds)), labels[known] == 1
    fold = np.arange(len(odds)) % NUM_FOLDS
    scaled = np.empty_like(odds)
    for i in range(NUM_FOLDS):
        scaled[fold == i] = odds[fold == i] * _fit_scale(odds[fold != i], better[fold != i])
    scale = _fit_scale(odds, better)
    raw, calibrated = (_reliability(1 / (1 + np.exp(-np.clip(x, -50, 50))), better) for x in (odds, scaled))
    return {
        "num": len(odds), "temperature": 1 / scale if 1.1 * LEAST_SCALE < scale < MOST_SCALE / 1.1 else None,
        "brier": calibrated["brier"], "brier_raw": raw["brier"], "ece": calibrated["ece"], "ece_raw": raw["ece"],
        "bins": calibrated["bins"], "bins_raw": raw["bins"],
    }  # fmt: skip


def _fit_scale(odds: np.ndarray, better: np.ndarray) -> float:
    """The factor on log odds of the highest likelihood, by bisection on its (falling) derivative."""
    low, high = LEAST_SCALE, MOST_SCALE
    signed = np.where(better, odds, -odds)
    for _ in range(60):
        middle = math.sqrt(low * high)
        rising = (signed / (1 + np.exp(np.clip(middle * signed, -50, 50)))).sum() > 0
        low, high = (middle, high) if rising else (low, middle)
    return middle


def _reliability(probability: np.ndarray, better: np.ndarray) -> dict:
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(probability == 0.5, 0.5, (probability > 0.5) == better)
    place = np.minimum(((confidence - 0.5) * 20).astype(int), 9)  # ten bins from .5 to 1
    bins = [[float(confidence[of].mean()), float(right[of].mean()), int(of.sum())]
            for of in (place == i for i in range(10)) if of.any()]  # fmt: skip
    ece = sum(count * abs(stated - found) for stated, found, count in bins) / len(probability)
    return {"brier": float(((probability - better) ** 2).mean()), "ece": ece, "bins": bins}
