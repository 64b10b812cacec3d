"""The report of a run: report.json for programs, report.md for a terminal, report.html and judgments.html for readers.

The pages need no network and no scripts: pictures are part of the file. What users and models wrote is escaped.
"""

import base64
import io
import json
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from conj.data.files import read_jsonl, replace_surrogates, write_atomic
from conj.data.manifest import list_artefacts, read_manifest
from conj.data.preprocess import question_of
from conj.data.prompts import question_text
from conj.data.verdicts import parse_reason

FIGURE_NAMES = {
    "accuracy": "Accuracy",
    "accuracy_order_1": "Accuracy, order as given",
    "accuracy_order_2": "Accuracy, answers swapped",
    "both_right": "Right in both orders",
    "consistency": "Same answer in both orders",
    "unparsed": "Judgments without a verdict",
    "first_position_rate": "Takes the first answer",
    "longer_answer_rate": "Takes the longer answer",
    "accuracy_longer_right": "Accuracy where the longer answer is right",
    "accuracy_shorter_right": "Accuracy where the shorter answer is right",
}
JUDGE_COLOURS = {"base": "#a3aab5", "trained": "#0f766e"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "conj",  # the same figures give the same bytes
}
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    run: Path,
    scores: dict,
    prompts: list[dict],
    judgments: dict[str, dict[tuple[str, int], dict]],
    max_shown: int,
) -> None:
    """Writes the four files. `scores` is the content of report.json, `judgments` as in `evaluate.score_judges`."""
    metrics = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    judges = [name for name in JUDGE_COLOURS if name in scores]
    page = {
        "run": run.name,
        "scores": scores,
        "judges": judges,
        "figure_names": FIGURE_NAMES,
        "stages": read_stages(run),
        "pictures": draw_pictures(scores, judges, metrics),
    }
    shown = [show_question(prompt, judgments) for prompt in sorted(prompts, key=lambda p: p["id"])[:max_shown]]
    contents = {
        "report.json": json.dumps(scores, ensure_ascii=False, indent=2) + "\n",
        "report.md": render_markdown(page),
        "report.html": render("report.html", **page),
        "judgments.html": render("judgments.html", run=run.name, judges=judges, shown=shown, total=len(prompts)),
    }
    for name, text in contents.items():
        write_atomic(run / name, replace_surrogates(text).encode())


def render(template: str, **values) -> str:
    return PAGES.get_template(template).render(**values)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


PAGES.filters |= {"percent": percent, "percent_interval": percent_interval}


def read_stages(run: Path) -> list[dict]:
    """What the manifests of a run's artefacts say: name, rows, counts, seconds."""
    stages = []
    for artefact in list_artefacts(run):
        made = read_manifest(artefact)
        if made["complete"]:
            counts = {name: count for name, count in made["counts"].items() if not isinstance(count, (list, dict))}
            stages.append({**{k: made[k] for k in ("artefact", "num_rows", "seconds")}, "counts": counts})
    return stages


def show_question(prompt: dict, judgments: dict[str, dict[tuple[str, int], dict]]) -> dict:
    """A question as the page of judgments shows it: each judge's verdicts in both orders, and what is wrong with them.

    The answers a reason speaks of are those of its own order, so the page says which answer stood first."""
    judged = {}
    for name, rows in judgments.items():
        both = []
        for order in (1, 2):
            row = rows.get((prompt["id"], order), {"text": "(the prompt does not fit the context)", "choice": None})
            outcome = "unparsed" if row["choice"] is None else "right" if row["choice"] == prompt["label"] else "wrong"
            text = parse_reason(row["text"]) or row["text"]
            both.append({"order": order, "choice": row["choice"], "reason": text, "outcome": outcome})
        choices = [row["choice"] for row in both]
        judged[name] = {"both": both, "consistent": None not in choices and choices[0] == choices[1]}
        judged[name]["right"] = choices == [prompt["label"]] * 2
    answers = [prompt["answer_1"], prompt["answer_2"]]
    question = question_text(question_of(prompt))
    return {
        "id": prompt["id"],
        "question": question,
        "answers": answers,
        "label": prompt["label"],
        "judged": judged,
        "marks": [f"{name}-{'right' if judged[name]['right'] else 'wrong'}" for name in judged],
    }


