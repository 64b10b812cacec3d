"""Which added tokens are control and which are vocabulary, and what becomes of text that holds either."""

import json
from pathlib import Path

import pytest
from chat_styles import LLAMA3, QWEN3, STYLES, filled_first, official, write_style
from conftest import CHATML, CONTROL, DATA, judge_messages, judgment_text, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models

from conj import InputError
from conj.data.tokenizer import JudgeTokenizer

DRUG = "环丙沙星滴眼液"
JUDGED = judge_messages(
    f"{DRUG}怎么用？", "naïve <think>\n先看剂量</think>\n 好", f"用{DRUG}。<tool_call>\n{{}}\n</tool_call>"
)


@pytest.fixture(scope="module", params=STYLES)
def style(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(style, tmp_path_factory) -> Path:
    return write_style(tmp_path_factory.mktemp("style") / "model", style)


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
