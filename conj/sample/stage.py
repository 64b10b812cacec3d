"""What the sampling stages share: their options, and the way from prompts.jsonl to a file of judgments.

Rows are appended as they finish; a stage that is killed goes on where it stopped and ends with the same file. A prompt
that does not fit the context is left out and counted, never cut.
"""

import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data import manifest
from conj.data.files import brief, dump_line, recover_jsonl, write_jsonl
from conj.data.manifest import RunOptions
from conj.data.options import option, require_each
from conj.data.preprocess import read_prompts
from conj.data.progress import progress
from conj.model.folder import TRAINING_MAX_LENGTH, JudgeModel
from conj.sample.engines.completion import Completion, Completions, Decoding, Request
from conj.sample.engines.vllm import EngineOptions, complete_by_vllm

REFUSED = ("content_filter", "context_length")  # reasons of an endpoint's to write no judgment, or not all of it


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(RunOptions, EngineOptions):
    max_length: int | None = option(
        None,
        help=f"longest prompt + judgment, tokens; by default what training takes, {TRAINING_MAX_LENGTH}, or the model's",
    )
    temperature: float = option(help="sampling temperature, above 0")
    top_p: float = option(help="sample from the likeliest tokens that add up to this share, above 0 up to 1")
    top_k: int = option(50, help="sample from this many likeliest tokens; 0: all")
    repetition_penalty: float = option(1.0, help="divides the scores of tokens that already appeared, above 0; 1: off")
    seed: int = option(2021, help="seed of the sampling")

    def __post_init__(self):
        super().__post_init__()
        require_each(self, ("temperature", "repetition_penalty"), lambda value: value > 0, "above 0")
        require_each(self, ("top_p",), lambda value: 0 < value <= 1, "above 0 up to 1")
        require_each(self, ("top_k",), lambda value: value >= 0, "0 or more")


Ask = Callable[[dict], list[Request]]  # a row of prompts.jsonl: what its judgments are asked for by
Read = Callable[[Request, Completion], dict]  # a judgment, without what is known of the request


def sample_prompts(options: SamplingOptions, model: JudgeModel, make_requests: Ask, judge: Read) -> None:
    """Writes the stage's file: for each row of prompts.jsonl the requests `make_requests` makes of it, completed and judged.

    Raises InputError for unusable prompts."""
    [(artefact, inputs)] = options.makes().items()
    if model.untrainable is not None:
        print(f"note: these judgments can train another model, not this one: {model.untrainable}")
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
        top_k=options.top_k, repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip
    complete = functools.partial(complete_by_vllm, model=model, options=options, decoding=decoding)
    settings = {"inputs": inputs, "model": model, "options": options, "decoding": decoding}
    write_judgments(artefact, read_prompts(inputs[0]), make_requests, judge, complete, **settings)


def write_judgments(
    artefact: Path, prompts: list[dict], make_requests: Ask, judge: Read, complete: Callable[[list[Request]], Completions],
    *, inputs: list[str | Path], model: JudgeModel | None, options: EngineOptions, decoding: Decoding,
    data_counts: dict[str, int] | None = None, outcome: str = "verdict",
) -> None:  # fmt: skip
    """Writes `artefact` with its manifest, or does nothing if it is complete. A prompt that does not fit the model's context
    is left out and counted; one behind an endpoint (`model` None) fits if that says so.

    `data_counts` go before the judgments' own; `outcome`: the column that says which answer a judgment is for."""
    began = time.monotonic()
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    requests, overlong_ids, left = [request for row in prompts for request in make_requests(row)], [], []
    if model is not None:
        requests, overlong_ids = split_overlong(requests, model, decoding.max_new_tokens)

    def complete_left(requests: list[Request]) -> Completions:
        left.extend(requests)
        return complete(requests)

    labels = {row["id"]: row["label"] for row in prompts}
    rows = append_samples(artefact, requests, complete_left, judge, outcome, labels, decoding.verdict_probability)
    counts = count_judgments(rows, labels, outcome)
    counts |= {"overlong_prompts": len(overlong_ids), "overlong_ids": overlong_ids}
    # Of the seconds below: those of this process, which an earlier, killed one may have left little to do.
    counts["judgments_made"] = len(left)
    seconds = time.monotonic() - began
    manifest.finish(artefact, num_rows=len(rows), counts=(data_counts or {}) | counts, seconds=seconds)


