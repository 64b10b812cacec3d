"""One judgment: the usage snippet of the Con-J model card as one command.

    python -m conj.sample.judge --model runs/demo/model --question "1+1=?" --answer-1 "2" --answer-2 "3"

And from Python; a loop over many pairs starts the engine once:

    from conj.sample.judge import judge
    judgment = judge("runs/demo/model", question, answer_1, answer_2)
    print(judgment.reason, judgment.verdict)
"""

import contextlib
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data.hub import find_model
from conj.data.options import option, run_command
from conj.data.prompts import judge_messages
from conj.data.verdicts import parse_reason, parse_strict
from conj.model.folder import JudgeModel, check_model
from conj.sample.engines.completion import Decoding, Request
from conj.sample.engines.vllm import EngineOptions, generate, running_engine


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EngineOptions):
    question: str = option(help="the question")
    answer_1: str = option(help="the first answer")
    answer_2: str = option(help="the second answer")
    max_new_tokens: int = option(2048, help="longest judgment, tokens; less where the context leaves less")


@dataclass(frozen=True, kw_only=True)
class Judgment:
    verdict: int | None  # 1, 2, or None: the text states no verdict
    reason: str
    text: str  # as written


_running = contextlib.ExitStack()


@functools.lru_cache(maxsize=1)
def _start(options: EngineOptions) -> tuple[JudgeModel, object]:
    """The checked model and its engine, which stays up until one with other options is asked for."""
    model = check_model(find_model(options.model), options.max_length)
    _running.close()
    return model, _running.enter_context(running_engine(model, options))


def judge(
    model: str | Path, question: str | list[dict], answer_1: str, answer_2: str, max_new_tokens: int = 2048,
    **engine_options,
) -> Judgment:  # fmt: skip
    """Asks a judge which answer is better, greedily, of a text or chat messages. `engine_options`: as in EngineOptions.

    Raises InputError for an unusable model folder, or when the prompt leaves no room for a judgment."""
    options = EngineOptions(model=Path(model), max_new_tokens=max_new_tokens, **engine_options)
    checked, engine = _start(options)
    prompt_ids = checked.tokenizer.prompt_ids(judge_messages(question, answer_1, answer_2))
    room = checked.max_length - len(prompt_ids)
    if room < 1:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens, the context {checked.max_length}")
    decoding = Decoding(max_new_tokens=min(max_new_tokens, room))
    [(_, completion)] = generate(engine, [Request(key={}, prompt_ids=prompt_ids)], checked, decoding)
    verdict, reason = parse_strict(completion.text).value, parse_reason(completion.text)
    return Judgment(verdict=verdict, reason=reason, text=completion.text)


def main(options: JudgeOptions) -> None:
    """Prints the reason and the verdict; exits with 1, and the text as written, when there is no verdict in it."""
    engine_options = {field.name: getattr(options, field.name) for field in dataclasses.fields(EngineOptions)}
    with _running:
        judgment = judge(
            question=options.question, answer_1=options.answer_1, answer_2=options.answer_2, **engine_options
        )
    if judgment.verdict is None:
        print(judgment.text)
        sys.exit("no verdict in this text")
    print(f"reason: {judgment.reason}\nbetter answer: {judgment.verdict}")


if __name__ == "__main__":
    run_command(main, JudgeOptions, __doc__)
