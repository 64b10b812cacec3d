"""Judges as files: what one is asked, with a hint or without, how its judgments are written and read, what it runs on. Every
stage takes one; judges/ beside this file holds those that conj ships, and a file of the same form is as good.

    system = ""                                         # no system message if not given
    user = "{question} … {answer_1} … {answer_2}"       # or: prompt = "con-j" or "english", the texts of that judge
    hint_1 = "Answer 1 is better. Say why. {question} … {answer_1} … {answer_2}"        # and hint_2, for stage 3
    roles = { system = "System: ", user = "User: ", assistant = "Assistant: ", tool = "Tool: " }    # before turns
    reason_key = "reason"                               # the judgment is JSON with these two keys, in which
    verdict_key = "better_answer"                       # 1, 2, "1" or "Answer 1" is a verdict
    answer_name = "Answer"
    reason_start = "Answer {verdict} is better than answer {other} because"     # every reason does, if given
    verdict_pattern = 'better: (A|B|neither)'           # or, in place of JSON, a regular expression
    verdicts = { A = 1, B = 2, neither = 0 }
    judgment = "{reason} better: {verdict}"             # how such a judgment is written, for stage 3
    thought = ["<think>", "</think>"]                   # what a model thinks before its judgment stands between these
    model = "someone/judge-7b"          # hub name, @REVISION too; over HTTP the model that the endpoint is asked for

What a file does not say is as in the card's judge, con-j. Text of other projects is not ours to ship: a [text] table names
the package that has it, of which constants are read and nothing is run, or the user names a file. Refused: unknown keys, a
judge without a text, a text without its places.
"""

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import tomli_w

from conj import InputError
from conj.data.files import brief, first_line
from conj.data.judge_keys import PLACES, TEXTS, check_keys
from conj.data.model_files import JUDGE_FILE
from conj.data.package_text import read_text, text_of_package
from conj.data.prompts import ROLES, question_text
from conj.data.verdicts import CARD, PARSERS, Form, Verdict, parse_reason, split_thought

