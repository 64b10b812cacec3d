"""Stage 7: judges on benchmarks, each pair in both orders, greedily, and the report.

    python -m conj.sample.evaluation.evaluate --run-dir runs/demo --model demo/base --data demo/test.jsonl
    python -m conj.sample.evaluation.evaluate --run-dir runs/skywork --judge gpt-4o --data reward-bench ultrafeedback
    python -m conj.sample.evaluation.evaluate --run-dir runs/again --judgments gpt-4=published/result.json

Writes `judgments_NAME.jsonl`: `base` and, if the run has a model, `trained`; with `--name`, or a `--judge` that has a model of its own, of that name.
The report (`report.json`, `.md`, `.html`) takes in every file of judgments of these data that the run folder holds, so
judges may be added one by one. `--judgments` scores files that are there, without any model. A prompt that does not fit
the context counts as unparsed, and is reported. Run it again after a kill and it goes on; the report is made anew.
"""

import dataclasses
import functools
import re
import time
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar, Literal

from conj.data import manifest
from conj.data.benchmarks import locate_data
from conj.data.card import write_card
from conj.data.files import read_jsonl
from conj.data.identity import describe_judge, hash_judge
from conj.data.judges import Judge, judge_in_folder, judge_prompt, load_judge, with_parser
from conj.data.manifest import RunOptions
from conj.data.model_files import JUDGE_FILE
from conj.data.options import option, refuse, require, require_each, run_command
from conj.data.preprocess import load_prompts
from conj.data.prompts import question_of
from conj.data.readers import DATA_PARTS, describe_data
from conj.data.rows import swapped
from conj.model.folder import JudgeModel, check_model
from conj.sample.engines.completion import Completion, Decoding, Request
from conj.sample.engines.fleet import ENGINES_ALONE, FleetOptions, complete_by_engines
from conj.sample.engines.http import EndpointOptions, complete_by_http
from conj.sample.evaluation.figures import Judged, score_all
from conj.sample.evaluation.judgments import read_judgments_file
from conj.sample.evaluation.report import write_report
from conj.sample.stage import STRUCTURED, Task, object_form, opens_thought, write_judgments

NAME = re.compile(r"[\w.+-]{1,100}")  # of a judge: it becomes a part of file names


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions, FleetOptions, EndpointOptions):
    BENCHMARKS: ClassVar[tuple[str, ...]] = ("data",)

    model: Path | None = option(
        None,
        help="the judge's model, a Hugging Face folder, or ORG/NAME on the hub, with @REVISION or without; by default that "
        "of --judge, if it names one; not for judges behind an endpoint",
        affects_result=False,
    )
    data: tuple[str, ...] = option(
        (), help=f"benchmarks by name (reward-bench), NAME=PATH, or files, folders and hub names, each {DATA_PARTS}",
        affects_result=False,
    )  # fmt: skip
    subsets: tuple[str, ...] = option((), help="names of the subsets to judge; all if not given")
    limit: int | None = option(None, help="number of rows read from the head of each benchmark; all if not given")
    judge: str = option("con-j", help="whose prompt, parser and backend: a judge that conj ships, or a judge file")
    judge_text: Path | None = option(
        None, help="file with the text of a judge whose file ships none", affects_result=False
    )
    name: str | None = option(
        None,
        help="name of the judge in files and report; by default base and trained, or the judge's",
        affects_result=False,
    )
    judgments: tuple[str, ...] = option(
        (), help="files of judgments to score instead of judging, each as PATH or NAME=PATH", affects_result=False
    )
    max_new_tokens: int | None = option(None, help="longest judgment, tokens; by default the judge's")
    parser: Literal["strict", "released"] | None = option(
        None, help="how verdicts are read; by default the judge's; released: as published"
    )
    num_samples: int = option(1, help="judgments of each order; the majority decides")
    temperature: float | None = option(
        None, help="sampling temperature; 0 is greedy, and takes one sample; by default the judge's, mostly 0"
    )
    verdict_probability: bool = option(
        False, help="also keep the probability of the verdict's token, and how far it holds"
    )
    structured_output: bool = option(False, help=STRUCTURED)
    seed: int = option(2021, help="seed of the order of the two answers, of sampling and of the bootstrap")
    num_resamples: int = option(2000, help="number of bootstrap resamples of the questions", affects_result=False)

    def makes(self) -> dict[Path, list]:
        """The files of judgments, which the report is then made of."""
        if self.judgments:
            return {}
        judge = judge_of(self)
        given = [*describe_data([locate_data(name)[0] for name in self.data]), describe_judge(judge)]
        models = find_models(self, judge).items()
        return {judgments_path(self.run_dir, name): given + ([model.folder] if model else []) for name, model in models}

    def __post_init__(self):
        FleetOptions.__post_init__(self)
        EndpointOptions.__post_init__(self)
        require_each(self, ("num_resamples", "limit", "num_samples"), lambda value: value >= 1, "1 or more")
        require_each(self, ("temperature",), lambda value: value >= 0, "0 or more")
        sampled = self.num_samples == 1 or self.judgments or temperature_of(self) > 0
        require(bool(sampled), "--num-samples: expected a --temperature above 0")
        require_each(self, ("seed",), lambda value: value >= 0, "0 or more")
        require(bool(self.data or self.judgments), "--data: expected benchmarks, or --judgments to score")
        if self.judgments:
            unread = ("judge", "judge_text", "model", "name", "base_url", "num_samples", "temperature",
                      "verdict_probability", "parser", "structured_output")  # fmt: skip
            refuse(self, unread, "with --judgments no model is asked")
        elif self.structured_output:
            object_form(judge_of(self), True)
        require_each(self, ("name",), NAME.fullmatch, "letters, digits, dots, dashes, plus signs and underscores")

    def at_hand(self) -> "EvaluateOptions":
        """As for every stage; the judge's own model where none is given."""
        options = self
        if self.model is None and not self.judgments and (self.judge != "con-j" or self.name):
            judge = judge_of(self)
            own = Path(judge.model) if judge.model and judge.backend == "vllm" else None
            options = dataclasses.replace(self, model=own)
        return super(EvaluateOptions, options).at_hand()

    @property
    def takes_part(self) -> bool:
        """Whether only some rows or subsets of the data are asked for."""
        return bool(self.subsets) or self.limit is not None


