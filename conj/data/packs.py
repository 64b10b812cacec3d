"""Tokenized pairs to packs: the plan of steps, best-fit-decreasing packs.

A judge's prompt is long and its judgments are short, so a prompt is encoded once and its judgments hang off it:
`prompt + sum of judgments` tokens, where separate sequences take `2 x pairs x prompt + sum of judgments`.
Which pairs a step takes depends on data, seed, epoch and options, never on the number of ranks: nothing here knows that
number, but for `deal`, which hands out packs that are made. Fill, balance and seconds at 400,000 pairs: scripts/bench_packing.py.
"""

import heapq
import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from conj import InputError
from conj.data.compose import Prompt, compose_steps, measure, together
from conj.data.rows import SWAPPED
from conj.data.tokens import TokenizedPairs

FEW_PROMPTS = 1.25  # a pack: of fewer, those that share a step decide how even its packs can be


def plan_steps(
    pairs: TokenizedPairs, members: list, *, pairs_per_step: int, share: str, seed: str, multiple: int = 1
) -> list[list[int]]:
    """One epoch: steps of exactly `pairs_per_step` pair numbers each (the last takes what is left).

    `share="prompt"` puts all pairs of a prompt into one step, and with them those of the same answers in the other order: of the
    two together no verdict is right more often than the other, and what a step learns is not that one of them is likelier.
    Shuffled prompts go first-fit into open steps, and only what then still leaves steps unfilled at the end of the epoch is
    joined and cut to size, prompts split if need be. The other modes shuffle pairs. Where that gives a step few prompts for
    `multiple` packs, prompts whose pieces are of like length share it instead (`compose_steps`). `seed` names run and epoch."""
    rng = random.Random(seed)
    groups = _group(pairs, members, share)
    num_prompts = len({pairs.prompt_of[pair] for pair in members}) if share == "prompt" else len(groups)
    if multiple > 1 and num_prompts * pairs_per_step < FEW_PROMPTS * multiple * len(members):

        def measured(part: list[int]) -> Prompt:
            by_prompt, tokens = _by(pairs.prompt_of.__getitem__, part), pairs.judgment_tokens
            prompts = [measure(of, copies_tokens(pairs, of[0], share), tokens, multiple) for of in by_prompt]
            return together(prompts, multiple)

        groups = [part for group in groups for part in _cut(group, pairs_per_step)]
        rng.shuffle(groups)
        return compose_steps(groups, measured, pairs_per_step=pairs_per_step, num_packs=multiple, rng=rng)
    if share != "prompt":
        return _cut(rng.sample(members, len(members)), pairs_per_step)
    rng.shuffle(groups)
    full: list[list[int]] = []
    begun: list[list[int]] = []  # steps in the order in which they were begun
    by_room: dict[int, list[int]] = {}  # pairs that still fit -> heap of the steps (places in `begun`) with that room
    for group in groups:
        for part in _cut(group, pairs_per_step):
            fitting = [(steps[0], room) for room, steps in by_room.items() if room >= len(part)]
            if fitting:
                first, room = min(fitting)
                heapq.heappop(by_room[room])
                if not by_room[room]:
                    del by_room[room]
            else:
                first, room = len(begun), pairs_per_step
                begun.append([])
            begun[first] += part
            room -= len(part)
            if room:
                heapq.heappush(by_room.setdefault(room, []), first)
            else:
                full.append(begun[first])
    rest = _cut([pair for step in begun if len(step) < pairs_per_step for pair in step], pairs_per_step)
    tail = [rest.pop()] if rest and len(rest[-1]) < pairs_per_step else []
    steps = full + rest
    rng.shuffle(steps)  # first-fit fills early steps with small groups; their order must not show that
    return steps + tail


def _group(pairs: TokenizedPairs, members: list, share: str) -> list[list[int]]:
    """The pairs that share a step: all of a question's prompts, or each alone."""
    if share != "prompt":
        return [[pair] for pair in members]
    both = {pairs.ids[pair].removesuffix(SWAPPED) for pair in members if pairs.ids[pair].endswith(SWAPPED)}

    def question(pair: int) -> str | int:
        name = pairs.ids[pair].removesuffix(SWAPPED)
        return name if name in both else pairs.prompt_of[pair]

    return _by(question, members)


def _by(key: Callable[[int], Hashable], members: list[int]) -> list[list[int]]:
    """Members of the same key together, in the order in which keys come up."""
    found = defaultdict(list)
    for member in members:
        found[key(member)].append(member)
    return list(found.values())


