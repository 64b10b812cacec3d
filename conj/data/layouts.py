"""The layouts of preference data, recognised by their columns (LAYOUTS): a row in, records of one kind out.

A row that breaks its layout is an InputError.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from conj import InputError

Answer = str | bool | int | float  # real data sets hold JSON booleans where a judge read "true"
STYLES = ("concise", "detailed", "markdown")  # of RM-Bench's answers, from plain to rich
STYLE_CELLS = [  # "easy/detailed-concise" and the like: the better answer's style, then the worse one's
    f"{'easy' if i > j else 'hard' if i < j else 'normal'}/{better}-{worse}"
    for (i, better), (j, worse) in product(enumerate(STYLES), repeat=2)
]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A question and its two answers; `unusable` says why a well-formed row states no preference."""

    question: str | list[dict]  # a text, or the chat messages up to the one to answer
    better: Answer
    worse: Answer
    subset: str = ""
    unusable: str | None = None  # "tie", "two_questions"
    place: int = 1  # which of the source's two answers the better one is, where the source numbers them
    votes: tuple[int, ...] = ()  # each annotator's: 1 for `better`, 2 for `worse`, 0 for a tie
    where: str = field(default="", compare=False)  # file and row, for messages and for subsets that file names tell


def _chosen_rejected(row: dict) -> Iterator[Preference]:
    """`chosen` and `rejected` as texts, messages or conversations, which may open with the question themselves."""
    if isinstance(row["chosen"], list) and all(isinstance(answer, str) for answer in row["chosen"]):
        yield from _rm_bench(row)
        return
    chosen, rejected = (_turns(row[column], "assistant") for column in ("chosen", "rejected"))
    asked = row["prompt"] if row.get("prompt") is not None else row.get("conversations")
    if asked is None and not chosen[:-1]:
        raise InputError("missing column prompt or conversations (chosen does not open with the question)")
    better, worse = (_answer(turns[-1]["content"]) for turns in (chosen, rejected))
    question = chosen[:-1]
    if asked is not None:  # `chosen` may open with the whole question, or go on from it
        asked = _turns(asked, "user")
        question = question if question[: len(asked)] == asked else asked + question
    scores = row["metadata"] if isinstance(row.get("metadata"), dict) else row
    is_tie = scores.get("score_chosen") is not None and scores["score_chosen"] == scores.get("score_rejected")
    yield Preference(
        question=_question(question), better=better, worse=worse, subset=_subset(row),
        unusable="two_questions" if chosen[:-1] != rejected[:-1] else "tie" if is_tie else None,
    )  # fmt: skip


def _rm_bench(row: dict) -> Iterator[Preference]:
    """Three chosen × three rejected answers: concise, detailed, detailed in markdown. Hard: the worse one looks richer."""
    if not (isinstance(row["rejected"], list) and len(row["chosen"]) == len(row["rejected"]) == len(STYLES)):
        raise InputError("expected three texts each in chosen and rejected")
    question = _question(_turns(row.get("prompt"), "user"))
    answers = product(map(_answer, row["chosen"]), map(_answer, row["rejected"]))
    for (better, worse), cell in zip(answers, STYLE_CELLS):
        yield Preference(question=question, better=better, worse=worse, subset=f"{_subset(row)}/{cell}")


def _pku_saferlhf(row: dict) -> Iterator[Preference]:
    """Two judgments of one pair of responses: which is better, which is safer."""
    for subset in ("better", "safer"):
        label = 1 + _member(row, f"{subset}_response_id", (0, 1))
        yield _labelled(row["prompt"], row["response_0"], row["response_1"], label, subset)


def _llmbar(row: dict) -> Iterator[Preference]:
    yield _labelled(row["input"], row["output_1"], row["output_2"], _member(row, "label", (0, 1, 2)), _subset(row))


def _judgebench(row: dict) -> Iterator[Preference]:
    label = ("A=B", "A>B", "B>A").index(_member(row, "label", ("A=B", "A>B", "B>A")))
    yield _labelled(row["question"], row["response_A"], row["response_B"], label, _subset(row))


