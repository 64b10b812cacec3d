"""Which prompts share a step, where a step has fewer prompts than packs: those whose pieces are of like length.

Every pack waits for the fullest of its turn, and each encodes one prompt at least. So a step's prompts must be cut, and
into pieces that are as even as can be. A random step is not: a long prompt alone can be longer than a pack's share. Here
prompts that are drawn at random for a pool of steps are sorted into them: a step takes prompts whose pieces, whole, in
halves or in thirds, come out equally long; then prompts change places between steps wherever that shortens the fullest.
The order of steps stays random, and every pair comes once an epoch. What is given up: prompts of a step are of like
length (docs/performance.md says how much). Only data, seed and options decide, never the number of ranks.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

STEPS_IN_POOL = 64  # more: prompts fit better, and are more alike; fewer: the opposite
NUM_TRIED = 24  # prompts that a step looks at for its exact number of pairs, before it takes a part of one
SLACK = 1.0  # pairs by which a prompt, and what it leaves of a step, may be more than the share of so many packs
NUM_TRADES = 120  # tried for each step
NEAR = 20  # steps: those of a pool are in order of length, and trade with their neighbours
TWO_AT_ONCE = 0.4  # share of trades that take two prompts of a step


class Prompt(NamedTuple):
    """Pairs of one prompt, or of a question's two, and what they take in packs."""

    pairs: list[int]
    largest: list[
        int
    ]  # [c - 1]: tokens of the largest piece, where the pairs are cut into c that are as even as can be


def measure(pairs: list[int], prompt_tokens: int, judgment_tokens: Sequence[int], most: int) -> Prompt:
    """The pairs of a prompt, cut into up to `most` pieces: the longest judgments first, each to the shortest piece."""
    lengths, largest = sorted((judgment_tokens[pair] for pair in pairs), reverse=True), []
    for count in range(1, min(len(pairs), most) + 1):
        pieces = [0] * count
        for length in lengths:
            pieces[pieces.index(min(pieces))] += length
        largest.append(prompt_tokens + max(pieces))
    return Prompt(pairs, largest)


def cuts(prompts: list[Prompt]) -> Iterator[tuple[int, int]]:
    """Tokens of the largest piece and the place of its prompt: with a piece for each prompt, then with one more at a time, where
    the prompt of the largest is cut further, until that has no more pairs to part."""
    sizes, copies = [prompt.largest[0] for prompt in prompts], [1] * len(prompts)
    while True:
        longest = max(sizes)
        place = sizes.index(longest)
        yield longest, place
        largest = prompts[place].largest
        if copies[place] == len(largest):
            return
        sizes[place] = largest[copies[place]]
        copies[place] += 1


def together(prompts: list[Prompt], most: int) -> Prompt:
    """Prompts that stay together as if they were one: in one piece, or each in its own and the largest cut further."""
    whole = [sum(prompt.largest[0] for prompt in prompts)] * (len(prompts) - 1)
    parted = [longest for longest, _ in islice(cuts(prompts), max(0, most - len(whole)))]
    return Prompt([pair for prompt in prompts for pair in prompt.pairs], whole + parted)


def fullest(step: list[Prompt], num_packs: int) -> tuple[int, int]:
    """Tokens of the fullest of a step's packs, and the place of the prompt with the largest piece. Where there are fewer
    prompts than packs, whichever has that is cut into one more, until there is a piece for each; where there are more, they
    go to the emptiest pack, the longest first."""
    if len(step) <= num_packs:
        *_, last = islice(cuts(step), num_packs - len(step) + 1)
        return last
    sizes, packs = [prompt.largest[0] for prompt in step], [0] * num_packs
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for i in order:
        heapq.heapreplace(packs, packs[0] + sizes[i])
    return max(packs), order[0]


