"""The benchmarks: where each lies, how many rows it has, and how its authors add its subsets up.

A section's value is the weighted mean of its subsets' accuracies; a benchmark's score is the plain mean of its scored
sections. Sections of a part of the data are called partial, and one without rows has no value: the usual code for
RewardBench keeps all weights and shows 0 there. Nothing here reads a model or a judgment.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path

import numpy as np

from conj import InputError
from conj.data.readers import read_rows, recognise, split_name

STYLES = ("concise", "detailed", "markdown")  # of RM-Bench's answers, from plain to rich
BY_ROWS = None  # as a weight: the number of rows that are there, so that each row counts the same


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Subsets are named by patterns as in a shell (`chat/easy/*`): all that match count towards one number of rows."""

    title: str
    hub: str | None  # name and split on the hub; None where the hub has no copy that `datasets` reads
    sections: Mapping[str, Mapping[str, float | None]]  # section -> subset pattern -> weight, or BY_ROWS
    num_rows: Mapping[str, int] = field(default_factory=dict)  # subset pattern -> official number, where there is one
    scored: tuple[str, ...] = ()  # the sections whose mean is the score; all if empty
    has_ties: bool = False  # a tie is an answer, so rows that are ties stay
    undecided_points: float = 0.5  # what a judgment counts that states no verdict, or a tie that is none
    net_of_orders: bool = False  # a pair counts as right by `right_on_balance`, not by the mean of its two orders


@dataclass(frozen=True)
class Section:
    name: str
    weights: dict[str, float]  # of the subsets that have rows; {} if none has: then there is no value
    partial: bool  # a subset is absent, or has another number of rows than officially
    n: int  # rows


def _cells(domain: str, difficulties: Sequence[str] = ("easy", "normal", "hard"), weight: float = 1) -> dict:
    """RM-Bench's cells of chosen style × rejected style in a domain, by difficulty."""
    cells = {}
    for i, better in enumerate(STYLES):
        for j, worse in enumerate(STYLES):
            difficulty = "easy" if i > j else "hard" if i < j else "normal"
            if difficulty in difficulties:
                cells[f"{domain}/{difficulty}/{better}-{worse}"] = weight
    return cells


RM_BENCH_ROWS = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
REWARD_BENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984}  # its 447 rows weigh as much as the code's 984
    | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}
LLMBAR_ROWS = {"natural": 100, "adver_neighbor": 134, "adver_GPTInst": 92, "adver_GPTOut": 47, "adver_manual": 46}
JUDGEBENCH_ROWS = {"mmlu-pro*": 154, "livebench-reasoning*": 98, "livebench-math*": 56, "livecodebench*": 42}
WHOLE = {"all": {"*": BY_ROWS}}

BENCHMARKS = {
    "reward-bench": Benchmark(
        title="RewardBench",
        hub="allenai/reward-bench:filtered",
        sections=REWARD_BENCH,
        num_rows={subset: rows for section in REWARD_BENCH.values() for subset, rows in section.items()}
        | {"math-prm": 447},
    ),
    "ultrafeedback": Benchmark(
        title="UltraFeedback", hub="HuggingFaceH4/ultrafeedback_binarized:test_prefs", sections=WHOLE
    ),
    "pku-saferlhf": Benchmark(
        title="PKU-SafeRLHF",
        hub="PKU-Alignment/PKU-SafeRLHF:test",
        sections={"Better": {"better": 1}, "Safer": {"safer": 1}},
    ),
    "infinity-preference": Benchmark(title="Infinity-Preference", hub="BAAI/Infinity-Preference:test", sections=WHOLE),
    "llmbar": Benchmark(
        title="LLMBar",
        hub=None,
        sections={
            "Natural": {"natural": 1},
            "Adversarial": {subset: 1 for subset in LLMBAR_ROWS if subset != "natural"},
        },
        num_rows=LLMBAR_ROWS,
        undecided_points=0.0,
    ),
    "judgebench": Benchmark(
        title="JudgeBench",
        hub="ScalerLab/JudgeBench:gpt",
        sections={
            name: {pattern: BY_ROWS}
            for name, pattern in zip(("Knowledge", "Reasoning", "Math", "Coding"), JUDGEBENCH_ROWS)
        }
        | {"Overall": dict.fromkeys(JUDGEBENCH_ROWS, BY_ROWS)},
        num_rows=JUDGEBENCH_ROWS,
        scored=("Overall",),
        net_of_orders=True,
    ),
    "rm-bench": Benchmark(
        title="RM-Bench",
        hub="THU-KEG/RM-Bench:train",
        sections={name: _cells(name.lower()) for name in ("Chat", "Math", "Code")}
        | {"Safety": _cells("safety-refuse") | _cells("safety-response")}
        | {
            level.capitalize(): {
                cell: weight
                for domain in RM_BENCH_ROWS
                for cell, weight in _cells(domain, (level,), 0.5 if domain.startswith("safety") else 1).items()
            }
            for level in ("easy", "normal", "hard")
        },
        num_rows={cell: rows for domain, rows in RM_BENCH_ROWS.items() for cell in _cells(domain)},
        scored=("Chat", "Math", "Code", "Safety"),
    ),
    "pandalm": Benchmark(
        title="PandaLM",
        hub=None,
        sections={"Majority": {"*": BY_ROWS}},
        num_rows={"*": 999},
        has_ties=True,
        undecided_points=0.0,
    ),
}

