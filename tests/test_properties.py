"""What holds of any text, any pairs and any options: hypothesis looks for the smallest input that breaks it."""

import json
import tempfile
from array import array
from pathlib import Path

import pytest
from conftest import judge_messages, judgment_text, write_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conj import InputError
from conj.data.manifest import read_sealed, write_sealed
from conj.data.packs import deal, group_tokens, plan_packs, plan_steps
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import TokenizedPairs
from conj.data.verdicts import parse_reason, parse_released, parse_strict

settings.register_profile("conj", deadline=None, derandomize=True, database=None)  # the same inputs on every machine
settings.load_profile("conj")

# Text as models and users write it: what the parsers and the template look for, among anything else.
PIECES = [
    "{", "}", '"', "'", ":", "：", ",", "\\", "```", "原因", "更好的回答", "回答", "1", "2", "\n", "{name}",
    "conj1placeholder",
]  # fmt: skip
TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>system\n"]
texts = st.lists(st.sampled_from(PIECES + TOKENS) | st.text(max_size=8), max_size=12).map("".join)
verdicts = st.sampled_from((1, 2))


@given(reason=texts, verdict=verdicts, data=st.data())
def test_any_reason_and_verdict_come_back_from_their_whole_judgment_and_from_no_part_of_it(reason, verdict, data):
    text = judgment_text(reason, verdict)
    assert parse_strict(text) == (verdict, "json") and parse_reason(text) == reason
    assert parse_strict(text[: data.draw(st.integers(0, len(text) - 1))]) == (None, "none")


@given(text=texts)
def test_a_verdict_is_1_or_2_and_is_stated(text):
    for verdict in (parse_strict(text), parse_released(text)):
        assert (verdict.value in (1, 2)) == (verdict.rung not in ("none", "tie"))
    verdict = parse_strict(text)
    if verdict.rung == "stated":
        assert str(verdict.value) in text and str(3 - verdict.value) not in text
    elif verdict.value is not None:
        assert "更好的回答" in text and str(verdict.value) in text.partition("更好的回答")[2]
    assert isinstance(parse_reason(text), str)


@given(draft=texts, reason=texts, verdict=verdicts, opened=st.booleans(), data=st.data())
def test_no_draft_in_a_thought_changes_the_verdict_and_an_unfinished_one_has_none(draft, reason, verdict, opened, data):
    draft += data.draw(st.sampled_from(("", judgment_text(reason, 3 - verdict), "回答1更好。")))
    thought = ("" if opened else "<think>") + draft
    whole = f"{thought}\n</think>\n\n{judgment_text(reason, verdict)}"
    assert parse_strict(whole, opened=opened) == (verdict, "json") and parse_reason(whole, opened=opened) == reason
    assert parse_strict(thought, opened=opened) == (None, "none")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> JudgeTokenizer:
    write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    return JudgeTokenizer.load(folder)


@given(question=texts, answers=st.tuples(texts, texts))
def test_no_text_adds_moves_or_removes_a_control_token(tokenizer, question, answers):
    """Against the prompt of harmless text; and the text that the model reads is the text that was given."""

    def control(*fields: str) -> list[int]:
        ids = tokenizer.prompt_ids(judge_messages(*fields))
        return [i for i in ids if i in tokenizer.special.values()]

    assert control(question, *answers) == control("question", "an answer", "another")


@given(text=texts)
def test_a_judgments_ids_end_once_and_give_back_its_text(tokenizer, text):
    *ids, end = tokenizer.completion_ids(text)
    assert end == tokenizer.special[tokenizer.turn_end] and not set(ids) & set(tokenizer.special.values())


@st.composite
def tokenized(draw) -> TokenizedPairs:
    prompts = draw(st.lists(st.integers(1, 90), min_size=1, max_size=8))
    judgments = st.tuples(st.integers(1, 40), st.integers(1, 40))
    rows = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), judgments), min_size=1, max_size=30))
    return TokenizedPairs(
        ids=[f"p{prompt}" for prompt, _ in rows], is_eval=[False] * len(rows), prompt_of=[prompt for prompt, _ in rows],
        prompts=[array("i", [i]) * length for i, length in enumerate(prompts)],
        judgments=[tuple(array("i", [1]) * length for length in lengths) for _, lengths in rows],
    )  # fmt: skip


shares = st.sampled_from(("none", "pair", "prompt"))


@given(pairs=tokenized(), share=shares, room=st.integers(0, 300), multiple=st.integers(1, 4))
def test_packs_hold_every_pair_once_within_the_budget_on_any_number_of_ranks(pairs, share, room, multiple):
    alone = [plan_packs(pairs, [i], max_tokens=10**6, share=share) for i in range(len(pairs))]
    budget = max(group_tokens(pairs, group) for packs in alone for pack in packs for group in pack) + room
    packs = plan_packs(pairs, range(len(pairs)), max_tokens=budget, share=share, multiple=multiple)
    dealt = [list(deal(packs, rank, multiple)) for rank in range(multiple)]
    assert len({len(turns) for turns in dealt}) == 1
    held = [group for turns in dealt for pack in turns if pack is not None for group in pack]
    assert sorted(pair for group in held for pair in group.pairs) == list(range(len(pairs)))
    assert all(pairs.prompt_of[pair] == group.prompt for group in held for pair in group.pairs)
    assert all(sum(group_tokens(pairs, group) for group in pack) <= budget for pack in packs)
    if room == 0:  # one token less, and the largest does not fit
        with pytest.raises(InputError, match=f"max-tokens-per-pack is {budget - 1}"):
            plan_packs(pairs, range(len(pairs)), max_tokens=budget - 1, share=share)


@given(
    pairs=tokenized(), share=shares, pairs_per_step=st.integers(1, 12), seed=st.integers(0, 9),
    multiple=st.integers(1, 9),
)  # fmt: skip
def test_an_epoch_holds_every_pair_once_and_only_its_last_step_is_short(pairs, share, pairs_per_step, seed, multiple):
    options = dict(pairs_per_step=pairs_per_step, share=share, seed=str(seed), multiple=multiple)
    steps = plan_steps(pairs, list(range(len(pairs))), **options)
    assert sorted(pair for step in steps for pair in step) == list(range(len(pairs)))
    assert {len(step) for step in steps[:-1]} <= {pairs_per_step} and 1 <= len(steps[-1]) <= pairs_per_step
    assert steps == plan_steps(pairs, list(range(len(pairs))), **options)


utf8 = st.characters(codec="utf-8")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(utf8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(utf8), inner, max_size=3),
    max_leaves=8,
)


@given(options=st.dictionaries(st.text(utf8, max_size=5), json_values, max_size=4), data=st.data())
def test_a_manifest_comes_back_whole_and_no_byte_of_it_changes_unseen(options, data):
    needed = {"options": dict, "complete": bool}
    content = {"options": options, "complete": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.manifest.json"
        write_sealed(path, content)
        assert read_sealed(path, needed) == content
        written = bytearray(path.read_bytes())
        place, byte = data.draw(st.integers(0, len(written) - 1)), data.draw(st.integers(0, 255))
        assume(written[place] != byte)
        written[place] = byte
        path.write_bytes(written)
        with pytest.raises(InputError):
            read_sealed(path, needed)


@given(content=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_json_without_a_seal_is_no_manifest(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.manifest.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputError):
            read_sealed(path, {})
