"""Figures of a judge from its choices, with bootstrap intervals. Pure functions on arrays: no model, no files.

A question is judged in both orders of its answers. Its two choices (1 or 2 in the order of the data, 0 for unparsed)
stand in a row of `choices`. An unparsed judgment counts as half right; it is consistent with nothing.

Dimensions: Q questions, B resamples.
"""

import numpy as np

UNPARSED = 0
CONFIDENCE = 0.95


def figure_ratios(
    choices: np.ndarray,  # (Q, 2) int: answer 1 or 2 of the data, or 0; columns: original and swapped order
    labels: np.ndarray,  # (Q,) int: the better answer, 1 or 2
    longer: np.ndarray,  # (Q,) int: the longer answer, 1 or 2, or 0 for equal lengths
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each figure as numerators and denominators per question, (Q,) each: the figure is the ratio of their sums."""
    parsed = choices != UNPARSED
    right = choices == labels[:, None]
    points = np.where(parsed, right, 0.5)
    # In the swapped order the data's second answer stands first.
    first = np.stack([choices[:, 0] == 1, choices[:, 1] == 2], axis=1)
    differ = longer != 0
    one, two = np.ones(len(labels)), np.full(len(labels), 2.0)
    return {
        "accuracy": (points.sum(1), two),
        "accuracy_order_1": (points[:, 0], one),
        "accuracy_order_2": (points[:, 1], one),
        "both_right": (right.all(1), one),
        "consistency": (parsed.all(1) & (choices[:, 0] == choices[:, 1]), one),
        "unparsed": ((~parsed).sum(1), two),
        "first_position_rate": (first.sum(1), parsed.sum(1)),
        "longer_answer_rate": ((choices == longer[:, None]).sum(1) * differ, parsed.sum(1) * differ),
        "accuracy_longer_right": (points.sum(1) * (labels == longer), two * (labels == longer)),
        "accuracy_shorter_right": (points.sum(1) * (differ & (labels != longer)), two * (differ & (labels != longer))),
    }


def bootstrap(ratios: dict[str, tuple[np.ndarray, np.ndarray]], num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Each figure on `num_resamples` draws of Q questions with replacement, (B,); NaN where nothing is counted.

    The same seed draws the same questions, so figures of two judges of the same questions can be subtracted."""
    values = np.array([part for ratio in ratios.values() for part in ratio], dtype=float).T  # (Q, 2 * figures)
    rng = np.random.default_rng(seed)
    sums = np.array([values[rng.integers(len(values), size=len(values))].sum(0) for _ in range(num_resamples)])
    with np.errstate(invalid="ignore"):
        figures = sums[:, 0::2] / sums[:, 1::2]  # (B, figures)
    return dict(zip(ratios, figures.T))


def summarize(ratios: dict[str, tuple[np.ndarray, np.ndarray]], num_resamples: int, seed: int) -> dict:
    """Every figure and its interval (`accuracy`, `accuracy_ci95`, ...), and `n`, the number of questions; None where
    there is nothing to count."""
    resampled = bootstrap(ratios, num_resamples, seed)
    summary = {"n": len(ratios["accuracy"][0])}
    for name, (numerator, denominator) in ratios.items():
        total = denominator.sum()
        summary[name] = float(numerator.sum() / total) if total else None
        summary[f"{name}_ci95"] = interval(resampled[name])
    return summary


def interval(resampled: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled figures, (B,); None if all are NaN."""
    if np.isnan(resampled).all():
        return None
    tail = 50 * (1 - CONFIDENCE)
    return [float(x) for x in np.nanpercentile(resampled, [tail, 100 - tail])]


def compare(base: dict, trained: dict, num_resamples: int, seed: int) -> dict:
    """What training changed: trained minus base with intervals over the questions, from the ratios of both."""
    samples = [bootstrap(ratios, num_resamples, seed) for ratios in (base, trained)]
    changes = {}
    for name in ("accuracy", "consistency", "unparsed"):
        before, after = (ratios[name][0].sum() / ratios[name][1].sum() for ratios in (base, trained))
        changes[name] = float(after - before)
        changes[f"{name}_ci95"] = interval(samples[1][name] - samples[0][name])
    return changes