def evaluate(options: EvaluateOptions) -> None:
    """Writes judgments and report. Raises InputError for unusable data, models, judges or options."""
    judged, counts = (read_files if options.judgments else make_judgments)(options)
    began, report = time.monotonic(), options.run_dir / "report.json"
    for path in report, manifest.manifest_path(report):
        path.unlink(missing_ok=True)
    files = [named_file(given)[1] for given in options.judgments]
    files = files or [manifest.locate(judgments_path(options.run_dir, name)) for name in judged]
    manifest.begin(report, inputs=files, options=dataclasses.replace(options, from_runs=()))  # always made here
    content = score_all(judged, options.num_resamples, options.seed) | {"counts": counts}
    say_what_is_missing(content, options)
    prompts, rows = shown_in_one_order(judged)
    seconds = {name: entry.seconds_per_judgment for name, entry in judged.items()}
    write_report(options.run_dir, content, prompts, rows, seconds)
    headline = ("accuracy", "consistency", "unparsed")
    figures = {f"{name}_{figure}": content["judges"][name][figure] for name in judged for figure in headline}
    counts = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    also = [options.run_dir / name for name in ("report.md", "report.html")]
    manifest.finish(report, num_rows=len(prompts), counts=counts, seconds=time.monotonic() - began, also=also)
    write_card(options.run_dir)


def say_what_is_missing(content: dict, options: EvaluateOptions) -> None:
    """What a reader of the figures alone would not see."""
    for name, figures in content["judges"].items():
        for benchmark, entry in figures["benchmarks"].items():
            if entry.get("in_no_section"):
                found = f"{entry['in_no_section']} of {entry['n']} questions are of no known section"
                print(f"{name}: {benchmark}: {found}")
        if options.verdict_probability and figures["probability"] is None:
            print(f"{name}: fewer than five questions have a verdict's probability: none is reported")


def shown_in_one_order(judged: dict[str, Judged]) -> tuple[list[dict], dict[str, list[dict]]]:
    """The questions of all judges, and each judge's rows in the order of answers that a question is shown with: published
    judgments may have seen the same question with its answers the other way round."""
    prompts, rows = {}, {}
    for name, entry in judged.items():
        turned = set()
        for prompt in entry.prompts:
            if prompts.setdefault(prompt["id"], prompt)["answer_1"] != prompt["answer_1"]:
                turned.add(prompt["id"])
        rows[name] = [
            row | {"order": 3 - row["order"], "choice": swapped(row["choice"])} if row["id"] in turned else row
            for row in entry.rows
        ]
    return list(prompts.values()), rows


