"""How each benchmark's authors add its subsets up, and the table of Con-J's card.

A section's value is the weighted mean of its subsets' accuracies; a benchmark's score is the plain mean of its scored
sections. Sections of a part of the data are called partial, and one without rows has no value: the usual code for
RewardBench keeps all weights and shows 0 there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

import numpy as np

from conj.data.benchmarks import BENCHMARKS, BY_ROWS

# The table of Con-J's model card: column, benchmark, section (None: the score), and what it prints, in percent.
CARD_COLUMNS = (
    ("Infinity-Preference", "infinity-preference", None), ("UltraFeedback", "ultrafeedback", None),
    ("PKU-SafeRLHF", "pku-saferlhf", None), ("RewardBench Chat", "reward-bench", "Chat"),
    ("RewardBench Chat-H", "reward-bench", "Chat Hard"), ("RewardBench Safety", "reward-bench", "Safety"),
    ("RewardBench Reasoning", "reward-bench", "Reasoning"),
)  # fmt: skip
PUBLISHED = {
    "Llama3.1-8B": (59.0, 62.9, 66.4, 80.7, 49.8, 64.0, 68.1),
    "Llama3.1-70B": (64.0, 71.4, 67.6, 97.2, 70.2, 82.8, 86.0),
    "Qwen2-7B": (59.0, 64.5, 67.2, 91.3, 44.8, 73.6, 69.0),
    "Qwen2.5-72B": (70.0, 66.0, 58.7, 86.6, 61.4, 74.5, 90.7),
    "Auto-J": (69.0, 63.9, 66.9, 93.0, 40.0, 65.5, 50.5),
    "Prometheus 2": (68.0, 63.3, 63.0, 85.5, 49.1, 77.1, 76.5),
    "GPT-4o": (75.0, 72.2, 69.6, 95.3, 74.3, 87.6, 86.9),
    "Con-J": (81.0, 73.0, 68.4, 91.3, 79.6, 88.0, 87.1),
}


@dataclass(frozen=True)
class Section:
    name: str
    weights: dict[str, float]  # of the subsets that have rows; {} if none has: then there is no value
    partial: bool  # a subset is absent, or has another number of rows than officially
    n: int  # rows


def sections_of(name: str, rows_per_subset: Mapping[str, int]) -> list[Section]:
    """The benchmark's sections with the weights of the subsets that have rows; an unknown number of official rows
    makes a section partial only when nothing is there."""
    benchmark, sections = BENCHMARKS[name], []
    for section, patterns in benchmark.sections.items():
        weights, partial, n = {}, False, 0
        for pattern, weight in patterns.items():
            there = {s: rows for s, rows in rows_per_subset.items() if rows and fnmatchcase(s, pattern)}
            weights |= {s: float(rows if weight is BY_ROWS else weight) for s, rows in there.items()}
            official = benchmark.num_rows.get(pattern)
            partial |= not there or official not in (None, sum(there.values()))
            n += sum(there.values())
        sections.append(Section(section, weights, partial, n))
    return sections


def scored_sections(name: str) -> tuple[str, ...]:
    """The sections whose plain mean is the benchmark's score."""
    return BENCHMARKS[name].scored or tuple(BENCHMARKS[name].sections)


def section_value(section: Section, accuracies: Mapping[str, float | np.ndarray]) -> float | np.ndarray | None:
    """The weighted mean of its subsets' accuracies, of resamples of them too; None without rows."""
    total = sum(section.weights.values())
    return sum(accuracies[s] * weight for s, weight in section.weights.items()) / total if total else None


def right_on_balance(
    choices: np.ndarray,  # (Q, 2) int: answer 1 or 2 of the data, anything else for a tie or no verdict
    labels: np.ndarray,  # (Q,) int
) -> np.ndarray:  # (Q,) bool
    """JudgeBench's rule: a pair is right if, over its two orders, right answers outnumber wrong ones."""
    return (choices == labels[:, None]).sum(1) > (choices == 3 - labels[:, None]).sum(1)


def annotator_agreement(votes: Sequence[Sequence[int]], choices: Sequence[int | None]) -> dict[str, float]:
    """PandaLM's shares of rows on which the judge agrees with each annotator, and each two annotators with each other."""
    named = {f"annotator_{i}": column for i, column in enumerate(zip(*votes), 1)}
    shares = {name: _share(column, choices) for name, column in named.items()}
    return shares | {f"{a}_{b}": _share(named[a], named[b]) for a, b in combinations(named, 2)}


def _share(first: Sequence, second: Sequence) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
