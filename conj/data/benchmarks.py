"""The benchmarks: where each lies, its subsets with their rows and weights, and which of them a data set is.

How they add up is in `conj.sample.evaluation.aggregation`. Nothing here reads a model or a judgment.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conj import InputError
from conj.data.columns import recognise
from conj.data.hub import Recorded
from conj.data.layouts import STYLE_CELLS
from conj.data.readers import pin_data, read_rows, split_name, without_revision

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


def _cells(*domains: str) -> dict[str, float]:
    """RM-Bench's cells of difficulty and of chosen style × rejected style in some domains, all of one weight."""
    return {f"{domain}/{cell}": 1 for domain in domains for cell in STYLE_CELLS}


RM_BENCH_ROWS = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
REWARD_BENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984}  # its 447 rows weigh as much as the code's 984
    | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}  # fmt: skip
LLMBAR_ROWS = {"natural": 100, "adver_neighbor": 134, "adver_GPTInst": 92, "adver_GPTOut": 47, "adver_manual": 46}
JUDGEBENCH_ROWS = {"mmlu-pro*": 154, "livebench-reasoning*": 98, "livebench-math*": 56, "livecodebench*": 42}
JUDGEBENCH_SECTIONS = ("Knowledge", "Reasoning", "Math", "Coding")
WHOLE = {"all": {"*": BY_ROWS}}

BENCHMARKS = {
    "reward-bench": Benchmark(
        title="RewardBench", hub="allenai/reward-bench:filtered", sections=REWARD_BENCH,
        num_rows={subset: rows for section in REWARD_BENCH.values() for subset, rows in section.items()}
        | {"math-prm": 447},
    ),
    "ultrafeedback": Benchmark(title="UltraFeedback", hub="HuggingFaceH4/ultrafeedback_binarized:test_prefs", sections=WHOLE),
    "pku-saferlhf": Benchmark(
        title="PKU-SafeRLHF", hub="PKU-Alignment/PKU-SafeRLHF:test",
        sections={"Better": {"better": 1}, "Safer": {"safer": 1}},
    ),
    "infinity-preference": Benchmark(title="Infinity-Preference", hub="BAAI/Infinity-Preference:test", sections=WHOLE),
    "llmbar": Benchmark(
        title="LLMBar", hub=None, num_rows=LLMBAR_ROWS, undecided_points=0.0,
        sections={"Natural": {"natural": 1}, "Adversarial": {name: 1 for name in LLMBAR_ROWS if name != "natural"}},
    ),
    "judgebench": Benchmark(
        title="JudgeBench", hub="ScalerLab/JudgeBench:gpt", num_rows=JUDGEBENCH_ROWS, scored=("Overall",),
        sections={name: {pattern: BY_ROWS} for name, pattern in zip(JUDGEBENCH_SECTIONS, JUDGEBENCH_ROWS)}
        | {"Overall": dict.fromkeys(JUDGEBENCH_ROWS, BY_ROWS)},
        net_of_orders=True,
    ),
    "rm-bench": Benchmark(
        title="RM-Bench", hub="THU-KEG/RM-Bench:train", scored=("Chat", "Math", "Code", "Safety"),
        sections={name: _cells(name.lower()) for name in ("Chat", "Math", "Code")}
        | {"Safety": _cells("safety-refuse", "safety-response")}
        | {
            level.capitalize(): {
                cell: 0.5 if cell.startswith("safety") else 1 for cell in _cells(*RM_BENCH_ROWS) if f"/{level}/" in cell
            }
            for level in ("easy", "normal", "hard")
        },
        num_rows={cell: rows for domain, rows in RM_BENCH_ROWS.items() for cell in _cells(domain)},
    ),
    "pandalm": Benchmark(
        title="PandaLM", hub=None, sections={"Majority": {"*": BY_ROWS}}, num_rows={"*": 999}, has_ties=True,
        undecided_points=0.0,
    ),
}  # fmt: skip


BY_LAYOUT = {
    "PKU-SafeRLHF": "pku-saferlhf", "LLMBar": "llmbar", "JudgeBench": "judgebench", "PandaLM": "pandalm",
    "RM-Bench": "rm-bench",
}  # fmt: skip


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
    (stem, split), bare = split_name(name), split_name(without_revision(name))[0]
    for benchmark, known in BENCHMARKS.items():
        hub, _, official = (known.hub or "").partition(":")
        if bare == hub and split in (None, official):
            return f"{stem}:{official}", benchmark
    return name, ""


def pin_benchmark(name: str, recorded: Recorded = lambda repo: None) -> str:
    """As `pin_data`, of what may be a benchmark: one is named with its place, NAME=PLACE."""
    data, benchmark = locate_data(name)
    return f"{benchmark}={pin_data(data, recorded)}" if benchmark else pin_data(data, recorded)


def _recognise_rows(data: str) -> str:
    _, row = next(read_rows(data), ("", None))
    if not isinstance(row, dict):
        return ""
    try:
        layout = recognise(row).name
    except InputError:  # the reader says it better
        return ""
    if layout in BY_LAYOUT:
        return BY_LAYOUT[layout]
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
