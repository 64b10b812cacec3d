"""The report of a run: report.json for programs, report.md for a terminal, report.html for readers.

The page is one file that needs no network and no server: its pictures and all judgments are part of it. What users and
models wrote is escaped, or travels packed and is shown as text; a policy in the page lets nothing run but its own script.
"""

import base64
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup

from conj.data.benchmarks import BENCHMARKS
from conj.data.files import read_jsonl, replace_surrogates, write_atomic
from conj.data.layouts import STYLES
from conj.data.manifest import list_artefacts, locate, read_manifest
from conj.data.markdown import cell, percent, percent_interval, with_interval
from conj.data.prompts import question_of
from conj.sample.evaluation.aggregation import CARD_COLUMNS, PUBLISHED
from conj.sample.evaluation.pictures import TRAINING_CURVES, draw_pictures

FIGURE_NAMES = {
    "accuracy": "Accuracy", "accuracy_order_1": "Accuracy, order as given",
    "accuracy_order_2": "Accuracy, answers swapped", "both_right": "Right in both orders",
    "consistency": "Same answer in both orders", "unparsed": "Judgments without a verdict",
    "first_position_rate": "Takes the first answer", "longer_answer_rate": "Takes the longer answer",
    "accuracy_longer_right": "Accuracy where the longer answer is right",
    "accuracy_shorter_right": "Accuracy where the shorter answer is right",
    "longer_is_right": "Accuracy of a rule: the longer answer wins",
}  # fmt: skip
HEADLINE = ("accuracy", "both_right", "consistency", "unparsed")
COST_NAMES = {
    "overlong": "Questions too long for the context", "tokens_per_judgment": "Tokens a judgment",
    "seconds_per_judgment": "Seconds a judgment", "dollars": "Dollars",
}  # fmt: skip
_RM_BENCH = BENCHMARKS["rm-bench"].sections
STYLE_WEIGHTS = {**_RM_BENCH["Easy"], **_RM_BENCH["Normal"], **_RM_BENCH["Hard"]}  # subset -> weight
QUESTIONS_A_BLOCK = 1000
KEPT = ("order", "sample", "choice", "verdict", "rung", "finish_reason", "p_first")  # of a judgment, beside its reason
TEMPLATES = Path(__file__).parent / "templates"
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=lambda name: name.endswith(".html"),
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def write_report(
    run: Path, report: dict, prompts: list[dict], judgments: dict[str, list[dict]],
    seconds: dict[str, float | None] | None = None,
) -> None:  # fmt: skip
    """Writes report.json, report.md and report.html into `run`.

    `report`: the content of report.json; `prompts`: rows as `load_prompts` gives them; `judgments`: judge -> rows of its
    judgments, in any order. A judgment that is not there is shown as one that did not fit the context. `seconds`: judge ->
    seconds a judgment, which the pages show and report.json leaves out: that is the same for the same judgments."""
    judges = {n: figures | {"seconds_per_judgment": (seconds or {}).get(n)} for n, figures in report["judges"].items()}
    log = locate(run / "model").with_name("metrics.jsonl")
    metrics = read_jsonl(log) if log.exists() else []
    script = (TEMPLATES / "browser.js").read_text("utf-8")
    page = {
        "run": run.name, "judges": judges, "comparisons": report["comparisons"], "counts": report["counts"],
        "num_questions": len(prompts), "card_columns": CARD_COLUMNS, "card": card_rows(judges),
        "benchmarks": gather_benchmarks(judges),
        "rungs": list(dict.fromkeys(rung for figures in judges.values() for rung in figures["rungs"])),
        "stages": read_stages(run),
    }  # fmt: skip
    contents = {
        "report.json": json.dumps(report, ensure_ascii=False, indent=2) + "\n",
        "report.md": PAGES.get_template("report.md").render(**page),
        "report.html": PAGES.get_template("report.html").render(
            **page, pictures=draw_pictures(judges, FIGURE_NAMES, metrics), script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            blocks=[Markup(block) for block in pack_judgments(judges, prompts, judgments)],
        ),
    }  # fmt: skip
    for name, text in contents.items():
        write_atomic(run / name, encode(text))


