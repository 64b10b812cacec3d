"""The pictures of a report, as data URIs of SVG: figures with intervals, curves, calibration.

Each is drawn once: its colours become variables that follow the reader's colour scheme, its texts stay texts, in the
reader's fonts. The same figures give the same bytes.
"""

import base64
import io
import warnings

import matplotlib
from matplotlib.figure import Figure

INK, SOFT, AXIS, GRID = "#1f2937", "#4b5563", "#9ca3af", "#e5e7eb"
GREY, TEAL = "#808a99", "#0f766e"
JUDGE_COLOURS = (TEAL, "#b45309", "#4338ca", "#be123c", "#0369a1", "#7e22ce", "#4d7c0f")
# The same colours on a dark page.
DARK = {INK: "#e6e8eb", SOFT: "#aab2bd", AXIS: "#6b7280", GRID: "#2f353d", GREY: "#98a2b3", TEAL: "#2dd4bf"}
DARK |= dict(zip(JUDGE_COLOURS[1:], ("#fbbf24", "#a5b4fc", "#fb7185", "#38bdf8", "#d8b4fe", "#a3e635")))
FONTS = 'system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif'
STYLE = {
    "font.size": 10, "text.parse_math": False,  # a name with two dollars is no formula
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": AXIS, "axes.labelcolor": SOFT,
    "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "svg.fonttype": "none", "svg.hashsalt": "conj",
}  # fmt: skip
WIDTH = 5.0  # inches: 480 CSS pixels, half of the page
SHARES = {"ticks": [0, 0.25, 0.5, 0.75, 1], "labels": ["0", "25", "50", "75", "100 %"]}


def judge_colours(names: list[str]) -> dict[str, str]:
    """`base` is grey, `trained` the first colour; the others take theirs in turn."""
    others = [name for name in names if name not in ("base", "trained")]
    turns = JUDGE_COLOURS[1:] if "trained" in names else JUDGE_COLOURS
    return {"base": GREY, "trained": TEAL} | {name: turns[i % len(turns)] for i, name in enumerate(others)}