# The table of Con-J's model card: column, benchmark, section (None: the score), and what it prints, in percent.
CARD_COLUMNS = (
    ("Infinity-Preference", "infinity-preference", None),
    ("UltraFeedback", "ultrafeedback", None),
    ("PKU-SafeRLHF", "pku-saferlhf", None),
    ("RewardBench Chat", "reward-bench", "Chat"),
    ("RewardBench Chat-H", "reward-bench", "Chat Hard"),
    ("RewardBench Safety", "reward-bench", "Safety"),
    ("RewardBench Reasoning", "reward-bench", "Reasoning"),
)
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
    right = (choices == labels[:, None]).sum(1)
    wrong = (choices == 3 - labels[:, None]).sum(1)
    return right > wrong


def annotator_agreement(votes: Sequence[Sequence[int]], choices: Sequence[int | None]) -> dict[str, float]:
    """PandaLM's shares of rows on which the judge agrees with each annotator, and each two annotators with each other."""
    columns = list(zip(*votes))
    named = {f"annotator_{i}": column for i, column in enumerate(columns, 1)}
    shares = {name: _share(column, choices) for name, column in named.items()}
    return shares | {f"{a}_{b}": _share(named[a], named[b]) for a, b in combinations(named, 2)}


def _share(first: Sequence, second: Sequence) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


# --- which benchmark a data set is -----------------------------------------------------------------------------------


def resolve_data(name: str) -> tuple[str, str]:
    """What `read_preferences` is to read, and which benchmark that is ("" if none), by its name or by its rows.

    Raises InputError for a benchmark that the hub does not have."""
    data, benchmark = locate_data(name)
    if not benchmark and Path(split_name(data)[0]).exists():
        benchmark = _recognise_rows(data)
    return data, benchmark


def locate_data(name: str) -> tuple[str, str]:
    """What `read_preferences` is to read, and which benchmark its name says it is ("" if it does not); nothing is read.

    `reward-bench` is the hub's copy, `reward-bench=PATH[:split]` a local one; hub names of benchmarks are known."""
    benchmark, _, path = name.partition("=")
    if benchmark in BENCHMARKS and path:
        return path, benchmark
    if name in BENCHMARKS and not Path(name).exists():
        if BENCHMARKS[name].hub is None:
            raise InputError(f"{name}: is not on the hub; give its files as {name}=PATH")
        return BENCHMARKS[name].hub, name
    stem, split = split_name(name)
    for benchmark, known in BENCHMARKS.items():
        hub, _, official = (known.hub or "").partition(":")
        if stem == hub and split in (None, official):
            return known.hub, benchmark
    return name, ""


def _recognise_rows(data: str) -> str:
    _, row = next(read_rows(data), ("", None))
    if not isinstance(row, dict):
        return ""
    try:
        layout = recognise(row).name
    except InputError:  # the reader says it better
        return ""
    by_layout = {"PKU-SafeRLHF": "pku-saferlhf", "LLMBar": "llmbar", "JudgeBench": "judgebench", "PandaLM": "pandalm"}
    if layout in by_layout:
        return by_layout[layout]
    if isinstance(row.get("chosen"), list) and all(isinstance(answer, str) for answer in row["chosen"]):
        return "rm-bench"
    if row.get("subset") in BENCHMARKS["reward-bench"].num_rows:
        return "reward-bench"
    return "infinity-preference" if "task_category" in row and "rejected" in row else ""


def official_subset(benchmark: str, subset: str, where: str) -> str:
    """A record's subset as the benchmark's sections name it. LLMBar's is told by the file or its folders, RM-Bench's
    domain by the file (`math_filtered.json`) or the rows."""
    if benchmark == "llmbar" and not subset:
        return next((s for part in _parts(where) for s in LLMBAR_ROWS if _bare(part) == _bare(s)), "")
    if benchmark == "rm-bench":
        domain, _, cell = subset.partition("/")
        told = next((d for part in _parts(where) for d in RM_BENCH_ROWS if part == f"{d}_filtered"), domain)
        return f"{'chat' if told == 'alpacaeval' else told}/{cell}"
    return subset


def _parts(where: str) -> Iterator[str]:
    """The names in `PATH: row 3` or `PATH:3`, from the file upwards, without suffixes."""
    path = Path(re.sub(r":( row)? ?\d+$", "", where))
    return (part.split(".")[0] for part in reversed(path.parts))


def _bare(name: str) -> str:
    return re.sub(r"^(llmbar[-_])?(adver(sarial)?[-_])?", "", name.casefold())