def encode(text: str) -> bytes:
    return replace_surrogates(text).encode()


def points(difference: float | None) -> str:
    """A difference of two shares, in percentage points."""
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def points_interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def amount(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}" if 0 < value < 10 else f"{value:,.0f}"


def reading_link(**state: str) -> str:
    """The place in the page where the judgments of this choice are read."""
    return "#judgments?" + urlencode({name: replace_surrogates(value) for name, value in state.items()})


PAGES.filters |= {
    function.__name__: function
    for function in (percent, percent_interval, points, points_interval, p_value, amount, with_interval, cell)
}
PAGES.globals |= {
    "figure_names": FIGURE_NAMES, "headline": HEADLINE, "cost_names": COST_NAMES, "training_curves": TRAINING_CURVES,
    "styles": STYLES, "zip": zip, "reading_link": reading_link,
}  # fmt: skip


def card_rows(judges: dict[str, dict]) -> list[dict]:
    """The rows of the model card's table: the published judges, then ours that judged one of its benchmarks; none if
    nothing of it was judged. The best whole figure of a column is marked, equal ones too; a partial one cannot be it."""
    measured = []
    for name, figures in judges.items():
        cells = [_card_cell(figures["benchmarks"], *column) for column in CARD_COLUMNS]
        if any(cells):
            measured.append({"judge": name, "measured": True, "cells": cells})
    if not measured:
        return []
    rows = []
    for name, values in PUBLISHED.items():
        cells = [{"value": value / 100, "ci95": None, "partial": False} for value in values]
        rows.append({"judge": name, "measured": False, "cells": cells})
    rows += measured
    for i in range(len(CARD_COLUMNS)):
        column = [row["cells"][i] for row in rows if row["cells"][i]]
        best = max(round(found["value"], 3) for found in column if not found["partial"])  # as it is printed
        for found in column:
            found["best"] = not found["partial"] and round(found["value"], 3) == best
    return rows


def _card_cell(benchmarks: dict, title: str, benchmark: str, section: str | None) -> dict | None:
    found = benchmarks.get(benchmark)
    if found is not None:
        found = found["score"] if section is None else found["sections"].get(section)
    return None if found is None or found["value"] is None else {k: found[k] for k in ("value", "ci95", "partial")}


def gather_benchmarks(judges: dict[str, dict]) -> list[dict]:
    """Each benchmark with the judges that judged it, and the names of its sections, subsets and annotators."""
    gathered = {}
    for judge, figures in judges.items():
        for name, found in figures["benchmarks"].items():
            entry = {"name": name, "title": found["title"], "n": found["n"], "judges": {}}
            gathered.setdefault(name, entry)["judges"][judge] = found
    for entry in gathered.values():
        for kind in ("sections", "subsets", "annotators"):
            entry[kind] = list(dict.fromkeys(key for found in entry["judges"].values() for key in found.get(kind, {})))
        parts = [found[kind] for found in entry["judges"].values() for kind in ("sections", "subsets")]
        entry["sizes"] = {name: figures["n"] for part in parts for name, figures in part.items()}
        of_styles = entry["judges"].items() if entry["name"] == "rm-bench" else ()
        entry["matrices"] = {judge: style_matrix(found["subsets"]) for judge, found in of_styles}
    return list(gathered.values())


def style_matrix(subsets: dict[str, dict]) -> list[list[float | None]]:
    """RM-Bench's accuracies by style of the better answer (rows) and of the worse (columns), over its domains."""

    def accuracy(styles: str) -> float | None:
        weights = {cell: w for cell, w in STYLE_WEIGHTS.items() if cell in subsets and cell.endswith(f"/{styles}")}
        right = sum(weight * subsets[cell]["accuracy"] for cell, weight in weights.items())
        return right / sum(weights.values()) if weights else None

    return [[accuracy(f"{better}-{worse}") for worse in STYLES] for better in STYLES]


