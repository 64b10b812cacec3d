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
from conj.data.judges import decoding_of, judge_in_folder, judge_prompt, load_judge
from conj.data.options import option, require, run_command
from conj.model.folder import JudgeModel, check_model
from conj.sample.engines.completion import Decoding, Request
from conj.sample.engines.vllm import EngineOptions, generate, running_engine
from conj.sample.stage import object_form, opens_thought


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EngineOptions):
    question: str = option(help="the question")
    answer_1: str = option(help="the first answer")
    answer_2: str = option(help="the second answer")
    judge: str | None = option(
        None,
        help="whose prompt, and how its judgments are read: a judge that conj ships, or a judge file; by default that of the "
        "model's folder, or the card's",
    )
    max_new_tokens: int | None = option(
        None, help="longest judgment, tokens; by default the judge's; less where the context leaves less"
    )
    structured_output: bool = option(
        False,
        help="the judgment is the judge's JSON object with a verdict, unless it is cut off; it cannot think first",
    )


@dataclass(frozen=True, kw_only=True)
class Judgment:
    verdict: int | None  # 1, 2, or None: the text states no verdict
    reason: str
    text: str  # as written


_running = contextlib.ExitStack()


@functools.lru_cache(maxsize=1)
def _start(
    options: EngineOptions, max_length: int | None, chat_template: str | None, structured: bool
) -> tuple[JudgeModel, object]:
    """The checked model and its engine, which stays up until another is asked for. Length and template are the judge's."""
    model = check_model(find_model(options.model), options.max_length or max_length, chat_template)
    _running.close()
    return model, _running.enter_context(running_engine(model, options, structured))


def judge(
    model: str | Path, question: str | list[dict], answer_1: str, answer_2: str, max_new_tokens: int | None = None,
    judge: str | None = None, structured_output: bool = False, **engine_options,
) -> Judgment:  # fmt: skip
    """Asks a model which answer is better, of a text or chat messages. `judge`: as whom it is asked, a shipped judge or a
    file, by default the folder's own or the card's; its decoding is taken. `structured_output`: see --help.
    `engine_options`: as in EngineOptions.

    Raises InputError for an unusable model folder or judge, or when the prompt leaves no room for a judgment."""
    options = EngineOptions(model=Path(model), **engine_options)
    own = None if judge else judge_in_folder(find_model(options.model))
    asked = own or load_judge(judge or "con-j")
    require(asked.backend == "vllm", f"--judge {judge}: is behind an endpoint; expected one whose model runs here")
    object_form(asked, structured_output)
    checked, engine = _start(options, asked.max_length, asked.chat_template, structured_output)
    opened = opens_thought(checked, asked)
    prompt_ids = checked.tokenizer.prompt_ids(judge_prompt(asked, question, answer_1, answer_2))
    room = checked.max_length - len(prompt_ids)
    if room < 1:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens, the context {checked.max_length}")
    decoding = Decoding(
        max_new_tokens=min(max_new_tokens or asked.max_new_tokens, room),
        object_form=object_form(asked, structured_output, opened),
        **decoding_of(asked),
    )
    [(_, completion)] = generate(engine, [Request(key={}, prompt_ids=prompt_ids)], checked, decoding)
    verdict, reason = asked.parse(completion.text, opened).value, asked.reason(completion.text, opened)
    return Judgment(verdict=verdict, reason=reason, text=completion.text)


def main(options: JudgeOptions) -> None:
    """Prints the reason and the verdict; exits with 1, and the text as written, when there is no verdict in it."""
    engine_options = {field.name: getattr(options, field.name) for field in dataclasses.fields(EngineOptions)}
    with _running:
        judgment = judge(
            question=options.question,
            answer_1=options.answer_1,
            answer_2=options.answer_2,
            judge=options.judge,
            structured_output=options.structured_output,
            **engine_options,
        )
    if judgment.verdict is None:
        print(judgment.text)
        sys.exit("no verdict in this text")
    print(f"reason: {judgment.reason}\nbetter answer: {judgment.verdict}")


if __name__ == "__main__":
    run_command(main, JudgeOptions, __doc__)
