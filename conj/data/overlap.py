"""Which questions are the same, which pairs of answers come twice, and which training questions stand in a benchmark.

Two questions are the same when their normalised texts are: Unicode form (NFC), case and white space do not count, nor who
says a turn. A training question stands in a benchmark when

- its normalised text is that of a benchmark's question, with the system turns of each or without; or
- SAME_SHARE of the words of the shorter of the two, both without system turns (a data set has few, and long ones), stand in
  the other, in the same order and close together (with no more words between them than may be missing). So one may hold
  the other, and a few words may be changed, added or left out. This holds for questions of SHORTEST words and more:
  "What is the capital of Spain?" has one word that is not in "What is the capital of France?" and is another question.

A word is a run of letters and digits; where a script writes no spaces (Chinese, Japanese, Thai …) each character is one.
"""

import hashlib
import json
import re
import tempfile
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import NamedTuple

from conj.data.fates import Fates
from conj.data.files import dump_line
from conj.data.prompts import question_of

SHORTEST = 13  # words of a question that is compared by words; a shorter one by its whole text alone
SAME_SHARE = 0.85
NGRAM = 5  # words in a row that two questions have to share before they are compared
MOST_PLACES = 100  # of an n-gram in all benchmarks; one that stands in more places tells nothing
SPOOL_BYTES = 2**26  # of rows that wait in memory; more go to a temporary file

_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def normalised(question: str | list[dict]) -> str:
    """A question, or the contents of its turns, in NFC, case folded, every run of white space one space."""
    text = question if isinstance(question, str) else "\n".join(turn["content"] for turn in question)
    text = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())  # folding can take a letter apart again


# ---- Pairs that come twice ----


class Entry(NamedTuple):
    """A row of prompts.jsonl on its way there."""

    row: dict
    where: str  # in its source
    num_non_strings: int  # of its answers, those that were no texts


def drop_repeats(entries: Iterable[Entry], fates: Fates) -> Iterator[Entry]:
    """The entries without those that say again what an earlier one says (`left_out_duplicate`), and without any two that
    prefer different answers of the same two to the same question (`left_out_contradiction`): whichever of them is right,
    no judge can learn both.

    Questions are compared normalised, answers without white space around them. The whole is read before the first
    entry comes out, as the last row may contradict the first."""
    # Of each pair the number of its first entry, and which answer that prefers; None where another prefers the other one.
    firsts: dict[bytes, list] = {}
    against: dict[int, str] = {}  # number of an entry -> where the one stands that contradicts it
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        for number, entry in enumerate(entries):
            pair, preferred = _pair_of(entry.row)
            first = firsts.setdefault(pair, [number, preferred])
            if first[0] == number:
                spool.write(dump_line([number, *entry]).encode())
            elif first[1] in (preferred, None):
                fates.add("left_out_duplicate", entry.where)
            else:
                against[first[0]], first[1] = entry.where, None
        spool.seek(0)
        for line in spool:
            number, *entry = json.loads(line)
            entry = Entry(*entry)
            if number in against:
                fates.add("left_out_contradiction", f"{entry.where} and {against[number]}", 2)
            else:
                yield entry


def _pair_of(row: dict) -> tuple[bytes, bool]:
    """A hash of a row's question and its two answers in either order, and whether the better one is the first in a sorted
    order."""
    answers = [unicodedata.normalize("NFC", row[f"answer_{i}"]).strip() for i in (row["label"], 3 - row["label"])]
    content = json.dumps([normalised(question_of(row)), *sorted(answers)])
    return hashlib.sha256(content.encode()).digest()[:16], answers == sorted(answers)


