"""A row as records of one kind, by a column map (`columns.py`): a pair, two answers with a label, or several with scores.

Of several answers, the best (the first of them, where more than one is) makes a pair with each that is strictly lower.
A row that breaks its layout is an InputError; one that states no preference is a record that says why.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from statistics import fmean

from conj import InputError
from conj.data.columns import ANSWERS, Cells, Layout, holds, is_texts, missing
from conj.data.fates import Fates
from conj.data.files import listed
from conj.data.rows import (
    Answer,
    Preference,
    as_question,
    is_transcript,
    join_question,
    read_side,
    read_turns,
    same_question,
    swapped,
    undump,
    with_history,
    with_system,
    with_tools,
)

STYLES = ("concise", "detailed", "markdown")  # of RM-Bench's answers, from plain to rich
STYLE_CELLS = [  # "easy/detailed-concise" and the like: the better answer's style, then the worse one's
    f"{'easy' if i > j else 'hard' if i < j else 'normal'}/{better}-{worse}"
    for (i, better), (j, worse) in product(enumerate(STYLES), repeat=2)
]
NO_SCORE = ("", "n/a", "na", "none", "nan")


def read_records(layout: Layout, row: dict, where: str, fates: Fates, labels: set) -> list[Preference]:
    """The records of one row, which stands at `where`; `fates` gets what nothing was made of, `labels` the row's label.
    Raises InputError."""
    cells = Cells(layout, row)
    asked = _asked(cells)
    made = list(_grid(cells, asked) if layout.grid else BY_KIND[layout.kind](cells, asked))
    if "label" in cells.values:
        labels.add(cells.values["label"])
    subset, own_id = cells.get_only("subset", str) or "", cells.get_only("id", str | int)
    for name, value, known in cells.unread():
        if known:
            fates.not_needed[name] += 1
        else:
            fates.leave(name, where, value)
    for fate, number in cells.counts.items():
        fates.add(fate, where, number)
    if layout.grid:
        return [replace(record, where=where, own_id=own_id, subset=f"{subset}/{record.subset}") for record in made]
    return [replace(record, where=where, own_id=own_id, subset=record.subset or subset) for record in made]


Side = tuple[list[dict], Answer | None]  # what stands before an answer, and the answer


def _pair(cells: Cells, asked: list[dict]) -> Iterator[Preference]:
    """`better` and `worse` as texts, messages or conversations, which may open with the question themselves."""
    better, worse = cells.get("better"), cells.get("worse")
    if not cells.has("question") and isinstance(better, str) and isinstance(worse, str) and not is_transcript(better):
        asked, better, worse = _common_start(cells, better, worse)
    record = _record(cells, asked, _side(cells, "better", better), _side(cells, "worse", worse))
    if cells.has("score_better") and cells.has("score_worse"):
        high, low = (_number(cells.get(target)) for target in ("score_better", "score_worse"))
        if record.unusable is None and high is not None and low is not None and high <= low:
            record = replace(record, unusable="tie" if high == low else "scores_contradict")
    yield record


def _two(cells: Cells, asked: list[dict]) -> Iterator[Preference]:
    """Two answers and one label, or one of each subset."""
    first, second = cells.get("answer_1"), cells.get("answer_2")
    if cells.layout.turns_as_json:
        first, second = (_interleave(cells.get("question"), answers) for answers in (first, second))
    first, second = _side(cells, "answer_1", first), _side(cells, "answer_2", second)
    for subset, (label, votes) in _labels(cells).items():
        sides = (second, first) if label == 2 else (first, second)
        record = _record(cells, asked, *sides, subset=subset, place=2 if label == 2 else 1)
        yield replace(record, votes=votes, unusable=record.unusable or (None if label else "tie"))


def _labels(cells: Cells) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By subset ("" for the row's own): which answer is better, 0 for a tie; and each annotator's choice of better and worse."""
    layout = cells.layout
    if layout.labels:
        return {subset: (_member(cells.take(column), column, layout), ()) for subset, column in layout.labels.items()}
    if "votes" in layout.paths:
        votes = tuple(_member(vote, "votes", layout) for vote in cells.get_all("votes"))
        if not votes:
            raise InputError("expected votes, found none")
        label, count = Counter(votes).most_common(1)[0]  # no majority states no preference, nor does one for a tie
        label = label if count > len(votes) / 2 else 0
        return {"": (label, tuple(swapped(vote) for vote in votes) if label == 2 else votes)}
    if "score_1" in layout.paths:
        first, second = (_number(cells.get(target)) for target in ("score_1", "score_2"))
        if first is None or second is None:
            raise InputError("expected two scores, found one or none")
        return {"": (1 if first > second else 2 if second > first else 0, ())}
    return {"": (_member(cells.get("label"), layout.paths["label"][0], layout), ())}


