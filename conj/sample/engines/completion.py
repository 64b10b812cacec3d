"""What an engine is given and what it gives: requests, completions, and how the next token is chosen."""

import bisect
import hashlib
import json
import math
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from conj.data.verdicts import CARD

NUM_TOP_LOGPROBS = 20  # the most that vLLM and the OpenAI API give
BESIDE_NAME = " \t\r\n▁\"'`*()[]{}<>:：,，.。;；"  # what one token may hold beside an answer's name


class ObjectForm(NamedTuple):
    """The JSON object that a judgment is: the keys of a reason and of 1 or 2, and how the reasons for 1 and for 2 begin, which
    an endpoint's schema does not say."""

    reason_key: str
    verdict_key: str
    reason_starts: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen. The defaults are greedy. None: not asked for; an endpoint does as it does by itself."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None  # 0: all tokens
    repetition_penalty: float | None = None
    seed: int = 0
    verdict_probability: bool = False  # asks for the likeliest tokens, and fills Completion.p_first
    verdict_place: tuple[str, str, str] = ("", "", "")  # with it, a judge's: where a judgment names the better answer
    thought: tuple[str, str] = CARD.thought  # put around what a server gives apart as such
    object_form: ObjectForm | None = None  # what is written is one such object
    needs_reason: bool = False  # of the object: the reason may not be left out; an endpoint's schema never lets it


@dataclass(frozen=True, kw_only=True)
class Request:
    """One judgment to be written; `key` names it within its file and is the start of its row."""

    key: dict
    prompt_ids: list[int] = field(default_factory=list)  # none where the prompt goes out as text
    hint: int | None = None  # the verdict that the prompt gives away
    begun: str = ""  # what of the assistant's turn is given; the prompt ends with it
    messages: list[dict] | None = None  # the chat messages of a prompt that goes out as text, over HTTP

    @property
    def name(self) -> str:
        return name_of(self.key)


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str  # control tokens are left out
    token_ids: list[int] | None  # as written, the end token included; over HTTP not known
    finish_reason: str  # stop, length, or what else a server says
    p_first: float | None = None  # probability that the first answer is better, if asked for and there is such a token
    prompt_tokens: int | None = None  # over HTTP, as the server counts them
    completion_tokens: int | None = None


Completions = Generator[tuple[Request, Completion]]  # each request with its completion, as it finishes
# Given the requests, which are made as they are asked for, and how many there are at most.
Complete = Callable[[Iterable[Request], int], Completions]


def name_of(key: dict) -> str:
    return json.dumps(list(key.values()))  # not a tuple: there true and 1 are one name, and a list is none


def request_seed(seed: int, key: dict) -> int:
    """The seed of one request, 63 bits: a hash of the stage's seed and the request's key."""
    digest = hashlib.sha256(json.dumps([seed, *key.values()]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def first_probability(
    text: str, place: tuple[str, str, str], num_tokens: int, length: Callable[[int], int],
    top: Callable[[int], list[tuple[str, float]]],
) -> float | None:  # fmt: skip
    """The probability that a judge gives to the answer shown first: p(1) / (p(1) + p(2)) at the token that names the
    better one in the last match of `place`, given all that it wrote before. None if no token does just that.

    `length(k)`: how many characters the first k tokens make. `top(i)`: text and logprob of token i and of the likeliest
    tokens in its place. Of an answer that none of these names, it is only known that it is no likelier than the last."""
    pattern, *names = place
    names = [name.casefold() for name in names]
    stated = [match[1] and (match.start(1), match[1].casefold()) for match in re.finditer(pattern, text)]
    if not stated or not stated[-1]:
        return None
    start, words = stated[-1]
    within = max(words.rfind(name) for name in names)
    token = bisect.bisect_right(range(num_tokens + 1), start + within, key=length) - 1
    if within < 0 or token == num_tokens:
        return None
    named = [(written.strip(BESIDE_NAME).casefold(), math.exp(logprob)) for written, logprob in top(token)]
    if named[0][0] not in names:
        return None
    bound = sorted((p for _, p in named), reverse=True)[:NUM_TOP_LOGPROBS][-1]
    first, second = (sum(p for written, p in named if written == name) or bound for name in names)
    return first / (first + second)