def read_stages(run: Path) -> list[dict]:
    """What the manifests of a run's artefacts say: name, rows, counts, seconds."""
    stages = []
    for artefact in list_artefacts(run):
        made = read_manifest(artefact)
        if made["complete"]:
            counts = {name: count for name, count in made["counts"].items() if not isinstance(count, (list, dict))}
            stages.append({**{k: made[k] for k in ("artefact", "num_rows", "seconds")}, "counts": counts})
    return stages


def pack_judgments(judges: dict[str, dict], prompts: list[dict], judgments: dict[str, list[dict]]) -> Iterator[str]:
    """What the page's browser reads: blocks of gzip-packed JSON in base64, the first with names, the others with
    questions, in the order of their ids. These are hashes, so that every page is a fair sample."""
    rows, orders = {name: defaultdict(list) for name in judges}, []
    for name, of_judge in rows.items():
        for row in sorted(judgments[name], key=lambda row: (row["order"], row["sample"])):
            of_judge[row["id"]].append(row)
        orders.append(sorted({row["order"] for row in judgments[name]}))
    # Judges may have been asked different questions.
    subsets = {name: {b: f["subsets"] for b, f in figures["benchmarks"].items()} for name, figures in judges.items()}
    titles = {name: f["title"] for figures in judges.values() for name, f in figures["benchmarks"].items()}
    prompts = sorted(prompts, key=lambda prompt: prompt["id"])
    contents = [dict(judges=list(judges), orders=orders, titles=list(titles.items()), num_questions=len(prompts))]
    for start in range(0, len(prompts), QUESTIONS_A_BLOCK):
        chunk = prompts[start : start + QUESTIONS_A_BLOCK]
        contents.append([pack_question(prompt, rows, subsets) for prompt in chunk])

    def pack(content) -> str:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return base64.b64encode(gzip.compress(encode(text), 1, mtime=0)).decode()

    with ThreadPoolExecutor(2) as pool:  # zlib works beside Python
        yield from pool.map(pack, contents)


def pack_question(prompt: dict, rows: dict[str, dict[str, list[dict]]], subsets: dict[str, dict[str, dict]]) -> dict:
    """A question as browser.js takes it, with each judge's rows in the order of the judges; None: it was not asked."""
    question, benchmark = question_of(prompt), prompt.get("benchmark") or prompt["source"]
    judged = []
    for name, of_judge in rows.items():
        found = [
            {k: row.get(k) for k in KEPT} | {"reason": shown_reason(row)} for row in of_judge.get(prompt["id"], ())
        ]
        asked = found or (prompt["subset"] or "all") in subsets[name].get(benchmark, ())
        judged.append(found if asked else None)
    turns = [("user", question)] if isinstance(question, str) else [(m["role"], m["content"]) for m in question]
    return {
        "id": prompt["id"], "benchmark": benchmark, "subset": prompt["subset"] or "", "turns": turns,
        "answers": [prompt["answer_1"], prompt["answer_2"]], "label": prompt["label"], "votes": prompt.get("votes"),
        "judged": judged,
    }  # fmt: skip


def shown_reason(row: dict) -> str:
    """What the page shows of a judgment: the reason, where the text is the asked-for JSON and nothing else, or the text."""
    if row["rung"] == "json":
        try:
            content = json.loads(row["text"])
        except (ValueError, RecursionError):
            return row["text"]
        values = list(content.values()) if isinstance(content, dict) else []  # under whatever keys the judge has
        reasons = [value for value in values if isinstance(value, str) and value not in ("1", "2")]
        if len(values) == 2 and len(reasons) == 1:
            return reasons[0] or row["text"]
    return row["text"]