def _ranked(cells: Cells, asked: list[dict]) -> Iterator[Preference]:
    """Several answers: the best against each that is strictly lower."""
    answers, scores = _scored(cells)
    sides = [_side(cells, ANSWERS[cells.layout.kind][0], answer) for answer in answers]
    order = [i for i, side in enumerate(sides) if side[1] is not None and scores[i] is not None]
    cells.counts["rows_of_several_answers"] += 1
    if len(order) < 2:
        yield _record(cells, asked, ([], None), ([], None))
        return
    best = max(order, key=lambda i: scores[i])  # the first of them
    lower = [i for i in order if scores[i] < scores[best]]
    cells.counts["pairs_of_several_answers"] += len(lower)
    cells.counts["answers_not_paired"] += len(answers) - len(lower) - 1
    if not lower:
        yield replace(_record(cells, asked, sides[order[0]], sides[order[1]]), unusable="tie")
    for i in lower:
        yield _record(cells, asked, sides[best], sides[i], place=1 if best < i else 2)


def _scored(cells: Cells) -> tuple[list, list[float | None]]:
    """Answers and their scores, the higher the better."""
    if cells.layout.kind == "sorted":
        betters, worses = (_list(cells.get(target), target) for target in ("betters", "worses"))
        return betters + worses, [1.0] * len(betters) + [0.0] * len(worses)
    target = "scores" if "scores" in cells.layout.paths else "ranks"
    answers, found = _list(cells.get("answers"), "answers"), _list(cells.get(target), target)
    if len(found) != len(answers):
        raise InputError(f"expected {target} of {len(answers)} answers, found {len(found)}")
    scores = [_number(score) for score in found]
    return answers, scores if target == "scores" else [None if rank is None else -rank for rank in scores]


def _grid(cells: Cells, asked: list[dict]) -> Iterator[Preference]:
    """RM-Bench's three chosen × three rejected: concise, detailed, detailed in markdown. Hard: the worse one looks richer."""
    betters, worses = cells.get("better"), cells.get("worse")
    if not (is_texts(betters) and is_texts(worses) and len(betters) == len(worses) == len(STYLES)):
        raise InputError(
            "expected three texts each in chosen and rejected, as RM-Bench has; lists of others need "
            "--columns question=prompt betters=chosen worses=rejected"
        )
    for (better, worse), cell in zip(product(betters, worses), STYLE_CELLS):
        yield replace(_record(cells, asked, ([], better), ([], worse)), subset=cell)


BY_KIND = {"pair": _pair, "two": _two, "ranked": _ranked, "sorted": _ranked}


def _asked(cells: Cells) -> list[dict]:
    """The turns of the question's own columns; none where the answers' conversations open with it."""
    value = None if cells.layout.turns_as_json else cells.get("question")
    asked = [] if missing(value) else read_turns(value, "user", cells.left, cells.column("question"))
    if len(asked) > 1 and asked[-1] == {"role": "assistant", "content": ""}:
        asked = asked[:-1]  # the answer that is still to come
    around = [text for text in cells.get_all("context") if holds(text)]
    if around or (cells.layout.ask and asked):
        *before, last = asked or [{"role": "user", "content": ""}]
        texts = [text for text in (cells.layout.ask, last["content"], *around) if holds(text)]
        if not all(isinstance(text, str) for text in texts):
            kinds = listed([type(text).__name__ for text in texts if not isinstance(text, str)])
            raise InputError(f"expected a question of text, found {kinds}")
        asked = [*before, {"role": last["role"], "content": "\n\n".join(texts)}]
    return with_system(with_history(asked, cells.get("history"), cells.left), cells.get("system"))