def _pandalm(row: dict) -> Iterator[Preference]:
    """Three annotators; a tie (0) or no majority states no preference."""
    question = "\n\n".join(text for text in (_text(row["instruction"]), _text(row["input"])) if text)
    votes = tuple(_member(row, f"annotator{i}", (0, 1, 2)) for i in (1, 2, 3))
    label, count = Counter(votes).most_common(1)[0]
    record = _labelled(question, row["response1"], row["response2"], label if count > 1 else 0, _subset(row))
    yield replace(record, votes=tuple(swapped(vote) for vote in votes) if record.place == 2 else votes)


def _conj(row: dict) -> Iterator[Preference]:
    label = _member(row, "label", (0, 1, 2))
    asked = row["messages"] if "messages" in row else row["question"]
    yield _labelled(asked, row["answer_1"], row["answer_2"], label, _subset(row))


@dataclass(frozen=True)
class Layout:
    """Columns that a row of this layout must have, and what makes records of it."""

    name: str
    columns: tuple[str, ...]
    records: Callable[[dict], Iterable[Preference]]


LAYOUTS = (
    Layout("prompt or conversations, chosen, rejected", ("chosen", "rejected"), _chosen_rejected),
    Layout("PKU-SafeRLHF", ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"), _pku_saferlhf),
    Layout("LLMBar", ("input", "output_1", "output_2", "label"), _llmbar),
    Layout("JudgeBench", ("question", "response_A", "response_B", "label"), _judgebench),
    Layout("PandaLM", ("instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3"), _pandalm),
    Layout("conj", ("question", "answer_1", "answer_2", "label"), _conj),
    Layout("conj, multi-turn", ("messages", "answer_1", "answer_2", "label"), _conj),
)  # fmt: skip


def recognise(row: dict) -> Layout:
    """The layout of a row. Raises InputError when it is none of LAYOUTS."""
    for layout in LAYOUTS:
        if row.keys() >= set(layout.columns):
            return layout
    expected = "; ".join(f"{layout.name} ({', '.join(layout.columns)})" for layout in LAYOUTS)
    found = ", ".join(map(str, row)) or "none"
    raise InputError(f"columns {found} are of no known layout; expected one of: {expected}")


def _labelled(question, answer_1, answer_2, label: int, subset: str) -> Preference:
    """A record whose label is the better answer's number, or 0 for a tie."""
    better, worse = (answer_2, answer_1) if label == 2 else (answer_1, answer_2)
    return Preference(
        question=_question(_turns(question, "user")), better=_answer(better), worse=_answer(worse), subset=subset,
        unusable=None if label else "tie", place=2 if label == 2 else 1,
    )  # fmt: skip


def swapped(choice: int | None) -> int | None:
    """A choice between two answers (1, 2, 0 for a tie, None for none) when they are shown the other way round."""
    return 3 - choice if choice else choice


def _turns(value, role: str) -> list[dict]:
    """Chat messages of a text (one turn of `role`), a message or a list: of role and content, or of from and value."""
    if value == []:
        raise InputError("expected messages, found an empty list")
    if isinstance(value, list):
        return [_turn(message) for message in value]
    return [_turn(value) if isinstance(value, dict) else {"role": role, "content": value}]


def _turn(message) -> dict:
    roles = {"human": "user", "gpt": "assistant"}
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and isinstance(message.get(role), str) and content in message:
            return {"role": roles.get(message[role], message[role]), "content": message[content]}
    raise InputError(f"expected a message with role and content or from and value, found {str(message)[:60]!r}")


def _question(turns: list[dict]) -> str | list[dict]:
    """A lone user turn as its text, anything longer as messages: the same question is the same in every layout."""
    turns = [{**turn, "content": _text(turn["content"])} for turn in turns]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def _text(value) -> str:
    if not isinstance(value, str):
        raise InputError(f"expected a question of text, found {type(value).__name__}")
    return value


def _answer(value) -> Answer:
    if not isinstance(value, Answer):
        raise InputError(f"expected an answer of text, found {type(value).__name__}")
    return value


def _subset(row: dict) -> str:
    """The finest grouping a row names; "" if none."""
    named = (row.get(column) for column in ("subset", "domain", "task_category", "source"))
    return next((name for name in named if isinstance(name, str)), "")


def _member(row: dict, column: str, allowed: tuple):
    value = row[column]
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"expected {column} to be one of {', '.join(map(str, allowed))}; found {value!r}")
    return value
