"""Stage 7: the base judge and the trained one on benchmarks, each pair in both orders, greedily, and the report.

Writes `judgments_base.jsonl` and, if the run has a model, `judgments_trained.jsonl`; then `report.json`, `report.md`,
`report.html` and `judgments.html`. A prompt that does not fit the context counts as unparsed, and is reported. Run it
again after a kill and it goes on; the report is made anew each time.

    python -m conj.sample.evaluate --run runs/demo --model demo/base --data demo/test.jsonl
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from conj.data import manifest
from conj.data.files import read_jsonl
from conj.data.options import option, require_each, run_command
from conj.data.preprocess import load_prompts, question_of
from conj.data.prompts import judge_messages
from conj.data.readers import describe_data
from conj.sample.engine import (
    Completion,
    Decoding,
    EngineOptions,
    JudgeModel,
    Request,
    check_model,
)
from conj.sample.report import write_report
from conj.sample.scores import UNPARSED, compare, figure_ratios, summarize
from conj.sample.stage import PARSERS, write_judgments


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(EngineOptions):
    """What decides the judgments, and stands in their manifest."""

    run: Path = option(
        help="run folder; judges with its model/ too, if there; writes judgments and the report", affects_result=False
    )
    data: tuple[str, ...] = option(
        help="benchmarks: files, folders or hub names, each with an optional :split", affects_result=False
    )
    subsets: tuple[str, ...] = option((), help="names of the subsets to judge; all if not given")
    limit: int | None = option(None, help="number of rows read from the head of each benchmark; all if not given")
    parser: Literal["strict", "released"] = option("strict", help="how verdicts are read; released: as published")
    seed: int = option(2021, help="seed of the order of the two answers and of the bootstrap")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(JudgingOptions):
    num_resamples: int = option(2000, help="number of bootstrap resamples of the questions")
    max_shown: int = option(200, help="most questions on the page of judgments")

    def __post_init__(self):
        super().__post_init__()
        require_each(self, ("num_resamples", "max_shown", "limit"), lambda value: value >= 1, "1 or more")


def evaluate(options: EvaluateOptions) -> None:
    """Writes judgments and report. Raises InputError for unusable data, models or options."""
    models = {"base": check_model(options.model, options.max_model_len)}
    if (options.run / "model").exists():
        models["trained"] = check_model(options.run / "model", options.max_model_len)
    prompts, data_counts = load_prompts(options.data, options.seed, options.subsets, options.limit)
    judging = JudgingOptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(JudgingOptions)})
    judgments = {}
    for name, model in models.items():
        artefact = options.run / f"judgments_{name}.jsonl"
        judge_prompts(artefact, model, prompts, judging, data_counts)
        judgments[name] = {(row["id"], row["order"]): row for row in read_jsonl(artefact)}
    began, report = time.monotonic(), options.run / "report.json"
    for path in report, manifest.manifest_path(report):
        path.unlink(missing_ok=True)
    manifest.begin(report, inputs=[options.run / f"judgments_{name}.jsonl" for name in judgments], options=options)
    scores = score_judges(prompts, judgments, options.num_resamples, options.seed)
    write_report(options.run, scores, prompts, judgments, options.max_shown)
    headline = ("accuracy", "consistency", "unparsed")
    counts = {f"{judge}_{name}": round(scores[judge][name], 4) for judge in judgments for name in headline}
    also = [options.run / name for name in ("report.md", "report.html", "judgments.html")]
    manifest.finish(report, num_rows=len(prompts), counts=counts, seconds=time.monotonic() - began, also=also)


def judge_prompts(
    artefact: Path, model: JudgeModel, prompts: list[dict], options: JudgingOptions, data_counts: dict[str, int]
) -> None:
    """Writes a judgment of every prompt that fits, in both orders of its answers.

    Beside what every judgment has: `order` (1: as in the data, 2: swapped), `verdict` (as written) and `choice` (the
    answer it means in the order of the data)."""
    labels = {row["id"]: row["label"] for row in prompts}

    def judge(request: Request, completion: Completion) -> dict:
        verdict = PARSERS[options.parser](completion.text)
        swapped = verdict.value is not None and request.key["order"] == 2
        return {
            "text": completion.text,
            "verdict": verdict.value,
            "choice": 3 - verdict.value if swapped else verdict.value,
            "label": labels[request.key["id"]],
            "rung": verdict.rung,
        }

    write_judgments(
        artefact, prompts, lambda row: both_orders(row, model), judge,
        inputs=[*describe_data(options.data), model.folder], model=model, options=options,
        decoding=Decoding(max_new_tokens=options.max_new_tokens), data_counts=data_counts, outcome="choice",
    )  # fmt: skip


def both_orders(row: dict, model: JudgeModel) -> list[Request]:
    """A row of prompts.jsonl as it is, and with its answers swapped."""
    requests = []
    for order, answers in (1, ("answer_1", "answer_2")), (2, ("answer_2", "answer_1")):
        messages = judge_messages(question_of(row), *(row[name] for name in answers))
        requests.append(Request(key={"id": row["id"], "order": order}, prompt_ids=model.tokenizer.prompt_ids(messages)))
    return requests


def score_judges(
    prompts: list[dict], judgments: dict[str, dict[tuple[str, int], dict]], num_resamples: int, seed: int
) -> dict:
    """The content of report.json: each judge's figures, those of each subset, and what training changed.

    `judgments`: judge -> (prompt id, order) -> row; a judgment that is not there counts as unparsed."""
    labels = np.array([row["label"] for row in prompts])
    lengths = np.array([[len(row["answer_1"]), len(row["answer_2"])] for row in prompts])
    longer = np.where(lengths[:, 0] == lengths[:, 1], 0, lengths.argmax(1) + 1)
    subsets = np.array([row["subset"] or "all" for row in prompts])
    ratios, scores = {}, {}
    for name, rows in judgments.items():
        made = [[rows.get((row["id"], order), {"choice": None})["choice"] for order in (1, 2)] for row in prompts]
        choices = np.array([[choice or UNPARSED for choice in pair] for pair in made])
        ratios[name] = figure_ratios(choices, labels, longer)
        scores[name] = summarize(ratios[name], num_resamples, seed)
        scores[name]["overlong"] = sum((row["id"], 1) not in rows for row in prompts)
        scores[name]["subsets"] = {
            str(subset): summarize(figure_ratios(choices[of], labels[of], longer[of]), num_resamples, seed)
            for subset in np.unique(subsets)
            for of in [subsets == subset]
        }
    if "trained" in ratios:
        scores["change"] = compare(ratios["base"], ratios["trained"], num_resamples, seed)
    return scores


if __name__ == "__main__":
    run_command(evaluate, EvaluateOptions, __doc__)
