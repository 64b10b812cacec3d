"""How much of a run goes into evaluations, by tokens: a bound at any size, and points enough to see a curve."""

import dataclasses
import random

import pytest
from bench_packing import draw_pairs
from test_dpo import dpo_options
from test_packs import JUDGMENT_TOKENS, PROMPT_TOKENS

from conj import InputError
from conj.data.packs import pairs_of, plan_steps
from conj.train.plan import (
    EVAL_SHARE,
    Plan,
    describe_evaluations,
    evaluation_share,
    plan_evaluations,
    plan_packs,
)

HOW = {"share": "prompt", "pairs_per_step": 24, "max_tokens_per_pack": 16384, "pack_multiple": 8}


def planned(num_prompts: int, held_out: float = 0.02, max_steps: int | None = None, **changes) -> Plan:
    """A plan of prompts with 5 pairs each, of which a share of the prompts is held out. Steps are cut into packs only as far
    as the rule reads them: as one."""
    pairs = draw_pairs(random.Random(0), (PROMPT_TOKENS, JUDGMENT_TOKENS), num_prompts, 5, 5)
    draw = random.Random(1)
    out = {prompt for prompt in range(num_prompts) if draw.random() < held_out}
    flags = [prompt in out for prompt in pairs.prompt_of]
    train, held = ([i for i, flag in enumerate(flags) if flag is side] for side in (False, True))
    options = dpo_options("unused", "unused", **HOW | changes)
    steps = plan_steps(pairs, train, pairs_per_step=24, share="prompt", seed="0")[:max_steps]
    packs = [plan_packs(pairs, step, max_tokens=2**40, share="prompt") for step in steps]
    made = plan_evaluations(pairs, held, packs, options)
    return Plan(
        options=options, pairs=pairs, reference=None, train=train, held_out=held, steps=packs, evaluations=made, stale=[]
    )  # fmt: skip


@pytest.mark.parametrize(("num_prompts", "earlier"), [(1_000, 3), (20_000, 9), (80_000, 9)])
def test_evaluation_takes_less_than_3_percent_of_a_run_of_any_size(num_prompts, earlier):
    """All of them every 50 steps, as it was, is the negative control. All are evaluated at the end, a sample before."""
    plan = planned(num_prompts)
    *before, last = plan.evaluations
    assert evaluation_share(plan) <= EVAL_SHARE and last == len(plan.steps) and len(before) == earlier
    assert sorted(pairs_of(plan.evaluations[last])) == plan.held_out
    assert {len(pairs_of(plan.evaluations[step])) for step in before} == {min(256, len(plan.held_out))}
    whole = dict.fromkeys(range(50, last + 1, 50), plan.evaluations[last])
    assert evaluation_share(dataclasses.replace(plan, evaluations=whole)) > 0.3 or num_prompts < 20_000


def test_a_small_run_has_a_few_points_and_one_of_a_few_steps_the_last():
    """A curve of one point tells nothing; a trial of ten steps is no place for 8,000 pairs."""
    plan = planned(200, held_out=0.04)
    assert len(plan.evaluations) >= 4 and evaluation_share(plan) <= EVAL_SHARE
    assert len({len(pairs_of(packs)) for packs in list(plan.evaluations.values())[:-1]}) == 1
    trial = planned(20_000, max_steps=10)
    assert [*trial.evaluations] == [2, 5, 7, 10] and evaluation_share(trial) <= EVAL_SHARE
    assert all(1 <= len(pairs_of(packs)) < 20 for packs in trial.evaluations.values())
    assert "held-out pairs are evaluated after step 10, and" in describe_evaluations(trial)
    one = planned(50, held_out=0.5, max_steps=1)
    assert [len(pairs_of(packs)) for packs in one.evaluations.values()] == [1]
    most = planned(500, held_out=0.3)  # by choice more than fits: a part of them, and points before
    assert len(most.evaluations) == 4 and evaluation_share(most) <= EVAL_SHARE


def test_the_sample_is_fixed_held_out_and_drawn_by_the_seed():
    plan, again, other = planned(3_000), planned(3_000), planned(3_000, seed=1)
    before = list(plan.evaluations)[:-1]
    samples = [sorted(pairs_of(plan.evaluations[step])) for step in before]
    assert plan.evaluations == again.evaluations != other.evaluations and len(before) > 1
    assert all(sample == samples[0] for sample in samples) and set(samples[0]) < set(plan.held_out)
    assert not set(plan.held_out) & set(plan.train)


def test_whole_steps_are_taken_at_their_word_and_shares_are_upper_bounds():
    """Who asks for an evaluation every 10 steps gets it, whatever it costs; the line says what."""
    plan = planned(500, eval_steps=10, eval_pairs=7)
    *before, last = plan.evaluations
    assert before == [*range(10, len(plan.steps), 10)] and last == len(plan.steps)
    assert {len(pairs_of(plan.evaluations[step])) for step in before} == {7}
    assert f"{evaluation_share(plan):.1%} of the run" in describe_evaluations(plan)
    dear = planned(50, held_out=0.5, max_steps=4, eval_steps=1)  # whose sample alone is more than the bound
    assert [len(pairs_of(packs)) for packs in dear.evaluations.values()] == [len(dear.held_out)] * 4
    trial = planned(200, held_out=0.8, max_steps=2, eval_steps=1)  # once it never ended
    assert [len(pairs_of(packs)) for packs in trial.evaluations.values()] == [256, len(trial.held_out)]
    assert len(planned(20_000, eval_steps=0.5).evaluations) == 2
    with pytest.raises(InputError, match="--eval-steps: expected a share below 1, or whole steps, found 1.5"):
        dpo_options("unused", "unused", eval_steps=1.5)


def test_without_held_out_pairs_nothing_is_evaluated():
    plan = planned(50, held_out=0.0)
    assert plan.evaluations == {} and "nothing is evaluated" in describe_evaluations(plan)