def compose_steps(
    groups: list[list[int]],
    measured: Callable[[list[int]], Prompt],
    *,
    pairs_per_step: int,
    num_packs: int,
    rng: random.Random,
) -> list[list[int]]:
    """Steps of exactly `pairs_per_step` pairs, the last of what is left, from prompts' pairs in random order, none more than a
    step's. `num_packs`: the packs of a step."""
    steps, pool, size = [], [], 0
    for number, group in enumerate(groups, 1):
        pool.append(measured(group))
        size += len(group)
        if size >= STEPS_IN_POOL * pairs_per_step or number == len(groups):
            composed, pool = _sort_into_steps(pool, measured, size // pairs_per_step, pairs_per_step, num_packs)
            _trade(composed, num_packs, rng)
            steps += [[pair for prompt in step for pair in prompt.pairs] for step in composed]
            size %= pairs_per_step
    rng.shuffle(steps)
    return steps + ([[pair for prompt in pool for pair in prompt.pairs]] if pool else [])


def _sort_into_steps(
    pool: list[Prompt], measured: Callable, num_steps: int, pairs_per_step: int, num_packs: int
) -> tuple[list[list[Prompt]], list[Prompt]]:
    """Steps of the pool's prompts, longest pieces first, and what is left of them."""
    waiting = [(-prompt.largest[0], number, 1) for number, prompt in enumerate(pool)]  # a heap; the last: pieces
    heapq.heapify(waiting)
    steps = [_take_step(pool, waiting, measured, pairs_per_step, num_packs) for _ in range(num_steps)]
    return steps, [pool[number] for _, number, _ in sorted(waiting)]


def _take_step(pool: list[Prompt], waiting: list, measured: Callable, pairs: int, packs: int) -> list[Prompt]:
    """The next `pairs` pairs of those that wait, for `packs` packs: from the longest piece down, those that keep the pairs a
    pack that are still to come near what they were. A prompt of too many waits again, cut into one piece more. The last
    one is cut to size if none fits; the rest of it waits."""
    step, pairs_a_pack = [], pairs / packs
    while pairs:
        tried, taken = [], None
        while waiting and taken is None and len(tried) < NUM_TRIED:
            _, number, pieces = entry = heapq.heappop(waiting)
            count, largest = len(pool[number].pairs), pool[number].largest
            goes_on = count < pairs and pieces < packs and pairs - count <= pairs_a_pack * (packs - pieces) + SLACK
            if packs > 1 and pieces < len(largest) and count > pairs / packs * pieces + SLACK:
                heapq.heappush(waiting, (-largest[pieces], number, pieces + 1))
            elif goes_on or (count == pairs and pieces == packs):
                taken = entry
            else:
                tried.append(entry)
        _, number, pieces = taken or tried.pop(0)
        prompt, packs = pool[number], max(1, packs - pieces)
        if len(prompt.pairs) > pairs:
            prompt, rest = measured(prompt.pairs[:pairs]), measured(prompt.pairs[pairs:])
            heapq.heappush(waiting, (-rest.largest[0], len(pool), 1))
            pool.append(rest)
        step.append(prompt)
        pairs -= len(prompt.pairs)
        for entry in tried:
            heapq.heappush(waiting, entry)
    return step


def _trade(steps: list[list[Prompt]], num_packs: int, rng: random.Random) -> None:
    """Prompts change places between two steps, as many pairs for as many, wherever their fullest packs get shorter."""
    longest = [fullest(step, num_packs) for step in steps]
    for _ in range(NUM_TRADES * len(steps)):
        first = int(rng.random() * len(steps))
        second = first - NEAR + int(rng.random() * (2 * NEAR + 1))
        if first == second or not 0 <= second < len(steps):
            continue
        traded = _draw_trade(steps[first], steps[second], longest[first][1], rng)
        if traded is None:
            continue
        before, after = longest[first][0] + longest[second][0], fullest(traded[0], num_packs)
        if after[0] < before:
            other = fullest(traded[1], num_packs)
            if after[0] + other[0] <= before:
                steps[first], steps[second], longest[first], longest[second] = *traded, after, other


def _draw_trade(
    step: list[Prompt], other: list[Prompt], fullest: int, rng: random.Random
) -> tuple[list[Prompt], list[Prompt]] | None:
    """Both steps after one or two prompts of `step`, most often that of its fullest pack, were changed for one or two of `other`
    that have as many pairs; None if there are none."""
    one = fullest if rng.random() < 0.75 else int(rng.random() * len(step))
    two = int(rng.random() * len(step)) if rng.random() < TWO_AT_ONCE else one
    given = [step[one]] if one == two else [step[one], step[two]]
    wanted = sum([len(prompt.pairs) for prompt in given])
    got, kept = [], other.copy()
    if one != two:
        got.append(kept.pop(int(rng.random() * len(kept))))
        wanted -= len(got[0].pairs)
    if wanted:
        fitting = [place for place, prompt in enumerate(kept) if len(prompt.pairs) == wanted]
        if not fitting:
            return None
        got.append(kept.pop(fitting[int(rng.random() * len(fitting))]))
    return [prompt for place, prompt in enumerate(step) if place != one and place != two] + got, kept + given
