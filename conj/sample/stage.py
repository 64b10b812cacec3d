"""What the sampling stages share: their options, and the way from prompts.jsonl to a file of judgments.

Rows are appended as they finish; a stage that is killed goes on where it stopped and ends with the same file. Prompts are
read and turned to requests as an engine asks for more: neither they nor the rows are held in memory. A prompt that does
not fit the context is left out and counted, never cut.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from conj import InputError
from conj.data import manifest
from conj.data.identity import ENDPOINT, describe_judge
from conj.data.judged import JudgedRunOptions
from conj.data.judges import Judge
from conj.data.manifest import RunOptions
from conj.data.options import option, refuse, require, require_each
from conj.data.preprocess import stream_prompts
from conj.data.progress import progress
from conj.model.folder import TRAINING_MAX_LENGTH, JudgeModel, check_model
from conj.sample.engines.completion import Complete, Completion, Decoding, ObjectForm, Request
from conj.sample.engines.fleet import ENGINES_ALONE, FleetOptions, complete_by_engines
from conj.sample.engines.http import EndpointOptions, complete_by_http
from conj.sample.rows import Rows

STRUCTURED = (
    "every judgment is the judge's JSON object with a verdict, unless it is cut off; its reason begins as the judge says; it "
    "cannot think first"
)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(JudgedRunOptions, FleetOptions, EndpointOptions):
    TOP_K: ClassVar[int] = 50

    model: Path | None = option(
        None,
        help="base model: a Hugging Face folder, or ORG/NAME on the hub, with @REVISION or without; with --api-model it is "
        "not asked: its tokenizer says which prompts are too long",
        affects_result=False,
    )
    api_model: str | None = option(
        None, help="the model that an endpoint is asked for, in place of one that runs here", affects_result=False
    )
    max_length: int | None = option(
        None,
        help=f"longest prompt + judgment, tokens; by default what training takes, {TRAINING_MAX_LENGTH}, or the model's",
    )
    temperature: float = option(help="sampling temperature, above 0")
    top_p: float = option(help="sample from the likeliest tokens that add up to this share, above 0 up to 1")
    top_k: int | None = option(
        None, help=f"sample from this many likeliest tokens, 0: all; by default {TOP_K}, or what the endpoint does"
    )
    repetition_penalty: float | None = option(
        None,
        help="divides the scores of tokens that already appeared, above 0; by default 1 (off), or what the endpoint does",
    )
    seed: int = option(2021, help="seed of the sampling")

    def __post_init__(self):
        FleetOptions.__post_init__(self)
        EndpointOptions.__post_init__(self)
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", self.read_judge().max_new_tokens)  # so that the manifest says it
        require_each(self, ("temperature", "repetition_penalty"), lambda value: value > 0, "above 0")
        require_each(self, ("top_p",), lambda value: 0 < value <= 1, "above 0 up to 1")
        require_each(self, ("top_k",), lambda value: value >= 0, "0 or more")
        if self.api_model is not None:
            refuse(self, ENGINES_ALONE, f"{self.api_model} is behind an endpoint")
            refuse(self, () if self.model else ("max_length",), "expected --model, whose tokens are counted")
            return
        require(self.model is not None, "--model: expected a model, or --api-model for one behind an endpoint")
        refuse(self, ("base_url", "requests_per_minute"), "expected --api-model, the name that the endpoint knows")
        for name, recipe in (("top_k", self.TOP_K), ("repetition_penalty", 1.0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, recipe)

    def made_from(self) -> list:
        """The prompts, the models that judge them, and whose prompt they are given, as a manifest's inputs."""
        endpoint = [f"{ENDPOINT}{self.api_model}"] if self.api_model else []
        models = [*endpoint, *([self.model] if self.model else [])]
        return [self.find("prompts.jsonl"), *models, describe_judge(self.read_judge())]

    def read_model(self) -> JudgeModel | None:
        """The model of --model, checked; None where there is none."""
        return self.model and check_model(self.model, self.max_length, most=TRAINING_MAX_LENGTH)

    def opens_thought(self, model: JudgeModel | None) -> bool:
        """See the function of this name. Raises InputError too where what the stage asks for cannot follow on a thought."""
        return opens_thought(model, self.read_judge())

    def prompt(self, model: JudgeModel | None, messages: list[dict], begun: str = "") -> dict:
        """What a request holds of its prompt: token ids where they are made here, and what an endpoint is sent. `begun`: how the
        assistant's turn begins, which no endpoint can be sent."""
        prompt = {} if model is None else {"prompt_ids": model.tokenizer.prompt_ids(messages, begun), "begun": begun}
        return prompt | ({} if self.api_model is None else {"messages": messages})