def judgments_path(run: Path, name: str) -> Path:
    return run / f"judgments_{name}.jsonl"


# ---- Judgments: made here, or read ----


def make_judgments(options: EvaluateOptions) -> tuple[dict[str, Judged], dict[str, int]]:
    """Judges with what the options name, and gathers all judgments of the same prompts that the run folder holds."""
    judge = judge_of(options)
    models = find_models(options, judge)  # before the data: a mistyped path should not cost a download
    prompts, counts = load_prompts(options.data, options.seed, options.subsets, options.limit, benchmark=True)
    for (artefact, inputs), model in zip(options.makes().items(), models.values(), strict=True):
        say_other_judge(model, options)
        judge_prompts(artefact, inputs, judge, model, prompts, options, counts)
    found, labels = {}, {row["id"]: row["label"] for row in prompts}
    for path in _judgments_in(options.run_dir):
        made = manifest.read_manifest(path)
        if made is None or not made["complete"] or "overlong_ids" not in made["counts"]:
            print(f"{path}: unfinished: left out of the report")
            continue
        rows = read_jsonl(manifest.locate(path), {"id": str, "order": int, "sample": int, "label": int})
        if any(labels.get(row["id"]) != row["label"] for row in rows):
            print(f"{path}: of other data or another --seed: left out of the report")
            continue
        asked = {row["id"] for row in rows} | set(made["counts"]["overlong_ids"])
        found[path.stem.removeprefix("judgments_")] = Judged(
            prompts=[row for row in prompts if row["id"] in asked], rows=rows,
            is_part=options.takes_part or not asked.issuperset(labels), seconds_per_judgment=seconds_per_judgment(made),
        )  # fmt: skip
    return found, counts


def _judgments_in(run: Path) -> list[Path]:
    """Files of judgments in the run folder, and those that it takes from another run's: base, trained, then the others."""
    found = {path for path in manifest.list_artefacts(run) if fnmatch(path.name, "judgments_*.jsonl")}
    found |= {path for path in run.glob("judgments_*.jsonl") if path.is_file()}
    return sorted(found, key=lambda path: (manifest.stage_order(path), path.name))


def judge_of(options: EvaluateOptions) -> Judge:
    return with_parser(load_judge(options.judge, options.judge_text), options.parser)


def temperature_of(options: EvaluateOptions) -> float:
    return judge_of(options).temperature if options.temperature is None else options.temperature


def find_models(options: EvaluateOptions, judge: Judge) -> dict[str, JudgeModel | None]:
    """The models to judge with, checked, by name; None for one behind an endpoint."""
    name = options.name or judge.name
    fits = NAME.fullmatch(name) is not None
    require(fits, f"judge {judge.name!r}: expected a name of {NAME.pattern}; give it one by --name")
    if judge.backend == "openai":
        refuse(options, ("model", "max_length", *ENGINES_ALONE), f"judge {judge.name} is behind an endpoint")
        return {name: None}
    advice = f'judge {judge.name} runs on vLLM; a judge file with backend = "openai" asks an endpoint'
    refuse(options, ("base_url", "requests_per_minute"), advice)
    known = judge.model or "any model"
    require(options.model is not None, f"--model: expected a folder for judge {judge.name} ({known})")
    max_length = options.max_length or judge.max_length
    check = functools.partial(check_model, max_length=max_length, chat_template=judge.chat_template)
    if options.name or not is_of_runs(judge):
        return {name: check(options.model)}
    trained = options.find("model")
    if not trained.exists():
        return {"base": check(options.model)}
    own = judge_in_folder(trained) or load_judge("con-j")
    same = hash_judge(own) == hash_judge(load_judge(options.judge, options.judge_text))
    given = trained / JUDGE_FILE if (trained / JUDGE_FILE).exists() else own.name
    advice = f"give {given}, or a --name to ask --model by another judge"
    require(same, f"--judge {options.judge}: {trained} was trained as another judge, {own.name}; {advice}")
    return {"base": check(options.model), "trained": check(trained)}


def say_other_judge(model: JudgeModel | None, options: EvaluateOptions) -> None:
    """What else only low figures would show."""
    own = model and judge_in_folder(model.folder)
    if own and hash_judge(own) != hash_judge(load_judge(options.judge, options.judge_text)):
        print(f"note: {model.folder} was trained as another judge than {options.judge}: its own is {JUDGE_FILE} there")


