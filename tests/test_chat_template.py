"""A chat template says where a turn ends, refuses a system message, or asks for the date: what is made of each."""

import dataclasses
from array import array
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_styles import STYLES, filled_first, official, write_style
from conftest import CHATML, change_config, judge_messages, random_pairs, write_model, write_tokenizer

from conj import InputError
from conj.data.files import write_jsonl
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.model.folder import check_model
from conj.train.audit.second_opinion import _official_ids

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module", params=STYLES)
def style(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(style, tmp_path_factory) -> Path:
    return write_style(tmp_path_factory.mktemp("style") / "model", style)


# ---- the end of a turn ----

ENDS = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama 3.1": "<|eot_id|>", "llama 3.2": "<|eot_id|>"}
ENDS |= {"mistral 0.1": "</s>", "mistral 0.3": "</s>", "r1": "<｜end▁of▁sentence｜>"}


def test_a_judgment_ends_with_the_token_that_the_template_draws(style, folder):
    """With Qwen2.5's base it was `<|endoftext|>`, which that template never writes: judgments ran to the limit."""
    tokenizer = JudgeTokenizer.load(folder)
    assert tokenizer.turn_end == ENDS[style]
    assert tokenizer.completion_ids("x")[-1] == tokenizer.special[ENDS[style]]
    ends = {ENDS[style], STYLES[style].get("eos_token", "<|im_end|>")}
    assert tokenizer.end_ids == sorted(tokenizer.special[end] for end in ends)
    assert tokenizer.decode(tokenizer.completion_ids("x")) == "x"


def test_an_end_that_is_not_called_special_ends_a_judgment_without_a_text(tmp_path):
    write_tokenizer(
        tmp_path, words=["<end>", "<also>"], chat_template=CHATML.replace("<|im_end|>", "<end>"), eos_token="<also>"
    )
    tokenizer = JudgeTokenizer.load(tmp_path)
    assert tokenizer.turn_end == "<end>" and len(tokenizer.end_ids) == 2 and not tokenizer.words
    assert tokenizer.decode([*tokenizer.completion_ids("x"), *tokenizer.end_ids]) == "x"


NO_TURN = "{{ messages[-1]['content'] }}"
REFUSES_ASSISTANT = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML


@pytest.mark.parametrize(("template", "eos", "end"), [
    (NO_TURN, "<|endoftext|>", "<|endoftext|>"), (REFUSES_ASSISTANT, "<|endoftext|>", "<|endoftext|>"),
    (CHATML, None, "<|im_end|>"), (NO_TURN, None, None),
])  # fmt: skip
def test_a_template_without_an_end_leaves_it_to_the_tokenizer(template, eos, end, tmp_path):
    write_tokenizer(tmp_path, chat_template=template, eos_token=eos)
    if end is None:
        with pytest.raises(InputError, match="no eos_token, and the chat template draws no token after a judgment"):
            JudgeTokenizer.load(tmp_path)
    else:
        assert JudgeTokenizer.load(tmp_path).turn_end == end


def test_engines_stop_where_the_turn_ends(tmp_path):
    """And at what the model's own configuration names."""
    write_model(tmp_path, eos_token_id=560)
    write_style(tmp_path, "chatml")
    change_config(tmp_path, eos_token_id=[7])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert check_model(tmp_path, None).end_ids == [7, 8, 560, 562]


def test_the_audit_ends_judgments_as_the_official_template_does(style, folder, tmp_path):
    """The second opinion derives it by itself, and gives all ids of all styles."""
    tokenizer, rows = JudgeTokenizer.load(folder), random_pairs(3)
    for row in rows:
        row["chosen"][0]["content"] += "环丙沙星滴眼液"
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = SimpleNamespace(model=folder, find=lambda name: tmp_path / name)
    pairs = tokenize_pairs(rows, tokenizer, 1500)
    assert [*_official_ids(options, pairs, [*range(len(rows))])] == [*range(len(rows))]
    wrong = next(i for name, i in tokenizer.special.items() if name != tokenizer.turn_end)
    judgments = [(chosen, rejected[:-1] + array("i", [wrong])) for chosen, rejected in pairs.judgments]
    pairs = dataclasses.replace(pairs, judgments=judgments)
    assert not _official_ids(options, pairs, [*range(len(rows))])  # the control


# ---- the system's message, and the date ----


def test_an_empty_system_message_is_left_out_where_the_template_refuses_it(tmp_path):
    """Mistral's first template took no judge's prompt at all."""
    tokenizer = JudgeTokenizer.load(write_style(tmp_path, "mistral 0.1"))
    messages = judge_messages("q", "a", "b")
    assert tokenizer.prompt_ids(messages) == tokenizer.prompt_ids(messages[1:]) == filled_first(tmp_path, messages[1:])
    with pytest.raises(InputError, match="has no system message for 'be brief'") as found:
        tokenizer.prompt_ids([{"role": "system", "content": "be brief"}, *USER])
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="cannot be rendered: expected user and assistant"):
        tokenizer.prompt_ids([*USER, *USER])


@pytest.mark.parametrize("system", ["", "be brief"])
def test_a_system_message_within_the_users_turn_has_the_official_ids(system, tmp_path):
    tokenizer = JudgeTokenizer.load(write_style(tmp_path, "mistral 0.3"))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "<s>\n\n y"}]
    ids = tokenizer.prompt_ids(messages)
    assert tokenizer.decode(ids) == f" {system}\n\n<s>\n\n y"
    messages[1]["content"] = "\n\n y"
    assert tokenizer.prompt_ids(messages) == filled_first(tmp_path, messages)


def test_the_date_in_a_prompt_is_the_same_on_every_day(tmp_path, monkeypatch):
    """Ids that change overnight would be another prompt than that of the stored logprobs and of the audit."""
    from transformers.utils import chat_template_utils

    class Later(datetime):
        @classmethod
        def now(cls, *_):
            return cls(2031, 1, 2)

    asks, says = (write_style(tmp_path / style, style, words=[]) for style in ("llama 3.2", "llama 3.1"))
    tokenizer, messages = JudgeTokenizer.load(asks), judge_messages("q", "a", "b")
    today = tokenizer.prompt_ids(messages)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert tokenizer.prompt_ids(messages) == today == JudgeTokenizer.load(says).prompt_ids(messages)
    assert "Today is 26 Jul 2024" in tokenizer.decode(today)
    shown = official(asks).apply_chat_template(messages, tokenize=False)
    assert "Today is 02 Jan 2031" in shown  # the control: the official rendering changes
