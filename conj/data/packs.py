"""Contrastive pairs to packs: token ids, the plan of steps, first-fit-decreasing packs.

A judge's prompt is long and its judgments are short, so a prompt is encoded once and its judgments hang off it:
`prompt + sum of judgments` tokens, where separate sequences take `2 x pairs x prompt + sum of judgments`.
The plan depends on data, seed and epoch alone, never on the number of ranks.
"""

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conj import InputError
from conj.data.prompts import JudgeTokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizedPairs:
    """N pairs as token ids. Pairs with the same prompt text hold the same prompt number."""

    ids: list[str]  # (N,) id of the prompt's record
    is_eval: list[bool]  # (N,) held out from training
    prompts: list[array]  # token ids of each distinct prompt
    prompt_of: list[int]  # (N,) row of `prompts`
    judgments: list[tuple[array, array]]  # (N,) chosen and rejected token ids, each with its end token

    def __len__(self) -> int:
        return len(self.ids)

    def num_tokens(self, pair: int) -> int:
        """Tokens of the prompt and the longer of its two judgments."""
        return len(self.prompts[self.prompt_of[pair]]) + max(map(len, self.judgments[pair]))

    def fingerprint(self) -> str:
        """sha256 over all token ids in row order."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            for ids in (self.prompts[self.prompt_of[i]], *self.judgments[i]):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()


def tokenize_pairs(rows: Sequence[dict], tokenizer: JudgeTokenizer, vocab_size: int) -> TokenizedPairs:
    """Tokenizes rows of `pairs.jsonl`. Raises InputError (row number) on messages of another shape and on ids that the
    model has no embedding for."""
    prompts, numbers, prompt_of, judgments = [], {}, [], []
    for i, row in enumerate(rows, 1):
        try:
            key = tuple((m["role"], m["content"]) for m in row["prompt"])
            (chosen,), (rejected,) = row["chosen"], row["rejected"]
            pair = tuple(array("i", tokenizer.completion_ids(m["content"])) for m in (chosen, rejected))
            if key not in numbers:
                prompts.append(array("i", tokenizer.prompt_ids(row["prompt"])))
                numbers[key] = len(prompts) - 1
        except (TypeError, KeyError, ValueError) as e:
            raise InputError(
                f"pairs.jsonl:{i}: expected prompt messages and one chosen and one rejected message, found {e!r}"
            ) from None
        prompt_of.append(numbers[key])
        judgments.append(pair)
        highest = max(max(prompts[numbers[key]]), *map(max, pair))
        if highest >= vocab_size:
            raise InputError(f"pairs.jsonl:{i}: token id {highest} is outside the model's vocabulary of {vocab_size}")
    return TokenizedPairs(
        ids=[row["id"] for row in rows],
        is_eval=[row.get("split") == "eval" for row in rows],
        prompts=prompts,
        prompt_of=prompt_of,
        judgments=judgments,
    )


def plan_steps(
    pairs: TokenizedPairs, members: list[int], *, pairs_per_step: int, share: str, seed: str
) -> list[list[int]]:
    """One epoch: steps of exactly `pairs_per_step` pair numbers each (the last takes what is left).

    `share="prompt"` puts all pairs of a prompt into one step: shuffled prompts go first-fit into open steps, and only
    what then still leaves steps unfilled at the end of the epoch is joined and cut to size, prompts split if need be.
    The other modes shuffle pairs. `seed` names run and epoch."""
    rng = random.Random(seed)
    if share != "prompt":
        order = rng.sample(members, len(members))
        return _cut(order, pairs_per_step)
    by_prompt: dict[int, list[int]] = {}
    for pair in members:
        by_prompt.setdefault(pairs.prompt_of[pair], []).append(pair)
    groups = list(by_prompt.values())
    rng.shuffle(groups)
    full, open_steps = [], []
    for group in groups:
        for part in _cut(group, pairs_per_step):
            step = next((s for s in open_steps if len(s) + len(part) <= pairs_per_step), None)
            if step is None:
                open_steps.append(step := [])
            step += part
            if len(step) == pairs_per_step:
                open_steps = [s for s in open_steps if s is not step]
                full.append(step)
    rest = _cut([pair for step in open_steps for pair in step], pairs_per_step)
    tail = [rest.pop()] if rest and len(rest[-1]) < pairs_per_step else []
    steps = full + rest
    rng.shuffle(steps)  # first-fit fills early steps with small groups; their order must not show that
    return steps + tail


def _cut(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt and the pairs whose judgments hang off one copy of it. With `split`, each judgment has its own copy."""

    prompt: int
    pairs: list[int]
    split: bool = False


def group_tokens(pairs: TokenizedPairs, group: Group) -> int:
    """Tokens a group takes in a pack. The last token of a judgment is only predicted, never read."""
    judgments = [ids for pair in group.pairs for ids in pairs.judgments[pair]]
    copies = len(judgments) if group.split else 1
    return copies * len(pairs.prompts[group.prompt]) + sum(len(ids) - 1 for ids in judgments)


def plan_packs(pairs: TokenizedPairs, members: Sequence[int], *, max_tokens: int, share: str) -> list[list[Group]]:
    """First-fit-decreasing packs of at most `max_tokens` tokens for the pairs of one step.

    A pair is never split between packs. Raises InputError for a pair that alone is over the budget."""
    groups: list[Group] = []
    filling: dict[int, tuple[Group, int]] = {}  # prompt -> its last group and that group's tokens
    for pair in members:
        prompt = pairs.prompt_of[pair]
        alone = Group(prompt=prompt, pairs=[pair], split=share == "none")
        cost = group_tokens(pairs, alone)
        if cost > max_tokens:
            raise InputError(
                f"pair of prompt {pairs.ids[pair]}: takes {cost} tokens, --max-tokens-per-pack is {max_tokens}"
            )
        extra = cost - len(pairs.prompts[prompt])
        if share == "prompt" and prompt in filling and filling[prompt][1] + extra <= max_tokens:
            group, tokens = filling[prompt]
            group.pairs.append(pair)
            filling[prompt] = (group, tokens + extra)
        else:
            groups.append(alone)
            filling[prompt] = (alone, cost)
    sized = sorted(((group_tokens(pairs, g), i) for i, g in enumerate(groups)), key=lambda x: (-x[0], x[1]))
    packs: list[tuple[int, list[Group]]] = []
    for tokens, i in sized:
        fit = next((j for j, (used, _) in enumerate(packs) if used + tokens <= max_tokens), None)
        if fit is None:
            packs.append((tokens, [groups[i]]))
        else:
            packs[fit] = (packs[fit][0] + tokens, packs[fit][1] + [groups[i]])
    return [pack for _, pack in packs]


def count_pairs(packs: list[list[Group]]) -> int:
    return sum(len(group.pairs) for pack in packs for group in pack)


def deal(packs: list, rank: int, world_size: int) -> Iterator:
    """This rank's packs; None fills up, so that every rank runs the same number and no collective waits for ever."""
    for i in range(0, len(packs), world_size):
        yield packs[i + rank] if i + rank < len(packs) else None
