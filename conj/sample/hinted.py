"""Stage 3: the base model, or another behind an endpoint, gives reasons for a verdict it is told, one for the label and one against it: `hinted.jsonl`.

The reason is put into the JSON of a judgment with the verdict of the hint, so that every prompt gets a right and a
wrong judgment, also where sampling gave only one kind (paper, section 3.2). Where the judge's file says how reasons begin, the
model is given that as the start of its turn. A thought, which may speak of the hint, is
thrown away, and a text that ends within it is no reason. Run it again after a kill and it goes on.

    python -m conj.sample.hinted --run-dir runs/demo --model demo/base
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from conj.data.judges import UNFINISHED, Judge, judge_prompt, judgment_text
from conj.data.options import option, require, run_command
from conj.data.prompts import question_of
from conj.data.tokenizer import JudgeTokenizer
from conj.model.folder import JudgeModel
from conj.sample.engines.completion import Completion, Request
from conj.sample.stage import SamplingOptions, sample_prompts

MAX_REASON_TOKENS = 400
# A full stop of a number (3.14) or an abbreviation within a word ends no sentence.
SENTENCE_END = re.compile(r'(?:[。！？…]|[.!?](?=[\s"”’」』）)]|$))["”’」』）)]*')


@dataclass(frozen=True, kw_only=True)
class HintedOptions(SamplingOptions):
    TOP_K: ClassVar[int] = 0

    temperature: float = option(1.0, help="sampling temperature, above 0")
    top_k: int | None = option(
        None, help="sample from this many likeliest tokens, 0: all; by default all, or what the endpoint does"
    )
    top_p: float = option(0.9, help="sample from the likeliest tokens that add up to this share, above 0 up to 1")

    def makes(self) -> dict[Path, list]:
        return {self.run_dir / "hinted.jsonl": self.made_from()}

    def __post_init__(self):
        super().__post_init__()
        judge = self.read_judge()
        require(
            judge.reason_start is None or self.api_model is None,
            f"--judge {self.judge}: expected no reason_start with --api-model: an endpoint cannot be given the start of a turn",
        )
        missing = "hint_1 and hint_2" if judge.hint_1 is None else "judgment" if not judge.can_write else ""
        require(not missing, f"--judge {self.judge}: expected {missing} in its file, to ask for reasons; found none")
        require(
            self.model is not None or self.max_new_tokens <= MAX_REASON_TOKENS,
            f"--max-new-tokens: expected at most {MAX_REASON_TOKENS}, found {self.max_new_tokens}, or a --model, by whose "
            "tokens a longer reason is cut",
        )

    def opens_thought(self, model: JudgeModel | None) -> bool:
        opened = super().opens_thought(model)
        require(
            self.read_judge().reason_start is None or not opened,
            f"--judge {self.judge}: expected no reason_start: the model's prompts begin a thought, which is no reason",
        )
        return opened


def sample_hinted(options: HintedOptions) -> None:
    """Writes `hinted.jsonl`. Raises InputError for unusable prompts, model or options."""
    model, judge = options.read_model(), options.read_judge()
    kinds, opened = ("hint", "hint_reversed"), options.opens_thought(model)

    def make_requests(row: dict) -> list[Request]:
        requests = []
        for kind, hint in zip(kinds, (row["label"], 3 - row["label"])):
            messages = judge_prompt(judge, question_of(row), row["answer_1"], row["answer_2"], hint)
            key = {"id": row["id"], "kind": kind, "index": 0}
            begun = judge.reason_starts[hint - 1]
            requests.append(Request(key=key, hint=hint, **options.prompt(model, messages, begun)))
        return requests

    def read(request: Request, completion: Completion) -> dict:
        return hinted_judgment(completion, request.hint, judge, model and model.tokenizer, opened)

    sample_prompts(options, model, [{"kind": kind, "index": 0} for kind in kinds], make_requests, read)


def hinted_judgment(
    completion: Completion, hint: int, judge: Judge, tokenizer: JudgeTokenizer | None, opened: bool = False
) -> dict:
    """What the model wrote for a hint, its thought aside, as a judgment with that verdict; as written and without a verdict if it
    cannot be one: it says nothing, has no full sentence up to where it is cut, or states another verdict or tries to. Of a thought
    that does not end, or that begins anew, nothing is left. A judgment in a thought that the prompt `opened` ends it.

    Where the judge says how reasons begin, the model wrote what follows on that: no thought, and no judgment of its own.

    Rungs: `hint`, the text is the reason; `hint_cut`, its full sentences are; the parser's, it is a judgment already; `none`;
    `unfinished`."""
    closing, start = f"{judge.thought[1]}\n\n" if opened else "", judge.reason_starts[hint - 1]
    answer = start + completion.text if start else judge.answer(completion.text, opened)
    if answer is None or any(mark in answer for mark in judge.thought):
        return {"text": closing, "verdict": None, "rung": UNFINISHED}
    written = answer.strip()
    own, attempted = judge.parse(written), judge.attempts(written)
    if own.value == hint and (attempted or judge.reason(written)) and not start:
        reason, rung = judge.reason(written), own.rung
    elif (own.value == hint or own == (None, "none")) and not attempted:
        reason, rung = written, "hint"
    else:
        reason, rung = "", "none"
    kept = cut_reason(reason, tokenizer, torn=rung == "hint" and completion.finish_reason == "length")
    text, says_something = judgment_text(judge, kept, hint), re.search(r"\w", kept[len(start) :])
    if says_something and judge.parse(text).value == hint:  # a reason may hold what a pattern reads
        return {"text": closing + text, "verdict": hint, "rung": rung if kept == reason else f"{rung}_cut"}
    return {"text": closing + answer, "verdict": None, "rung": "none"}


def cut_reason(reason: str, tokenizer: JudgeTokenizer | None, torn: bool) -> str:
    """The reason up to its last full sentence within 400 tokens; whole if it is no longer and not torn. Without a tokenizer
    it is no longer: no more was asked for."""
    ids = tokenizer.encode_text(reason) if tokenizer else []
    if len(ids) <= MAX_REASON_TOKENS and not torn:
        return reason
    # The last token may hold a part of a character only, which is decoded as U+FFFD.
    longest = len(tokenizer.decode(ids[:MAX_REASON_TOKENS]).rstrip("\ufffd")) if tokenizer else len(reason)
    ends = [match.end() for match in SENTENCE_END.finditer(reason) if match.end() <= longest]
    return reason[: ends[-1]] if ends else ""


if __name__ == "__main__":
    run_command(sample_hinted, HintedOptions, __doc__)