def _cut(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt and the pairs whose judgments hang off one copy of it. With `split`, each judgment has its own copy."""

    prompt: int
    pairs: list[int]
    split: bool = False


def copies_tokens(pairs: TokenizedPairs, pair: int, share: str) -> int:
    """Tokens that the prompt of a pair takes beside it: one copy, or with `share="none"` one for each judgment."""
    return pairs.prompt_tokens[pairs.prompt_of[pair]] * (2 if share == "none" else 1)


def group_tokens(pairs: TokenizedPairs, group: Group) -> int:
    """Tokens a group takes in a pack."""
    copies = 2 * len(group.pairs) if group.split else 1
    return copies * pairs.prompt_tokens[group.prompt] + sum(pairs.judgment_tokens[pair] for pair in group.pairs)


Piece = tuple[int, int, list[int]]  # a group being planned: its tokens, those of its prompt's copies, pair numbers
Packs = list[list[Piece]]


def plan_packs(
    pairs: TokenizedPairs, members: Sequence[int], *, max_tokens: int, share: str, multiple: int = 1
) -> list[list[Group]]:
    """Packs of at most `max_tokens` tokens that hold the pairs `members`, as even as can be, largest first.

    With `multiple=1` there are as few packs as best-fit-decreasing takes, and a prompt that fits a pack is never
    repeated: the fewest tokens in all, for one rank and for plans of so many packs that ranks are even anyway.
    Else their number is the smallest multiple of it that is enough (but never more packs than pairs), and a prompt's
    pairs are cut apart where that makes the largest pack smaller: the fewest tokens on the fullest of `multiple` ranks,
    for which the others wait, at the price of repeated prompts. A run keeps it on any number of ranks.
    A pair is never cut. Raises InputError for a pair that alone is over budget."""
    if not members:
        return []
    pieces, can_cut = _pieces(pairs, members, max_tokens, share), multiple > 1
    total = _tokens(pieces)

    def fill(capacity: int) -> Packs | None:
        return _fill(pieces, pairs.judgment_tokens, capacity, num_packs, can_cut)

    if can_cut:
        num_packs, packs = (total - 1) // max_tokens // multiple * multiple, None
        while packs is None:
            num_packs = min(num_packs + multiple, len(members))
            packs = fill(max_tokens)
    else:
        num_packs = len(pieces)
        num_packs = len(packs := fill(max_tokens))
    # The smallest capacity that is enough for so many packs makes them even. Bisection finds it to within 0.5 %.
    low, high = total // num_packs, max(map(_tokens, packs))
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        trial = fill(middle)
        if trial is None:
            low = middle
        else:
            packs, high = trial, max(map(_tokens, trial))
    if can_cut:
        _occupy(packs, num_packs, pairs.judgment_tokens)
    packs.sort(key=_tokens, reverse=True)
    return [
        [Group(prompt=pairs.prompt_of[part[0]], pairs=part, split=share == "none") for _, _, part in pack]
        for pack in packs
    ]


def _tokens(pack: list[Piece]) -> int:
    return sum(piece[0] for piece in pack)


def _pieces(pairs: TokenizedPairs, members: Sequence[int], max_tokens: int, share: str) -> list[Piece]:
    """What packs are filled with, largest first: single pairs, or a prompt's pairs, as many as fit a pack."""
    by_prompt: dict[int, list[Piece]] = {}
    for pair in members:
        copies, judgments = copies_tokens(pairs, pair, share), pairs.judgment_tokens[pair]
        if copies + judgments > max_tokens:
            raise InputError(
                f"pair of prompt {pairs.ids[pair]}: takes {copies + judgments} tokens, "
                f"--max-tokens-per-pack is {max_tokens}"
            )
        pieces = by_prompt.setdefault(pairs.prompt_of[pair], [])
        if share == "prompt" and pieces and pieces[-1][0] + judgments <= max_tokens:
            tokens, _, part = pieces[-1]
            part.append(pair)
            pieces[-1] = (tokens + judgments, copies, part)
        else:
            pieces.append((copies + judgments, copies, [pair]))
    return sorted((piece for pieces in by_prompt.values() for piece in pieces), key=lambda piece: -piece[0])


def _fill(pieces: list[Piece], judgment_tokens: list, capacity: int, num_packs: int, can_cut: bool) -> Packs | None:
    """At most `num_packs` packs of at most `capacity` tokens, or None: each piece goes where it leaves the least room.

    One that fits nowhere is cut, if it may be: the emptiest pack takes what pairs it can, and the others go on."""
    packs: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # of each pack: tokens that still fit, its number; ascending
    for tokens, copies, part in pieces:
        while part:
            place = bisect_left(rooms, (tokens, 0))
            if place == len(rooms) and len(packs) < num_packs and (not rooms or rooms[-1][0] < capacity):
                rooms.append((capacity, len(packs)))
                packs.append([])
            taken, taken_tokens, left = part, tokens, []
            if place == len(rooms) or rooms[place][0] < tokens:
                place = len(rooms) - 1
                taken, taken_tokens = [], copies
                for pair in part if can_cut else ():
                    fits = taken_tokens + judgment_tokens[pair] <= rooms[place][0]
                    (taken if fits else left).append(pair)
                    taken_tokens += judgment_tokens[pair] if fits else 0
                if not taken:
                    return None
            room, number = rooms.pop(place)
            insort(rooms, (room - taken_tokens, number))
            packs[number].append((taken_tokens, copies, taken))
            tokens, part = tokens - taken_tokens + copies, left
    return packs


def _occupy(packs: list[list[Piece]], num_packs: int, judgment_tokens: list[int]) -> None:
    """Adds packs up to `num_packs`, each from a piece, or half of the only piece, of the fullest pack.

    Where one long prompt sets the capacity, fewer packs are enough for the others; no rank need idle."""
    while len(packs) < num_packs:
        pack = max((pack for pack in packs if len(pack) > 1 or len(pack[0][2]) > 1), key=_tokens)
        packs.append([pack.pop()])
        if not pack:
            _, copies, part = packs[-1].pop()
            for half, place in ((part[::2], pack), (part[1::2], packs[-1])):
                place.append((copies + sum(judgment_tokens[pair] for pair in half), copies, half))


def pairs_of(packs: list[list[Group]]) -> list[int]:
    """Pair numbers in the order of the packs."""
    return [pair for pack in packs for group in pack for pair in group.pairs]


def deal(packs: list, rank: int, world_size: int) -> Iterator:
    """This rank's packs; None fills up, so that every rank runs the same number and no collective waits for ever."""
    for i in range(0, len(packs), world_size):
        yield packs[i + rank] if i + rank < len(packs) else None