def plain_name(name: str, most: int = 18) -> str:
    """A name that fits and that XML can hold."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return name if len(name) <= most else name[: most - 1] + "…"


def draw_pictures(judges: dict[str, dict], titles: dict[str, str], metrics: list[dict]) -> dict[str, str]:
    """name -> data URI. `votes`, `calibration` and the curves of training only where there is something to draw.

    `judges` as in report.json; `titles`: what the figures are called."""
    colours = judge_colours(list(judges))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # not in matplotlib's font; the reader's draws it
        result = ("accuracy", "both_right", "consistency", "unparsed")
        bias = ("first_position_rate", "longer_answer_rate", "accuracy_longer_right", "accuracy_shorter_right")
        pictures = {
            "result": draw_figures(judges, {name: titles[name] for name in result}, colours),
            "bias": draw_figures(judges, {name: titles[name] for name in bias}, colours),
        }
        if voting := {name: figures["votes"] for name, figures in judges.items() if figures["votes"]}:
            pictures["votes"] = draw_votes(voting, colours)
        if certain := {name: figures["probability"] for name, figures in judges.items() if figures["probability"]}:
            pictures["calibration"] = draw_calibration(certain, colours)
        for title, curves in TRAINING_CURVES.items():
            drawn = {name: [(r["step"], r[name]) for r in metrics if r.get(name) is not None] for name in curves}
            if any(drawn.values()):
                pictures[title] = draw_training(drawn, curves)
    return pictures


def draw_figures(judges: dict[str, dict], titles: dict[str, str], colours: dict[str, str]) -> str:
    """A group of rows for each figure, a row for each judge: a dot with its interval, and the value in words."""
    step = len(judges) + 1.3
    figure = Figure(figsize=(WIDTH, 0.4 + 0.24 * step * len(titles)), layout="constrained")
    axes, ticks, names = figure.subplots(), [], []
    for group, (name, title) in enumerate(titles.items()):
        top = group * step
        axes.annotate(title, (0, top), (0, 0), textcoords="offset points", va="center", fontweight="bold")
        for row, (judge, figures) in enumerate(judges.items(), 1):
            value, bounds = figures[name], figures[f"{name}_ci95"]
            ticks.append(top + row)
            names.append(plain_name(judge))
            if value is not None:
                axes.plot(value, top + row, "o", color=colours[judge], markersize=6, clip_on=False)
            if bounds is not None:
                axes.hlines(top + row, *bounds, color=colours[judge], linewidth=2, clip_on=False)
            text = "–" if value is None else f"{100 * value:.1f} %"
            axes.text(1.2, top + row, text, ha="right", va="center", color=INK)
    axes.set(xlim=(0, 1), ylim=(step * len(titles) - 0.3, -0.7))
    axes.set_xticks(**SHARES)
    axes.set_yticks(ticks, names)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, pad=8)
    return as_data_uri(figure)


def draw_votes(votes: dict[str, list[dict]], colours: dict[str, str]) -> str:
    """Accuracy of the majority of k samples, over k, with intervals."""
    figure, axes = _chart("samples that vote")
    for judge, points in votes.items():
        numbers, values = ([point[name] for point in points] for name in ("num_samples", "accuracy"))
        axes.plot(numbers, values, "o-", color=colours[judge], label=plain_name(judge), markersize=4)
        if all(point["accuracy_ci95"] for point in points):
            low, high = zip(*(point["accuracy_ci95"] for point in points))
            axes.fill_between(numbers, low, high, color=colours[judge], alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(frameon=False)
    return as_data_uri(figure)


def draw_calibration(probabilities: dict[str, dict], colours: dict[str, str]) -> str:
    """How often verdicts are right that are given with a confidence: calibrated, and dashed as the model gave it."""
    figure, axes = _chart("confidence, mean of both orders")
    axes.plot([0, 1], [0, 1], color=AXIS, linewidth=1)
    for judge, found in probabilities.items():
        for name, style, label in ("bins_raw", "o--", "as given"), ("bins", "o-", "calibrated"):
            if points := [(mean, share) for mean, share, count in found[name] if count]:
                title = f"{plain_name(judge)}, {label}"
                axes.plot(*zip(*points), style, color=colours[judge], label=title, markersize=4, linewidth=1.4)
    axes.set(xlim=(0.5, 1), ylim=(0, 1))
    axes.set_xticks([0.5, 0.75, 1], ["50", "75", "100 %"])
    axes.set_yticks(**SHARES)
    axes.legend(frameon=False)
    return as_data_uri(figure)


TRAINING_CURVES = {
    "Loss": {"loss": TEAL, "eval/loss": JUDGE_COLOURS[1]},
    "Pairs with a positive margin": {"rewards/accuracies": TEAL, "eval/rewards/accuracies": JUDGE_COLOURS[1]},
    "Rewards": {"rewards/chosen": TEAL, "rewards/rejected": JUDGE_COLOURS[3]},
    "Gradient norm": {"grad_norm": GREY},
}


def draw_training(curves: dict[str, list[tuple[int, float]]], colours: dict[str, str]) -> str:
    """Curves of metrics.jsonl over the steps; what was held out as dots."""
    figure, axes = _chart("step")
    for name, points in curves.items():
        if points:
            label, marker = name.rpartition("/")[2].replace("_", " "), None
            if name.startswith("eval/"):
                label, marker = "held out", "o"
            axes.plot(*zip(*points), color=colours[name], linewidth=1.4, marker=marker, markersize=4, label=label)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    return as_data_uri(figure)


def _chart(x_title: str):
    axes = (figure := Figure(figsize=(WIDTH, 2.9), layout="constrained")).subplots()
    axes.set_xlabel(x_title)
    axes.tick_params(length=0)
    return figure, axes


def as_data_uri(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    svg, light, dark = drawn.getvalue(), "", ""
    for i, (colour, on_dark) in enumerate(DARK.items()):
        svg = svg.replace(colour, f"var(--c{i})")
        light, dark = f"{light}--c{i}:{colour};", f"{dark}--c{i}:{on_dark};"
    style = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}text{{font-family:{FONTS}!important}}"
    svg = svg.replace("</style>", style + "</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