# ---- Questions that stand in a benchmark ----


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A benchmark's question: its row's id, as in judgments of it, the benchmark or data set, and where the row stands."""

    id: str
    source: str
    where: str


@dataclass(kw_only=True)
class AskedQuestions:
    """The questions of benchmarks, so kept that one of them is found by its text or by most of its words."""

    rows: list[Asked] = field(default_factory=list)
    by_text: dict[str, Asked] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)  # of all questions of SHORTEST words or more, one after the other
    starts: list[int] = field(default_factory=list)  # where each of `rows` begins among `words`
    places: dict[int, list[int]] = field(default_factory=dict)  # hash of an n-gram -> where it begins among `words`
    found: list[dict] = field(default_factory=list)  # what `take_out` found: which row stands in which

    def add(self, question: str | list[dict], row: Asked) -> None:
        """Takes a question in; of several with one text the first stays."""
        text, asked = _with_and_without_system(question)
        if text in self.by_text or not text:
            return
        self.by_text[text] = row
        self.by_text.setdefault(asked, row)
        words = _WORD.findall(asked)
        if len(words) < SHORTEST:
            return
        self.rows.append(row)
        self.starts.append(len(self.words))
        for place, gram in enumerate(_ngrams(words), len(self.words)):
            self.places.setdefault(gram, []).append(place)
        self.words += words

    def take_out(self, question: str | list[dict], id: str, where: str) -> bool:
        """Whether a row's question is among these; which of them it is, is kept in `found`."""
        if there := self.find(question):
            row, share = there
            its = {"in": row.source, "its_id": row.id, "its_where": row.where, "share": share}
            self.found.append({"id": id, "where": where, **its})
        return there is not None

    def find(self, question: str | list[dict]) -> tuple[Asked, float] | None:
        """The benchmark's question that this one is, or holds, or is a part of, and the share of the shorter one's words
        that the other has: 1.0 for the same text. None if there is none."""
        text, asked = _with_and_without_system(question)
        if row := self.by_text.get(text) or self.by_text.get(asked):
            return row, 1.0
        words = _WORD.findall(asked)
        shares = {number: self._share(words, number, shifts) for number, shifts in self._alike(words).items()}
        best = max(shares, key=shares.get, default=None)
        return None if best is None or shares[best] < SAME_SHARE else (self.rows[best], round(shares[best], 3))

    def _alike(self, words: list[str]) -> dict[int, list[int]]:
        """Questions with enough n-grams of this one to be the same: for each its number, and of every n-gram by how many
        words it stands further on there."""
        if len(words) < SHORTEST:
            return {}
        found, num_common = {}, 0
        shared = [(place, gram) for place, gram in enumerate(_ngrams(words)) if gram in self.places]
        for place, gram in shared:
            if len(there := self.places[gram]) > MOST_PLACES:
                num_common += 1
                continue
            for other in there:
                number = bisect_right(self.starts, other) - 1
                found.setdefault(number, []).append(other - self.starts[number] - place)
        return {
            number: shifts
            for number, shifts in found.items()
            if len(shifts) + num_common >= _fewest_ngrams(min(len(words), len(self._words_of(number))))
        }

    def _words_of(self, number: int) -> list[str]:
        start = self.starts[number]
        return self.words[start : self.starts[number + 1] if number + 1 < len(self.starts) else None]

    def _share(self, words: list[str], number: int, shifts: Sequence[int]) -> float:
        """The share of the shorter question's words that stand in the other, in order, where most n-grams put it."""
        other, shift = self._words_of(number), Counter(shifts).most_common(1)[0][0]
        shorter, longer, shift = (words, other, shift) if len(words) <= len(other) else (other, words, -shift)
        slack = _most_missing(len(shorter))
        there = longer[max(0, shift - slack) : max(0, shift + len(shorter) + slack)]
        blocks = SequenceMatcher(None, shorter, there, autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks) / len(shorter)


def _with_and_without_system(question: str | list[dict]) -> tuple[str, str]:
    """The question normalised, and as if it had no system turn, unless nothing is left of it then."""
    text = normalised(question)
    turns = [] if isinstance(question, str) else [turn for turn in question if turn["role"] != "system"]
    return text, normalised(turns) or text


def _ngrams(words: list[str]) -> Iterator[int]:
    return map(hash, zip(*(words[i:] for i in range(NGRAM))))


def _most_missing(num_words: int) -> int:
    return int(num_words * (1 - SAME_SHARE))


def _fewest_ngrams(num_words: int) -> int:
    """How many n-grams are left, at least, of a question in which as many words are changed as may be."""
    return max(1, num_words - NGRAM + 1 - NGRAM * _most_missing(num_words))