def count_judgments(rows: list[dict], labels: dict[str, int], outcome: str) -> dict[str, int]:
    """Judgments by outcome (right: it is the label), those cut off at the length limit or refused, and by rung."""
    counts = Counter(right=0, wrong=0, unparsed=0, cut_off=0)
    for row in rows:
        right = row[outcome] == labels[row["id"]]
        counts["unparsed" if row[outcome] is None else "right" if right else "wrong"] += 1
        counts["cut_off"] += row["finish_reason"] == "length"
        if row["finish_reason"] in REFUSED:
            counts[f"refused_{row['finish_reason']}"] += 1
        counts[f"rung_{row['rung']}"] += 1
    return dict(counts)


def split_overlong(requests: list[Request], model: JudgeModel, max_new_tokens: int) -> tuple[list[Request], list[str]]:
    """Requests that fit the context with room for a whole judgment, and the ids of prompts that do not.

    A prompt of which one request does not fit is left out whole. Raises InputError when none fits."""
    longest = model.max_length - max_new_tokens
    overlong = dict.fromkeys(r.key["id"] for r in requests if len(r.prompt_ids) > longest)
    fitting = [r for r in requests if r.key["id"] not in overlong]
    if not fitting:
        shortest = min(len(r.prompt_ids) for r in requests)
        raise InputError(
            f"--max-length {model.max_length}: every prompt is too long; the shortest has {shortest} tokens, "
            f"and {max_new_tokens} are kept for the judgment"
        )
    return fitting, list(overlong)


def append_samples(
    artefact: Path, requests: list[Request], complete: Callable[[list[Request]], Completions], judge: Read, outcome: str,
    labels: dict[str, int], verdict_probability: bool = False,
) -> list[dict]:  # fmt: skip
    """Makes the rows of `artefact` that are not there yet, and returns all of them.

    A row is the request's key, what `judge` makes of the completion (`outcome` among it), and what the model wrote: its
    token ids, or how many a server counted, and with `verdict_probability` also `p_first`. Rows are appended as `complete`
    gives them; the whole file is put into the order of the requests at the end, so that a run that was killed and one that
    was not leave the same bytes. Raises InputError for a malformed file, and a row of no request or that is there twice.

    The bar shows which shares of the judgments so far are right (their id's answer in `labels`), wrong, and unparsed."""
    done = _rows_made(artefact, requests, outcome)
    left = [r for r in requests if _name(r.key) not in done]
    if left:
        counts = Counter(count_judgments(list(done.values()), labels, outcome))
        with contextlib.closing(complete(left)) as completions, open(artefact, "a", encoding="utf-8") as file:
            bar = progress(completions, desc=artefact.name, total=len(requests), initial=len(done), unit=" judgments")
            for request, completion in bar:
                row = {
                    **request.key, **judge(request, completion), "finish_reason": completion.finish_reason,
                    **{column: getattr(completion, column) for column in _cost_columns(request)},
                }  # fmt: skip
                if verdict_probability:
                    row["p_first"] = completion.p_first if row[outcome] else None
                file.write(dump_line(row))
                file.flush()
                done[_name(request.key)] = row
                counts.update(count_judgments([row], labels, outcome))
                shares = {name: f"{counts[name] / len(done):.0%}" for name in ("right", "wrong", "unparsed")}
                bar.set_postfix(shares, refresh=False)
    rows = [done[_name(r.key)] for r in requests]
    write_jsonl(artefact, rows)
    return rows


def _cost_columns(request: Request) -> dict[str, type]:
    """What a row says about the tokens that were written: columns of Completion, with their type."""
    if request.messages is None:
        return {"token_ids": list}
    return {"prompt_tokens": object, "completion_tokens": object}  # not every server counts


def _name(key: dict) -> str:
    return json.dumps(list(key.values()))  # not a tuple: there true and 1 are one name, and a list is none


def _rows_made(artefact: Path, requests: list[Request], outcome: str) -> dict[str, dict]:
    """The rows that an earlier, killed run made, by request."""
    written = {"text": str, "verdict": object, outcome: object, "rung": str, "finish_reason": str}
    written |= _cost_columns(requests[0])
    asked, done = {_name(r.key) for r in requests}, {}
    for number, row in enumerate(recover_jsonl(artefact, dict.fromkeys(requests[0].key, object) | written), 1):
        name = _name(key := {column: row[column] for column in requests[0].key})
        if name not in asked or name in done:
            found = ", ".join(f"{column} {brief(value)}" for column, value in key.items())
            wrong = "stands here for the second time" if name in asked else "is no judgment that was asked for"
            raise InputError(f"{artefact}:{number}: {found} {wrong}; delete the line")
        done[name] = row
    return done