def render_markdown(page: dict) -> str:
    """The figures and the stages as Markdown."""
    judges, scores = page["judges"], page["scores"]
    lines = [f"# {page['run']}: what the judge learned", ""]
    lines += [f"{scores['base']['n']} questions, each judged in both orders, greedily; 95 % bootstrap intervals.", ""]
    lines += ["| | " + " | ".join(judges) + " |", "|---|" + "---|" * len(judges)]
    for name, title in page["figure_names"].items():
        cells = []
        for judge in judges:
            interval = percent_interval(scores[judge][f"{name}_ci95"])
            cells.append(percent(scores[judge][name]) + (f" ({interval})" if interval else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| subset | n | " + " | ".join(f"accuracy, {judge}" for judge in judges) + " |"]
    lines.append("|---|---|" + "---|" * len(judges))
    for subset, figures in scores["base"]["subsets"].items():
        cells = [percent(scores[judge]["subsets"][subset]["accuracy"]) for judge in judges]
        title = subset.replace("|", "\\|")
        lines.append(f"| {title} | {figures['n']} | " + " | ".join(cells) + " |")
    lines += ["", "| artefact | rows | seconds | counts |", "|---|---|---|---|"]
    for stage in page["stages"]:
        counts = ", ".join(f"{name} {count}" for name, count in stage["counts"].items())
        lines.append(f"| {stage['artefact']} | {stage['num_rows']} | {stage['seconds']:.0f} | {counts} |")
    return "\n".join(lines) + "\n"


def draw_pictures(scores: dict, judges: list[str], metrics: list[dict]) -> dict[str, str]:
    """Pictures as data URIs: name -> SVG. `training` only where there are metrics."""
    with matplotlib.rc_context(STYLE):
        pictures = {
            "result": draw_bars(scores, judges, ("accuracy", "both_right", "consistency", "unparsed")),
            "bias": draw_bars(
                scores,
                judges,
                ("accuracy_longer_right", "accuracy_shorter_right", "longer_answer_rate", "first_position_rate"),
            ),
        }
        if metrics:
            pictures["training"] = draw_training(metrics)
    return pictures


def draw_bars(scores: dict, judges: list[str], names: tuple[str, ...]) -> str:
    """Bars of the judges side by side, with their intervals."""
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    axes = figure.subplots()
    width = 0.72 / len(judges)
    for number, judge in enumerate(judges):
        for place, name in enumerate(names):
            value, bounds = scores[judge][name], scores[judge][f"{name}_ci95"]
            if value is None:
                continue
            x = place + (number - (len(judges) - 1) / 2) * width
            label = judge if place == 0 else None
            axes.bar(x, value, width * 0.92, color=JUDGE_COLOURS[judge], label=label)
            axes.vlines(x, *bounds, color="#1f2937", linewidth=1.2)
            axes.annotate(
                f"{100 * value:.0f}", (x, max(value, bounds[1])), xytext=(0, 3), textcoords="offset points", ha="center"
            )
    axes.set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1], yticklabels=["0", "25", "50", "75", "100 %"])
    axes.set_xticks(range(len(names)), [_wrap(FIGURE_NAMES[name]) for name in names])
    axes.tick_params(length=0)
    figure.legend(loc="outside upper right", ncols=len(judges), frameon=False)
    return as_data_uri(figure)


def _wrap(title: str, width: int = 22) -> str:
    """A title on two lines, broken at the last space before `width`."""
    place = title.rfind(" ", 0, width) if len(title) > width else -1
    return title if place < 0 else title[:place] + "\n" + title[place + 1 :]


def draw_training(metrics: list[dict]) -> str:
    """The curves of metrics.jsonl: loss, accuracy, rewards, gradient norm; held-out pairs as dots."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panels = {
        "Loss": {"loss": "#0f766e", "eval_loss": "#b45309"},
        "Pairs with a positive margin": {"accuracy": "#0f766e", "eval_accuracy": "#b45309"},
        "Rewards": {"chosen_reward": "#0f766e", "rejected_reward": "#be123c"},
        "Gradient norm": {"grad_norm": "#4b5563"},
    }
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, panels.items()):
        for name, colour in curves.items():
            points = [(row["step"], row[name]) for row in metrics if name in row]
            held_out = name.startswith("eval_")
            if points:
                axes.plot(
                    *zip(*points), color=colour, linewidth=1.4, marker="o" if held_out else None, markersize=4,
                    label="held out" if held_out else name.replace("_", " "),
                )  # fmt: skip
        axes.set_title(title, fontsize=10, loc="left", color="#111827")
        axes.set_xlabel("step", fontsize=9)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    return as_data_uri(figure)


def as_data_uri(figure: Figure) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()