FOLDER = Path(__file__).with_name("judges")
PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
QUOTES = "\"'“”‘’"
UNFINISHED = "unfinished"  # the rung of a text that ends within its thought
# What `prompt` takes from the judge that it names.
OF_PROMPT = ("system", *TEXTS, "roles", "reason_key", "verdict_key", "answer_name", "language", "judgment")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The keys of a judge's file. `verdicts`: what the pattern's first group matches, without case and white space, to 1
    (the first answer is better), 2 or 0 (a tie). Its decoding is that of judging; stages 2 and 3 take `max_new_tokens` of it."""

    name: str
    system: str | None = None  # "" is an empty message
    user: str | None = None
    hint_1: str | None = None  # asks why answer 1 is better
    hint_2: str | None = None
    roles: dict[str, str] = field(default_factory=lambda: dict(ROLES))
    language: Literal["zh", "en"] = "zh"  # of the attacks on it
    reason_key: str = CARD.reason_key
    verdict_key: str = CARD.verdict_key
    answer_name: str = CARD.answer_name
    reason_start: str | None = None  # of every reason; {verdict} and {other} name the better answer and the other one
    parser: Literal["strict", "released"] = "strict"
    verdict_pattern: str | None = None  # in place of the parser
    verdicts: dict[str, int] | None = None
    judgment: str | None = None  # with {reason} and {verdict}, where there is a pattern
    thought: tuple[str, str] = CARD.thought
    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int | None = None
    model: str | None = None
    backend: Literal["vllm", "openai"] = "vllm"
    chat_template: str | None = None  # Jinja, in place of the model folder's own
    max_length: int | None = None  # tokens
    prompt_dollars: float | None = None  # per million tokens
    completion_dollars: float | None = None

    @property
    def can_write(self) -> bool:
        """Whether it is known how its judgments are written."""
        return self.verdict_pattern is None or self.judgment is not None

    @cached_property
    def form(self) -> Form:
        """How its JSON is written, for the parsers."""
        return Form(self.reason_key, self.verdict_key, self.answer_name, self.thought)

    def answer(self, text: str, opened: bool = False) -> str | None:
        """What stands behind the thought; None if that is unfinished. `opened`: the prompt ends with its start mark."""
        return split_thought(text, self.thought, opened)[1]

    def parse(self, text: str, opened: bool = False) -> Verdict:
        """The verdict of a text, thought aside. With a pattern, its last match counts, also if it names no answer."""
        if self.verdict_pattern is None:
            verdict = PARSERS[self.parser](text, self.form, opened)
        else:
            matched = self._matches(text, opened)
            value = self._values.get(_squash(matched[-1][1] or "")) if matched else None
            verdict = Verdict(value, "none" if value is None else "pattern")
        unfinished = verdict.value is None and self.answer(text, opened) is None
        return Verdict(None, UNFINISHED) if unfinished else verdict

    def reason(self, text: str, opened: bool = False) -> str:
        """The reason of a judgment that `parse` can read; "" if there is none. With a pattern, what stands before it."""
        if self.verdict_pattern is None:
            return parse_reason(text, self.form, opened)
        matched = self._matches(text, opened)
        return matched[-1].string[: matched[-1].start()].strip() if matched else ""

    def _matches(self, text: str, opened: bool) -> list[re.Match]:
        answer = self.answer(text, opened) or ""
        return [] if self.thought[0] in answer else list(self._pattern.finditer(answer))  # a thought in mid line

    def attempts(self, answer: str) -> bool:
        """Whether a text is, or tries to be, a judgment as it is to be written, and no reason alone."""
        if self.verdict_pattern is not None:
            return self._pattern.search(answer) is not None
        keys = "|".join(map(re.escape, (self.reason_key, self.verdict_key)))
        return re.search(f"[{QUOTES}](?:{keys})[{QUOTES}]", answer) is not None

    @cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile(self.verdict_pattern)

    @cached_property
    def _values(self) -> dict[str, int]:
        return {_squash(text): value for text, value in self.verdicts.items()}

    def _verdict_name(self, verdict: int) -> str:
        if self.verdict_pattern is None:
            return str(verdict)
        return next(text for text, value in self.verdicts.items() if value == verdict)

    @property
    def reason_starts(self) -> tuple[str, str]:
        """How the reasons for the first and for the second answer begin; "" where the file does not say."""
        names = (self._verdict_name(1), self._verdict_name(2))
        return tuple(_fill(self.reason_start or "", {"verdict": a, "other": b}) for a, b in (names, names[::-1]))

    @property
    def verdict_place(self) -> tuple[str, str, str]:
        """Where a judgment first states its verdict, for Decoding: a regular expression, whose last match counts, and what tells
        its names of the first and the second answer apart."""
        if self.verdict_pattern is None and self.reason_start is not None:
            start = re.escape(json.dumps(self.reason_start, ensure_ascii=False)[1:-1])
            place = start.replace(r"\{verdict\}", "([12])", 1)
            return re.sub(r"\\{(verdict|other)\\}", "[12]", place), "1", "2"
        if self.verdict_pattern is None:
            key, answer = re.escape(self.verdict_key), re.escape(self.answer_name)
            return rf"""{key}["\']?\s*[:：]\s*["\']?(?:{answer}\s*)?([12])""", "1", "2"
        names = [self._verdict_name(answer) for answer in (1, 2)]
        while min(map(len, names)) > 1 and names[0][-1] == names[1][-1]:
            names = [name[:-1] for name in names]
        while min(map(len, names)) > 1 and names[0][0] == names[1][0]:
            names = [name[1:] for name in names]
        return self.verdict_pattern, *names

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What an endpoint takes for as many tokens; None if the file names no price."""
        if self.prompt_dollars is None or self.completion_dollars is None:
            return None
        return (prompt_tokens * self.prompt_dollars + completion_tokens * self.completion_dollars) / 1e6


def _squash(text: str) -> str:
    return "".join(text.split()).casefold()


# ---- What a judge is asked, and what it writes ----


def judge_prompt(
    judge: Judge, question: str | list[dict], answer_1: str, answer_2: str, hint: int | None = None
) -> list[dict]:
    """The chat messages that ask for a judgment; with `hint` (1 or 2), for the reason why that answer is better. One function
    writes them for every stage, so that sampling, training and evaluation see the same."""
    given = dict(zip(PLACES, (question_text(question, judge.roles), answer_1, answer_2)))
    user = _fill(judge.user if hint is None else (judge.hint_1, judge.hint_2)[hint - 1], given)
    system = [] if judge.system is None else [{"role": "system", "content": judge.system}]
    return [*system, {"role": "user", "content": user}]


def judgment_text(judge: Judge, reason: str | None, verdict: int) -> str:
    """A judgment as the judge writes it. None: the bare verdict, without a reason."""
    if judge.verdict_pattern is None:
        reasons = {} if reason is None else {judge.reason_key: reason}
        return json.dumps(reasons | {judge.verdict_key: verdict}, ensure_ascii=False)
    return _fill(judge.judgment, {"reason": reason or "", "verdict": judge._verdict_name(verdict)})


def _fill(text: str, given: dict[str, str]) -> str:
    """A text with its places filled in one pass: an answer may hold "{answer_2}"."""
    return re.sub("{(" + "|".join(given) + ")}", lambda place: given[place[1]], text)


def with_parser(judge: Judge, parser: str | None) -> Judge:
    """The judge whose JSON is read by another parser, if one is asked for. Raises InputError where a pattern reads it."""
    if parser is None:
        return judge
    if judge.verdict_pattern is not None:
        raise InputError(f"--parser: judge {judge.name} has a verdict_pattern of its own")
    return dataclasses.replace(judge, parser=parser)


def decoding_of(judge: Judge) -> dict:
    """What chooses its next token, where it is not greedy, by the names that everyone has for it."""
    given = {"temperature": judge.temperature, "top_p": judge.top_p, "top_k": judge.top_k} if judge.temperature else {}
    return {name: value for name, value in given.items() if value is not None}


def judge_file(judge: Judge) -> str:
    """The file of a judge for the models that were trained as it: it needs no other file, and names no model."""
    content = dataclasses.asdict(dataclasses.replace(judge, model=None))
    if judge.verdict_pattern is not None:
        del content["parser"]  # which reads nothing
    return tomli_w.dumps({name: value for name, value in content.items() if value is not None})


# ---- Files ----


def shipped_judges() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_judge(name_or_path: str, text_file: Path | None = None) -> Judge:
    """A shipped judge by its name, or a file's. `text_file` holds the user text, with {question}, {answer_1} and
    {answer_2} where they go, and takes the place of the judge's own.

    Raises InputError, naming file and key, for what cannot be a judge."""
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in shipped_judges() else Path(name_or_path)
    content = {"name": path.stem} | _read_toml(path)
    text = content.pop("text", None)
    if text_file is not None:
        content.pop("prompt", None)
        content["user"] = read_text(text_file).removesuffix("\n")  # the line break that ends every file
    elif text is not None:
        content |= text_of_package(text, PLACES, path)
    check_keys(content, path)
    if (prompt := content.pop("prompt", None)) is not None:
        if given := [key for key in OF_PROMPT if key in content]:
            raise InputError(f"{path}: expected prompt or {given[0]}, found both")
        shown = _read_toml(FOLDER / f"{prompt}.toml")
        content |= {key: shown[key] for key in OF_PROMPT if key in shown}
    if "parser" in content and "verdict_pattern" in content:
        raise InputError(f"{path}: expected parser or verdict_pattern, found both")
    if "thought" in content:
        content["thought"] = tuple(content["thought"])
    judge = Judge(**content)
    _check_texts(judge, path if text_file is None else text_file)
    _check_backend(judge, path)
    _check_pattern(judge, path)
    if judge.reason_start is not None:
        _check_reason_start(judge, path)
    return judge


def judge_in_folder(model: Path) -> Judge | None:
    """The judge that a model was trained as, if its folder holds one."""
    return load_judge(str(model / JUDGE_FILE)) if (model / JUDGE_FILE).exists() else None


def _read_toml(path: Path) -> dict:
    if path.suffix != ".toml":
        raise InputError(f"judge {path}: expected a .toml file or one of {', '.join(shipped_judges())}")
    try:
        return tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None


def _check_texts(judge: Judge, path: Path) -> None:
    if judge.user is None and path.parent != FOLDER:
        raise InputError(f"{path}: user: expected a text, or prompt = the name of a judge that has one; found neither")
    if judge.user is None:
        raise InputError(
            f"{path}: user: found no text; the prompt of {judge.name} is not ours to ship: put it into a file, with "
            "{question}, {answer_1} and {answer_2} where they go, and name that file"
        )
    if (judge.hint_1 is None) != (judge.hint_2 is None):
        raise InputError(f"{path}: expected hint_1 and hint_2, or neither")
    for name in TEXTS:
        if (text := getattr(judge, name)) is not None:
            found = PLACE.findall(text)
            if missing := [f"{{{place}}}" for place in PLACES if place not in found]:
                raise InputError(f"{path}: {name}: expected {', '.join(missing)} in the text, found none")
    if judge.thought[0] == judge.thought[1] or judge.reason_key == judge.verdict_key:
        raise InputError(f"{path}: expected two marks of a thought, and two keys of a judgment, that differ")
    if judge.parser == "released" and judge.verdict_key != Judge.verdict_key:
        raise InputError(f"{path}: parser: released reads {Judge.verdict_key} alone, found {judge.verdict_key}")


def _check_backend(judge: Judge, path: Path) -> None:
    if judge.backend == "openai":
        if judge.model is None:
            raise InputError(f"{path}: model: expected the name that the endpoint knows, found none")
        if given := [key for key in ("chat_template", "max_length") if getattr(judge, key) is not None]:
            raise InputError(f"{path}: {given[0]}: expected none with an endpoint, which has its own")
    if (judge.prompt_dollars is None) != (judge.completion_dollars is None):
        raise InputError(f"{path}: expected prompt_dollars and completion_dollars, or neither")


def _read_back(judge: Judge) -> list[int | None]:
    """How its own judgments for 1 and for 2 are read."""
    return [judge.parse(judgment_text(judge, "…", verdict)).value for verdict in (1, 2)]


def _check_reason_start(judge: Judge, path: Path) -> None:
    """Stage 3 reads a reason by itself: one that is taken for a judgment, another verdict or a thought is lost."""
    for verdict, start in zip((1, 2), judge.reason_starts):
        begun = f"{start} …"
        judgment = judgment_text(judge, begun, verdict) if judge.can_write else begun
        read = {judge.parse(text).value for text in (begun, judgment)} - {None, verdict}
        if read or judge.attempts(begun) or any(mark in start for mark in judge.thought):
            expected = "without a mark of a thought, and nothing that is read as a judgment or another verdict"
            raise InputError(f"{path}: reason_start: expected a text {expected}; found {brief(start)} for {verdict}")


def _check_pattern(judge: Judge, path: Path) -> None:
    if (judge.verdict_pattern is None) != (judge.verdicts is None):
        raise InputError(f"{path}: expected verdict_pattern and verdicts, or neither")
    if judge.verdict_pattern is None:
        if judge.judgment is not None:
            raise InputError(f"{path}: judgment: expected none without a verdict_pattern: it is JSON")
        if (read := _read_back(judge)) != [1, 2]:
            raise InputError(
                f"{path}: reason_key, verdict_key, thought: expected keys and marks with which its judgments for 1 and 2 are read "
                f"as such, found {brief(judgment_text(judge, '…', 1))}, read as {read[0]} and {read[1]}"
            )
        return
    try:
        if judge._pattern.groups != 1:
            raise InputError(f"{path}: verdict_pattern: expected one (group), found {judge._pattern.groups}")
    except re.error as e:
        raise InputError(f"{path}: verdict_pattern: expected a regular expression, found {first_line(e)}") from None
    if not {1, 2} <= set(judge.verdicts.values()):
        raise InputError(f"{path}: verdicts: expected texts for 1 and for 2, found {brief(judge.verdicts)}")
    if len(judge._values) < len(judge.verdicts):
        raise InputError(f"{path}: verdicts: expected texts that differ in more than case and spaces")
    if judge.judgment is not None:
        read = _read_back(judge)
        if "{reason}" not in judge.judgment or read != [1, 2]:
            raise InputError(
                f"{path}: judgment: expected a text with {{reason}} and {{verdict}} that verdict_pattern reads as 1 and 2, "
                f"found {brief(judge.judgment)}, read as {read[0]} and {read[1]}"
            )
