"""What the sampling stages share: their options, and the way from prompts.jsonl to a file of judgments."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conj.data import manifest
from conj.data.options import option, require
from conj.data.preprocess import read_prompts
from conj.data.verdicts import parse_released, parse_strict
from conj.sample.engine import (
    Completion,
    Decoding,
    EngineOptions,
    JudgeModel,
    Request,
    append_samples,
    split_overlong,
)

PARSERS = {"strict": parse_strict, "released": parse_released}


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
        require(self.temperature > 0, f"--temperature: expected above 0, found {self.temperature}")
        require(0 < self.top_p <= 1, f"--top-p: expected above 0 up to 1, found {self.top_p}")
        require(self.top_k >= 0, f"--top-k: expected 0 or more, found {self.top_k}")
        require(self.repetition_penalty > 0, f"--repetition-penalty: expected above 0, found {self.repetition_penalty}")


def sample_prompts(
    artefact: Path,
    options: SamplingOptions,
    model: JudgeModel,
    make_requests: Callable[[dict], list[Request]],
    judge: Callable[[Request, Completion], dict],
) -> None:
    """Writes `artefact`: for each row of prompts.jsonl the requests `make_requests` makes of it, completed and judged.

    A prompt that does not fit the context is left out and counted. Raises InputError for unusable prompts."""
    began, source = time.monotonic(), options.run / "prompts.jsonl"
    prompts = read_prompts(source)
    if not manifest.begin(artefact, inputs=[source, options.model], options=options):
        return
    requests = [request for row in prompts for request in make_requests(row)]
    requests, overlong_ids = split_overlong(requests, model, options.max_new_tokens)
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    rows = append_samples(artefact, requests, model, options, decoding, judge)
    counts = count_judgments(rows, {row["id"]: row["label"] for row in prompts})
    counts |= {"overlong_prompts": len(overlong_ids), "overlong_ids": overlong_ids}
    manifest.finish(artefact, num_rows=len(rows), counts=counts, seconds=time.monotonic() - began)


def count_judgments(rows: list[dict], labels: dict[str, int]) -> dict[str, int]:
    """Judgments by outcome (right: the verdict is the label), those cut off at the length limit, and by rung."""
    counts = Counter(right=0, wrong=0, unparsed=0, cut_off=0)
    for row in rows:
        right = row["verdict"] == labels[row["id"]]
        counts["unparsed" if row["verdict"] is None else "right" if right else "wrong"] += 1
        counts["cut_off"] += row["finish_reason"] == "length"
        counts[f"rung_{row['rung']}"] += 1
    return dict(counts)
