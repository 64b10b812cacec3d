"""Stage 2: the base model, or another behind an endpoint, writes n judgments of every prompt, to `repeated.jsonl`.

Sampled warm, so that both right and wrong ones come out; which is which, the label says when pairs are made (paper,
section 3.1). A row holds the whole text; its verdict is that of what stands behind a thought. Run it again after a kill and
it goes on.

    python -m conj.sample.repeated --run-dir runs/demo --model demo/base
    python -m conj.sample.repeated --run-dir runs/mine --api-model Qwen/Qwen2.5-72B-Instruct --base-url http://HOST:8000/v1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conj.data.judges import judge_prompt, with_parser
from conj.data.options import option, require_each, run_command
from conj.data.prompts import question_of
from conj.model.folder import JudgeModel
from conj.sample.engines.completion import Completion, Request
from conj.sample.stage import STRUCTURED, SamplingOptions, object_form, sample_prompts


@dataclass(frozen=True, kw_only=True)
class RepeatedOptions(SamplingOptions):
    num_samples: int = option(8, help="number of judgments a prompt")
    temperature: float = option(1.2, help="sampling temperature, above 0")
    top_p: float = option(0.95, help="sample from the likeliest tokens that add up to this share, above 0 up to 1")
    parser: Literal["strict", "released"] | None = option(
        None, help="how verdicts are read; by default the judge's; released: as published"
    )
    structured_output: bool = option(False, help=STRUCTURED)

    def makes(self) -> dict[Path, list]:
        return {self.run_dir / "repeated.jsonl": self.made_from()}

    def __post_init__(self):
        super().__post_init__()
        require_each(self, ("num_samples",), lambda value: value >= 1, "1 or more")
        judge = with_parser(self.read_judge(), self.parser)
        object_form(judge, self.structured_output)
        object.__setattr__(self, "parser", None if judge.verdict_pattern else judge.parser)

    def opens_thought(self, model: JudgeModel | None) -> bool:
        opened = super().opens_thought(model)
        object_form(self.read_judge(), self.structured_output, opened)
        return opened


def sample_repeated(options: RepeatedOptions) -> None:
    """Writes `repeated.jsonl`. Raises InputError for unusable prompts, model or options."""
    model, judge = options.read_model(), with_parser(options.read_judge(), options.parser)
    opened = options.opens_thought(model)
    keys = [{"kind": "repeated", "index": index} for index in range(options.num_samples)]

    def make_requests(row: dict) -> list[Request]:
        prompt = options.prompt(model, judge_prompt(judge, question_of(row), row["answer_1"], row["answer_2"]))
        return [Request(key={"id": row["id"], **key}, **prompt) for key in keys]

    def read(request: Request, completion: Completion) -> dict:
        verdict = judge.parse(completion.text, opened)
        return {"text": completion.text, "verdict": verdict.value, "rung": verdict.rung}

    form = object_form(judge, options.structured_output, opened)
    sample_prompts(options, model, keys, make_requests, read, form)


if __name__ == "__main__":
    run_command(sample_repeated, RepeatedOptions, __doc__)