def _record(cells: Cells, asked: list[dict], better: Side, worse: Side, subset: str = "", place: int = 1) -> Preference:
    """A record of two answers that are to the same question, or one that says that they are not."""
    answers = (better[1], worse[1])
    if better[0] and asked == [{"role": "user", "content": ""}]:
        asked = []  # an empty cell is no question where the conversation opens with one
    question, other = (join_question(asked, opening, answers) for opening in (better[0], worse[0]))
    differ = None in (question, other) or not same_question(question, other)
    question = with_tools(question or asked or better[0], cells.get("tools"))
    if not question and not cells.has("question"):
        raise InputError("missing column prompt or conversations (chosen does not open with the question)")
    is_whole = bool(question) and not any(missing(turn["content"]) for turn in question)
    no_question = not is_whole or question[-1]["role"] == "assistant"
    reasons = {"no_answer": None in answers, "two_questions": differ, "no_question": no_question}
    unusable = next((reason for reason, holds_here in reasons.items() if holds_here), None)
    better, worse = ("" if answer is None else answer for answer in answers)
    return Preference(
        question=as_question(question) if is_whole else "", better=better, worse=worse, subset=subset,
        unusable=unusable, place=place,
    )  # fmt: skip


def _side(cells: Cells, target: str, value) -> Side:
    if missing(value):
        return [], None
    turn = _number(cells.get("turn"))  # a conversation may go on after the answer that was judged
    num_answers = int(turn) if turn is not None and turn.is_integer() else None
    return read_side(value, cells.left, cells.column(target), num_answers)


def _common_start(cells: Cells, better: str, worse: str) -> tuple[list[dict], str, str]:
    """A question that both texts open with, up to the last white space before they part; none where a column is unread,
    which may be the question."""
    parting = next((place for place, (a, b) in enumerate(zip(better, worse)) if a != b), min(len(better), len(worse)))
    start = better[: max((space.end() for space in re.finditer(r"\s", better[:parting])), default=0)]
    if not start.strip() or any(not known for _, _, known in cells.unread()):
        return [], better, worse
    cells.counts["questions_from_a_common_start"] += 1
    return [{"role": "user", "content": start.strip()}], better[len(start) :], worse[len(start) :]


def _interleave(questions, answers) -> list[dict]:
    """A conversation of two JSON lists of texts, what was asked and what was answered."""
    questions, answers = (_list(undump(texts), "turns") for texts in (questions, answers))
    if len(questions) != len(answers) or not questions:
        raise InputError(f"expected as many answers as questions, found {len(answers)} and {len(questions)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in zip(questions, answers) for role, text in zip(roles, pair)]


def _list(value, what: str) -> list:
    if not isinstance(value, list):
        raise InputError(f"expected a list of {what}, found {type(value).__name__}")
    return value


def _member(value, column: str, layout: Layout) -> int:
    """Which answer a label says is better, 0 for neither. A number may be written as a text."""
    allowed = (*layout.tie, *layout.first, *layout.second)
    if isinstance(value, str) and value not in allowed and re.fullmatch(r"\s*-?[0-9]\s*", value):
        value = int(value)
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"expected {column} to be one of {', '.join(map(str, allowed))}; found {value!r}")
    return 0 if value in layout.tie else 1 if value in layout.first else 2


def _number(value) -> float | None:
    """A score; of a list of them, the mean. None where there is none."""
    if isinstance(value, list | dict):
        scores = [_number(item) for item in (value.values() if isinstance(value, dict) else value)]
        return fmean(score for score in scores if score is not None) if any(s is not None for s in scores) else None
    if missing(value) or (isinstance(value, str) and value.strip().casefold() in NO_SCORE):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"expected a score that is a number, found {str(value)[:40]!r}") from None