def opens_thought(model: JudgeModel | None, judge: Judge) -> bool:
    """Whether the prompts of a model end with the start of a thought, as the chat templates of some have it.

    Raises InputError where the marks of a thought are control tokens: they leave no text, and a thought could not be told
    from an answer."""
    if model is None:
        return False
    for mark in judge.thought:
        require(
            model.tokenizer.special.get(mark) not in model.tokenizer.silent,
            f"{model.folder}: its tokenizer takes {mark} for a control token, which is no text; judge {judge.name} could not tell "
            "a thought from an answer",
        )
    return any(prompt.rstrip().endswith(judge.thought[0]) for prompt in model.tokenizer.template.prompts())


def object_form(judge: Judge, structured: bool, opened: bool = False) -> ObjectForm | None:
    """The object that --structured-output asks for. Raises InputError for a judge that does not write one, or a prompt that ends
    within a thought."""
    if not structured:
        return None
    pattern = (
        f"--structured-output: expected a judge whose judgments are JSON; those of {judge.name} are read by a pattern"
    )
    require(judge.verdict_pattern is None, pattern)
    require(not opened, "--structured-output: the model's prompts begin a thought, which cannot be an object")
    return ObjectForm(judge.reason_key, judge.verdict_key, judge.reason_starts)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The judgments of a file: of each row of `prompts`, which are read anew at every call, one for each of `keys` (beside
    the prompt's `id`, what names it). `make_requests` makes those of a row, in the same order; `judge` reads a completion: the
    columns of a row but for what is known of the request, `outcome` among them, which says which answer it is for."""

    prompts: Callable[[], Iterable[dict]]
    keys: list[dict]
    make_requests: Callable[[dict], list[Request]]
    judge: Callable[[Request, Completion], dict]
    outcome: str = "verdict"


def sample_prompts(
    options: SamplingOptions, model: JudgeModel | None, keys: list[dict], make_requests: Callable, judge: Callable,
    form: ObjectForm | None = None,
) -> None:  # fmt: skip
    """Writes the stage's file: for each row of prompts.jsonl the requests `make_requests` makes of it, completed and judged.

    Raises InputError for unusable prompts."""
    [(artefact, inputs)] = options.makes().items()
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
        top_k=options.top_k, repetition_penalty=options.repetition_penalty, seed=options.seed,
        thought=options.read_judge().thought, object_form=form, needs_reason=True,  # reasons are what is trained on
    )  # fmt: skip
    if options.api_model is None:
        if model.untrainable is not None:
            print(f"note: these judgments can train another model, not this one: {model.untrainable}")
        complete = functools.partial(complete_by_engines, model=model, options=options, decoding=decoding)
    else:
        complete = functools.partial(complete_by_http, model=options.api_model, options=options, decoding=decoding)
    prompts = functools.partial(stream_prompts, inputs[0])
    task = Task(prompts=prompts, keys=keys, make_requests=make_requests, judge=judge)
    write_judgments(artefact, task, complete, inputs=inputs, model=model, options=options, decoding=decoding)


def write_judgments(
    artefact: Path, task: Task, complete: Complete, *, inputs: list[str | Path], model: JudgeModel | None,
    options: RunOptions, decoding: Decoding, data_counts: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Writes `artefact` with its manifest, or does nothing if it is complete. A prompt that does not fit the model's context
    is left out and counted; one behind an endpoint (`model` None) fits if that says so.

    `data_counts` go before the judgments' own."""
    began = time.monotonic()
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    rows, overlong_ids, num_made = append_samples(artefact, task, complete, model, decoding)
    counts = (data_counts or {}) | counted(rows)
    counts |= {"overlong_prompts": len(overlong_ids), "overlong_ids": overlong_ids}
    # Of the seconds below: those of this process, which an earlier, killed one may have left little to do.
    counts["judgments_made"] = num_made
    manifest.finish(artefact, num_rows=rows.num_rows, counts=counts, seconds=time.monotonic() - began)


def counted(rows: Rows) -> dict[str, int]:
    """Judgments by outcome (right: it is the label), those cut off at the length limit or refused, and by rung."""
    return dict.fromkeys(("right", "wrong", "unparsed", "cut_off"), 0) | dict(sorted(rows.counts.items()))


def append_samples(
    artefact: Path, task: Task, complete: Complete, model: JudgeModel | None, decoding: Decoding
) -> tuple[Rows, list[str], int]:
    """Makes the rows of `artefact` that are not there yet, and puts all of them into the order of the prompts. Returns them,
    the ids of prompts that are too long, and how many it made.

    A row is the request's key, what `judge` makes of the completion, and what the model wrote: its token ids, or how many a
    server counted, and with `verdict_probability` also `p_first`. Raises InputError for a malformed file, a row of no
    request or that is there twice, and when every prompt is too long.

    The bar shows which shares of the judgments so far are right (their id's label), wrong, and unparsed."""
    labels = {row["id"]: row["label"] for row in task.prompts()}
    over_http = task.make_requests(next(iter(task.prompts())))[0].messages is not None
    # What a row says about the tokens that were written: columns of Completion. Not every server counts.
    cost = {"prompt_tokens": object, "completion_tokens": object} if over_http else {"token_ids": list}
    written = {"text": str, "verdict": object, "rung": str, "finish_reason": str, **cost}
    rows = Rows(artefact, labels, task.keys, task.outcome, written)
    num_before, overlong_ids = rows.num_rows, []
    left = requests_left(rows, task, model, decoding, overlong_ids)
    first = next(left, None)  # before an engine starts: there may be none, or none that fits
    if first is not None:
        requests = itertools.chain([first], left)
        with contextlib.closing(complete(requests, rows.num_requests - num_before)) as completions, \
                open(artefact, "ab") as file:  # fmt: skip
            settings = {"total": rows.num_requests, "initial": num_before, "unit": " judgments"}
            bar = progress(completions, desc=artefact.name, **settings)
            for request, completion in bar:
                row = {
                    **request.key, **task.judge(request, completion), "finish_reason": completion.finish_reason,
                    **{column: getattr(completion, column) for column in cost},
                }  # fmt: skip
                if decoding.verdict_probability:
                    row["p_first"] = completion.p_first if row[task.outcome] else None
                rows.append(file, row)
                shares = {name: f"{rows.counts[name] / rows.num_rows:.0%}" for name in ("right", "wrong", "unparsed")}
                bar.set_postfix(shares, refresh=False)
                bar.total = rows.num_requests - len(task.keys) * len(overlong_ids)
    rows.put_in_order()
    return rows, overlong_ids, rows.num_rows - num_before


def requests_left(
    rows: Rows, task: Task, model: JudgeModel | None, decoding: Decoding, overlong_ids: list[str]
) -> Iterator[Request]:
    """The requests whose rows are not there yet, made as they are asked for. Of prompts that leave no room for a whole
    judgment there are none, and their ids are added to `overlong_ids`: one of which one request does not fit is left out whole.

    Raises InputError when none fits."""
    longest = math.inf if model is None else model.max_length - decoding.max_new_tokens
    shortest = math.inf
    for row in task.prompts():
        there = [{"id": row["id"], **key} in rows for key in task.keys]
        if all(there):
            continue
        requests = task.make_requests(row)
        lengths = [len(request.prompt_ids) for request in requests]
        if max(lengths) > longest:
            require(not any(there), f"{rows.path}: has judgments of {row['id']}, which is too long; delete their lines")
            overlong_ids.append(row["id"])
            shortest = min(shortest, *lengths)
            continue
        yield from (request for request, made in zip(requests, there) if not made)
    if len(overlong_ids) == len(rows.labels):
        raise InputError(
            f"--max-length {model.max_length}: every prompt is too long; the shortest has {shortest} tokens, "
            f"and {decoding.max_new_tokens} are kept for the judgment"
        )
