"""The plan: which pairs make a step, which packs hold them, and that neither loses, repeats or splits anything."""

from collections import Counter

import pytest
from conftest import random_pairs

from conj import InputError
from conj.data.packs import deal, group_tokens, plan_packs, plan_steps, tokenize_pairs
from conj.data.prompts import JudgeTokenizer


@pytest.fixture(scope="module")
def pairs(tied_model):
    return tokenize_pairs(random_pairs(90, max_pairs=5), JudgeTokenizer.load(tied_model), 600)


@pytest.mark.parametrize("share", ["none", "pair", "prompt"])
def test_an_epoch_holds_every_pair_once_in_steps_of_exact_size(share, pairs):
    """The loss is a mean over exactly the pairs of a step: a short or long step would change their weight."""
    steps = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share=share, seed="0")
    assert sorted(pair for step in steps for pair in step) == list(range(len(pairs)))
    assert {len(step) for step in steps[:-1]} == {24}
    assert 1 <= len(steps[-1]) <= 24


def test_share_prompt_keeps_a_prompts_pairs_in_one_step(pairs):
    """Only the end of an epoch may split a prompt, to keep the steps' size exact."""
    steps = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="prompt", seed="0")
    places = {(pairs.prompt_of[pair], i) for i, step in enumerate(steps) for pair in step}
    num_split = sum(count - 1 for count in Counter(prompt for prompt, _ in places).values())
    assert num_split <= 2
    shuffled = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=24, share="pair", seed="0")
    assert len({(pairs.prompt_of[pair], i) for i, step in enumerate(shuffled) for pair in step}) > 2 * len(places) * 0.6


def test_the_plan_follows_from_the_seed(pairs):
    plans = [
        plan_steps(pairs, list(range(len(pairs))), pairs_per_step=8, share="prompt", seed=seed)
        for seed in ("0", "0", "1")
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("share", ["none", "pair", "prompt"])
def test_packs_hold_every_pair_once_within_the_budget(share, pairs):
    packs = plan_packs(pairs, range(60), max_tokens=1200, share=share)
    assert sorted(pair for pack in packs for group in pack for pair in group.pairs) == list(range(60))
    assert all(sum(group_tokens(pairs, group) for group in pack) <= 1200 for pack in packs)


def test_sharing_saves_the_tokens_it_says(pairs):
    """k pairs of a prompt cost one copy of it when shared by all, k by the pair, 2k by none."""
    members = [i for i in range(len(pairs)) if pairs.prompt_of[i] == pairs.prompt_of[0]]
    prompt, k = len(pairs.prompts[pairs.prompt_of[0]]), len(members)
    judgments = sum(len(j) - 1 for i in members for j in pairs.judgments[i])
    for share, copies in (("prompt", 1), ("pair", k), ("none", 2 * k)):
        (pack,) = plan_packs(pairs, members, max_tokens=100_000, share=share)
        assert sum(group_tokens(pairs, group) for group in pack) == copies * prompt + judgments


def test_a_pair_over_the_budget_is_refused_by_name(pairs):
    with pytest.raises(InputError, match="p000.*--max-tokens-per-pack is 50"):
        plan_packs(pairs, [0], max_tokens=50, share="prompt")


def test_every_rank_runs_the_same_number_of_packs():
    dealt = [list(deal(["a", "b", "c", "d", "e"], rank, 3)) for rank in range(3)]
    assert dealt == [["a", "d"], ["b", "e"], ["c", None]]


def test_a_token_outside_the_vocabulary_is_refused(tied_model):
    with pytest.raises(InputError, match="pairs.jsonl:1: token id .* vocabulary of 100"):
        tokenize_pairs(random_pairs(1), JudgeTokenizer.load(tied_model), 100)


def test_messages_of_another_shape_are_refused_by_row(tied_model):
    rows = random_pairs(2)
    rows[1]["chosen"] = "text"
    with pytest.raises(InputError, match=r"pairs.jsonl:\d+: expected prompt messages"):
        tokenize_pairs(rows, JudgeTokenizer.load(tied_model), 600)
