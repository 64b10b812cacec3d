"""What the sampling stages share: their options, and the way from prompts.jsonl to a file of judgments."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from conj.data import manifest
from conj.data.options import option, require_each
from conj.data.preprocess import read_prompts
from conj.sample.engine import (
    Completion,
    Decoding,
    EngineOptions,
    JudgeModel,
    Request,
    append_samples,
    complete_by_vllm,
    split_overlong,
)

REFUSED = ("content_filter", "context_length")  # reasons of an endpoint's to write no judgment, or not all of it


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(EngineOptions):
    run: Path = option(help="run folder; reads prompts.jsonl, writes the judgments beside it", affects_result=False)
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


def sample_prompts(
    artefact: Path,
    options: SamplingOptions,
    model: JudgeModel,
    make_requests: Callable[[dict], list[Request]],
    judge: Callable[[Request, Completion], dict],
) -> None:
    """Writes `artefact`: for each row of prompts.jsonl the requests `make_requests` makes of it, completed and judged.

    Raises InputError for unusable prompts."""
    source = options.run / "prompts.jsonl"
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    complete = functools.partial(complete_by_vllm, model=model, options=options, decoding=decoding)
    write_judgments(
        artefact, read_prompts(source), make_requests, judge, complete,
        inputs=[source, options.model], model=model, options=options, decoding=decoding,
    )  # fmt: skip


def write_judgments(
    artefact: Path,
    prompts: list[dict],
    make_requests: Callable[[dict], list[Request]],
    judge: Callable[[Request, Completion], dict],
    complete: Callable[[list[Request]], Generator[tuple[Request, Completion]]],
    *,
    inputs: list[str | Path],
    model: JudgeModel | None,
    options: EngineOptions,
    decoding: Decoding,
    data_counts: dict[str, int] | None = None,
    outcome: str = "verdict",
) -> None:
    """Writes `artefact` with its manifest, or does nothing if it is complete. A prompt that does not fit the model's context
    is left out and counted; one behind an endpoint (`model` None) fits if that says so.

    `complete` gives each request its completion; `data_counts` go before the judgments' own; `outcome` is the column that
    says which answer a judgment is for."""
    began = time.monotonic()
    if not manifest.begin(artefact, inputs=inputs, options=options):
        return
    requests, overlong_ids, left = [request for row in prompts for request in make_requests(row)], [], []
    if model is not None:
        requests, overlong_ids = split_overlong(requests, model, decoding.max_new_tokens)

    def complete_left(requests: list[Request]) -> Generator[tuple[Request, Completion]]:
        left.extend(requests)
        return complete(requests)

    rows = append_samples(artefact, requests, complete_left, judge, outcome, decoding.verdict_probability)
    counts = count_judgments(rows, {row["id"]: row["label"] for row in prompts}, outcome)
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
