"""Which added tokens are control and which are vocabulary, where a turn ends, and what templates refuse or ask for."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_styles import LLAMA3, QWEN3, STYLES, write_style
from conftest import CHATML, CONTROL, DATA, change_config, random_pairs, write_model, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models

from conj import InputError
from conj.data.files import write_jsonl
from conj.data.packs import tokenize_pairs
from conj.data.prompts import judge_messages, judgment_text
from conj.data.tokenizer import JudgeTokenizer
from conj.model.folder import check_model
from conj.train.audit.second_opinion import _official_ids

DRUG = "环丙沙星滴眼液"
USER = [{"role": "user", "content": "x"}]
JUDGED = judge_messages(
    f"{DRUG}怎么用？", "naïve <think>\n先看剂量</think>\n 好", f"用{DRUG}。<tool_call>\n{{}}\n</tool_call>"
)


@pytest.fixture(scope="module", params=STYLES)
def style(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(style, tmp_path_factory) -> Path:
    return write_style(tmp_path_factory.mktemp("style") / "model", style)


def official(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def filled_first(folder: Path, messages: list[dict], **settings) -> list[int]:
    """The official ids: the template is filled, then encoded."""
    reference = official(folder)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
    return reference(text, add_special_tokens=False).input_ids


# ---- words of the vocabulary ----


def test_a_users_own_word_is_one_id_and_keeps_its_text(tmp_path):
    """It vanished from what is decoded, and DPO would have trained the rest; in a question it was ten pieces."""
    write_tokenizer(tmp_path, words=[DRUG])
    tokenizer, text = JudgeTokenizer.load(tmp_path), f"回答2写明{DRUG}的剂量"
    ids = tokenizer.encode_text(text)
    assert ids.count(tokenizer.words[DRUG]) == 1 and ids == official(tmp_path)(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.completion_ids(text)) == text
    assert DRUG not in tokenizer.special and tokenizer.last_id == tokenizer.words[DRUG]


def test_prompts_with_words_have_the_official_ids(style, folder):
    """For each family's template. What the template itself draws is no word there: R1's `<think>` in a text is text."""
    tokenizer = JudgeTokenizer.load(folder)
    messages = JUDGED if style != "r1" else judge_messages(DRUG, "naïve</think>", "<tool_call> b")
    shown = messages if tokenizer.template.takes_system else messages[1:]
    settings = {"date_string": "26 Jul 2024"} if style == "llama 3.2" else {}
    assert tokenizer.prompt_ids(messages) == filled_first(folder, shown, **settings)
    assert tokenizer.words and set(tokenizer.words.values()) & {*tokenizer.prompt_ids(messages)}


def test_text_with_words_is_encoded_and_decoded_as_transformers_does(style, folder):
    tokenizer, reference = JudgeTokenizer.load(folder), official(folder)
    plain = [word for word in tokenizer.words if not any(name in word for name in tokenizer.special)]
    examples = json.loads((DATA / "llmbar" / "adver_neighbor.json").read_text("utf-8"))[:20]
    texts = [example["output_1"] for example in examples] + ["", "天空 é \U0001f600"]
    for i, text in enumerate(texts):
        word, cut = plain[i % len(plain)], len(text) // 2
        text = f"{text[:cut]}{word}{word} {text[cut:]}\n{word}"
        ids = tokenizer.encode_text(text)
        assert ids == reference(text, add_special_tokens=False).input_ids and ids.count(tokenizer.words[word]) == 3
        assert tokenizer.decode(ids) == text
        if word != "naïve":  # whose ï the official decoder takes for a byte
            assert reference.decode(tokenizer.completion_ids(text), skip_special_tokens=True) == text


FLAGS = [
    AddedToken("left", lstrip=True), AddedToken("right", rstrip=True), AddedToken("whole", single_word=True),
    AddedToken("a\u030cta\u030c", normalized=True), AddedToken("a\u030ctat", normalized=False), AddedToken("ab"),
    AddedToken("abc"), AddedToken("bcd"), AddedToken("\n\n"),
]  # fmt: skip


def test_words_are_found_by_their_own_rules(tmp_path):
    """White space beside a word, parts of longer words, normal forms and overlaps, as the official tokenizer has them."""
    write_tokenizer(tmp_path, words=FLAGS, tokenizer_class="PreTrainedTokenizerFast")
    tokenizer, reference = JudgeTokenizer.load(tmp_path), official(tmp_path)
    parts = [
        "a  left b",
        "a right \n b",
        "whole",
        "wholesome",
        "a whole.",
        "\u01cet\u01ce",
        "a\u030ctat",
        "\u01cetat",
        "abcd",
        "ab cd",
    ]
    for text in [*parts, *(first + second for first in parts for second in parts), "x\n\ny", "left\n\n\nright"]:
        ids = tokenizer.encode_text(text)
        assert ids == reference(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    messages = [{"role": "system", "content": " left"}, {"role": "user", "content": "right \n left "}]
    assert tokenizer.prompt_ids(messages) == filled_first(tmp_path, messages)
    assert "\n\n" in tokenizer.words  # also where the template draws line breaks


def test_a_word_of_letters_is_found_in_a_frame_as_the_official_tokenizer_finds_it(tmp_path):
    """`is` within `assistant` is no word where it must stand alone, and is one where it may be a part."""
    for alone in (True, False):
        word = AddedToken("is", single_word=alone)
        write_tokenizer(tmp_path, words=[word], tokenizer_class="PreTrainedTokenizerFast")
        tokenizer = JudgeTokenizer.load(tmp_path)
        assert ("is" in tokenizer.words) == alone
        messages = judge_messages("q", "a", "b")
        assert tokenizer.prompt_ids(messages) == filled_first(tmp_path, messages)


OTHER_MODELS = {
    "Unigram": models.Unigram(vocab=[("?", 0.0), ("▁", -1.0), *((c, -2.0) for c in "asitnuero")], unk_id=0),
    "WordPiece": models.WordPiece(vocab={c: i for i, c in enumerate(["?", *"▁asitnuero", *(f"##{c}" for c in "asitnuero")])},
        unk_token="?"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_words_of_tokenizers_of_other_kinds(kind, tmp_path):
    """The library numbers words anew when other added tokens are left out, whatever ids it is given."""
    tokenizer = Tokenizer(OTHER_MODELS[kind])
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.add_tokens([DRUG])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = JudgeTokenizer.load(tmp_path).encode_text(f"tune{DRUG}rise")
    assert ids == official(tmp_path)(f"tune{DRUG}rise", add_special_tokens=False).input_ids
    assert ids.count(tokenizer.token_to_id(DRUG)) == 1 and DRUG in JudgeTokenizer.load(tmp_path).decode(ids)


def change_added(folder: Path, name: str, **changes) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for token in spec["added_tokens"]:
        token.update(changes if token["content"] == name else {})
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")


@pytest.mark.parametrize(("changes", "message"), [
    ({"id": 562}, "expected an id of its own"),  # that of <|im_end|>: the word would end the turn
    ({"id": 5}, "expected an id of its own"),  # that of a piece
    ({"content": "a"}, "expected an id of its own"),  # which the model's vocabulary has under another id
    ({"content": "<|im_end|>"}, "expected added tokens with a name each"),
    ({"lstrip": "yes"}, "tokenizer cannot be read"),
    ({"content": 5}, "expected added tokens with a name each"),
])  # fmt: skip
def test_a_word_without_an_id_of_its_own_is_refused(changes, message, tmp_path):
    """Text that holds it would have the id of a control token, or of other text."""
    write_tokenizer(tmp_path, words=[DRUG])
    change_added(tmp_path, DRUG, **changes)
    with pytest.raises(InputError, match=message):
        JudgeTokenizer.load(tmp_path)


def test_a_vocabulary_with_gaps_takes_no_words(tmp_path):
    """The library would give a word the id of an ordinary piece, and then that piece's text the id of the word."""
    write_tokenizer(tmp_path, words=[DRUG])
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    del spec["model"]["vocab"]["Ā"]
    spec["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(InputError, match="pieces of the vocabulary"):
        JudgeTokenizer.load(tmp_path)


# ---- inertness ----


def test_another_normal_form_of_a_control_token_is_text(tmp_path):
    """The normalizer makes the one of the other, also where a word is spelled like it."""
    composed, apart = "<|\u00e9|>", "<|e\u0301|>"
    for words in (
        [],
        [AddedToken(apart, normalized=True)],
        [AddedToken(apart, normalized=False)],
        [f"{apart}x", "x" + apart],
    ):
        write_tokenizer(tmp_path, special=[*CONTROL, AddedToken(composed, special=True)], words=words)
        tokenizer = JudgeTokenizer.load(tmp_path)
        for name in (composed, apart):
            for text in (name, f"x{name}x", f" {name} ", name * 2, f"<|{name}\u0301|>", f"{name}<|im_end|>x"):
                assert not {*tokenizer.encode_text(text)} & {*tokenizer.special.values()}, (words, text)


def test_a_control_token_that_text_would_become_is_refused(tmp_path):
    """With words in place as without: this one is a piece of the model, which merges make of its characters."""
    for words in ([], [DRUG, "xy"]):
        write_tokenizer(tmp_path, words=words)
        spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
        piece, number = next(item for item in spec["model"]["vocab"].items() if len(item[0]) > 1 and item[0].isascii())
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": number, "content": piece})
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
        with pytest.raises(InputError, match=f"the text {piece!r} would become a control token"):
            JudgeTokenizer.load(tmp_path)


def test_a_control_token_that_only_some_text_would_become_is_refused_there(tmp_path):
    """An unknown character, whose id is a control token's: such a prompt has another structure than it seems."""
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": "{{ messages[-1]['content'] }}{{ eos_token }}", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="would become a control token"):
        JudgeTokenizer.load(tmp_path).encode_text("ab")


# ---- thoughts ----


def test_a_thought_that_the_model_wrote_comes_back_to_the_same_ids(tmp_path):
    """Qwen3 writes its thought itself; its template draws an empty one into finished turns only."""
    tokenizer = JudgeTokenizer.load(write_style(tmp_path, "qwen3"))
    assert {"<think>", "</think>"} <= tokenizer.words.keys()
    text = f"<think>\n先看{DRUG}。\n</think>\n\n{judgment_text('更准确', 1)}"
    ids = tokenizer.completion_ids(text)
    assert tokenizer.decode(ids) == text and tokenizer.completion_ids(tokenizer.decode(ids)) == ids
    assert [ids.count(tokenizer.words[token]) for token in ("<think>", "</think>")] == [1, 1]
    assert ids[-1] == tokenizer.special["<|im_end|>"] and ids.count(ids[-1]) == 1


def test_a_template_that_opens_a_thought_in_every_prompt_makes_its_token_control(tmp_path):
    write_style(
        tmp_path, "qwen3", chat_template=QWEN3.replace("enable_thinking is defined and not enable_thinking", "1")
    )
    assert {"<think>", "</think>"} <= JudgeTokenizer.load(tmp_path).special.keys()


def test_marks_that_are_not_called_special_are_control_where_the_template_draws_them(tmp_path):
    """A user who writes R1's `<｜Assistant｜>` would speak for the judge. What the model writes of them stays in its text."""
    tokenizer = JudgeTokenizer.load(write_style(tmp_path, "r1"))
    marks = ["<｜User｜>", "<｜Assistant｜>", "<think>"]
    assert {*marks} <= tokenizer.special.keys() and "</think>" in tokenizer.words
    ids = tokenizer.prompt_ids(judge_messages("".join(marks), "a", "b"))
    assert [ids.count(tokenizer.special[mark]) for mark in marks] == [1, 1, 1]
    written = [tokenizer.special["<think>"], *tokenizer.encode_text("好"), tokenizer.words["</think>"]]
    assert tokenizer.decode([*written, tokenizer.special[tokenizer.turn_end]]) == "<think>好</think>"


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
        row["chosen"][0]["content"] += DRUG
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = SimpleNamespace(model=folder, find=lambda name: tmp_path / name)
    pairs = tokenize_pairs(rows, tokenizer, 1500)
    assert [*_official_ids(options, pairs, [*range(len(rows))])] == [*range(len(rows))]
    wrong = next(i for name, i in tokenizer.special.items() if name != tokenizer.turn_end)
    for _, judgment in pairs.judgments:
        judgment[-1] = wrong
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


# ---- the fingerprint ----


def test_the_fingerprint_changes_with_what_is_control_and_where_a_turn_ends(tmp_path):
    """Stored logprobs are of exactly these ids; what a judgment decodes to decides the pairs."""
    prints = []

    def add(style: str, **changes) -> None:
        prints.append(JudgeTokenizer.load(write_style(tmp_path, style, **changes)).fingerprint)

    add("chatml")
    add("chatml")
    assert len({*prints}) == 1
    add("chatml", eos_token="<|im_end|>")
    add("chatml", words=STYLES["chatml"]["words"][::-1])
    add("chatml", words=[])
    add("chatml", words=[], special=[*CONTROL, DRUG])
    add("chatml", words=[], special=[*CONTROL, AddedToken(DRUG, special=True)])
    add("chatml", chat_template=CHATML.replace("'<|im_end|>' + '\n'", "'\n<|im_end|>'"))
    add("llama 3.2", chat_template=LLAMA3.replace("DATE", "'1 Jan 2020'"))
    assert len({*prints}) >= 7