def is_of_runs(judge: Judge) -> bool:
    """Whether it is asked of a run's base and trained model: it has no model of its own. The card's has, and is for all."""
    return judge.model is None or judge.name == "con-j"


def judge_prompts(
    artefact: Path, inputs: list, judge: Judge, model: JudgeModel | None, prompts: list[dict], options: EvaluateOptions,
    counts: dict,
) -> None:  # fmt: skip
    """Writes a judgment of every prompt that fits, in both orders of its answers.

    Beside what every judgment has: `order` (1: as in the data, 2: swapped), `sample`, `verdict` (as written) and `choice`
    (the answer it means in the order of the data)."""
    labels, opened = {row["id"]: row["label"] for row in prompts}, opens_thought(model, judge)
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens or judge.max_new_tokens, temperature=temperature_of(options),
        top_p=judge.top_p, top_k=judge.top_k, thought=judge.thought, seed=options.seed,
        verdict_probability=options.verdict_probability, verdict_place=judge.verdict_place,
        object_form=object_form(judge, options.structured_output, opened),
    )  # fmt: skip

    def read(request: Request, completion: Completion) -> dict:
        verdict = judge.parse(completion.text, opened)
        known = completion.prompt_tokens is not None and completion.completion_tokens is not None
        dollars = judge.dollars(completion.prompt_tokens, completion.completion_tokens) if known else None
        return {
            "text": completion.text, "verdict": verdict.value,
            "choice": swapped(verdict.value) if request.key["order"] == 2 else verdict.value,
            "label": labels[request.key["id"]], "rung": verdict.rung,
        } | ({} if dollars is None else {"dollars": dollars})  # fmt: skip

    if model is None:
        complete = functools.partial(complete_by_http, model=judge.model, options=options, decoding=decoding)
    else:
        complete = functools.partial(complete_by_engines, model=model, options=options, decoding=decoding)
    keys = [{"order": order, "sample": sample} for order in (1, 2) for sample in range(options.num_samples)]
    make_requests = functools.partial(both_orders, judge=judge, model=model, num_samples=options.num_samples)
    task = Task(prompts=lambda: prompts, keys=keys, make_requests=make_requests, judge=read, outcome="choice")
    write_judgments(
        artefact, task, complete, inputs=inputs, model=model, options=options, decoding=decoding, data_counts=counts
    )


def both_orders(row: dict, judge: Judge, model: JudgeModel | None, num_samples: int = 1) -> list[Request]:
    """A row of prompts as it is, and with its answers swapped, each `num_samples` times."""
    requests = []
    for order, answers in (1, ("answer_1", "answer_2")), (2, ("answer_2", "answer_1")):
        messages = judge_prompt(judge, question_of(row), *(row[name] for name in answers))
        prompt = {"messages": messages} if model is None else {"prompt_ids": model.tokenizer.prompt_ids(messages)}
        keys = [{"id": row["id"], "order": order, "sample": sample} for sample in range(num_samples)]
        requests += [Request(key=key, **prompt) for key in keys]
    return requests


def seconds_per_judgment(made: dict) -> float | None:
    """By the manifest of judgments: of those that its last process made, its start-up included."""
    count = made["counts"].get("judgments_made")
    return made["seconds"] / count if count else None


def named_file(given: str) -> tuple[str, Path]:
    """The judge's name and the file of `NAME=PATH`, or of a path alone, which may hold a = of its own."""
    name, equals, path = given.partition("=")
    if Path(given).exists() or not equals:
        return Path(given).stem.removeprefix("judgments_"), Path(given)
    return name, Path(path)


def read_files(options: EvaluateOptions) -> tuple[dict[str, Judged], dict[str, int]]:
    """Judgments that others made, or that were made earlier, by name: no model is asked."""
    judged, counts = {}, Counter()
    for given in options.judgments:
        name, path = named_file(given)
        require(name not in judged, f"--judgments: two files are named {name}; expected NAME={path}")
        prompts, rows = read_judgments_file(path, options.data, options.seed, options.subsets, options.limit)
        judged[name] = Judged(prompts=prompts, rows=rows, is_part=options.takes_part)
        counts[f"judgments_{name}"] = len(rows)
    return judged, dict(counts)


if __name__ == "__main__":
    run_command(evaluate, EvaluateOptions, __doc__)
