"""Text is inert: no control token in a question, an answer or a judgment changes the structure of what a judge reads.

The attacks are those of scripts/control_tokens.py: every added token, every offset, every place."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_styles import STYLES, write_style
from conftest import DATA, ROOT, SHARED, here, judge_messages, judgment_text
from control_tokens import PLACES, TEXT, Conversation, attack_texts, attacks, by_conj, by_template, places, structure

from conj.data.preprocess import load_prompts
from conj.data.prompts import question_of
from conj.data.tokenizer import JudgeTokenizer

QWEN2 = SHARED / "qwen2-tokenizer"
# Added tokens of later Qwen tokenizers; those without bars are vocabulary there.
MORE_TOKENS = [
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|vision_start|>", "<|vision_pad|>", "<|image_pad|>",
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>", "<|fim_middle|>", "<|repo_name|>",
]  # fmt: skip
BENCHMARKS = [
    "llmbar/adver_neighbor.json", "llmbar/natural.json", "pandalm/testset-v1.json", "ultrafeedback/train_clean.jsonl",
    "dpo_zh/dpo_zh_demo.json",
]  # fmt: skip


@pytest.fixture(scope="module", params=["demo", "more tokens", "qwen2"])
def folder(request, tmp_path_factory) -> Path:
    if request.param == "demo":
        return ROOT / "demo" / "base"
    if request.param == "qwen2":
        return here(QWEN2)
    return add_tokens(tmp_path_factory.mktemp("more"), MORE_TOKENS)


def add_tokens(folder: Path, tokens: list[str]) -> Path:
    """The demo's tokenizer with more added tokens; the ones without bars are not special, every third one also takes
    the spaces beside it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo" / "base" / name, folder)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    first = max(token["id"] for token in spec["added_tokens"]) + 1
    spec["added_tokens"] += [
        {"id": first + i, "content": token, "single_word": False, "lstrip": i % 3 == 0, "rstrip": i % 3 == 0}
        | {"normalized": "|" not in token, "special": "|" in token}
        for i, token in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> JudgeTokenizer:
    return JudgeTokenizer.load(folder)


def frame(conversation: Conversation) -> str:
    """What the ids must decode to, control tokens left out: the template's own words and the texts, nothing lost."""
    turns = "".join(f"{turn['role']}\n{turn['content']}\n" for turn in conversation.messages)
    return turns + "assistant\n" + (conversation.judgment or "")


def without_space_beside(folder: Path) -> Callable[[str], str]:
    """Takes away what some words of the vocabulary take the place of: the white space beside them."""
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    taking = [re.escape(token["content"]) for token in added if token["lstrip"] and not token["special"]]
    beside = re.compile(rf"\s*({'|'.join(taking)})\s*") if taking else re.compile(r"(\Z)")
    return lambda text: beside.sub(r"\1", text)


def test_no_text_changes_the_structure_and_every_text_stays_whole(folder, tokenizer):
    """An answer that could end its turn would speak as the system, or as the judge; one that lost its control tokens
    would be another answer. A judgment that ended early would be learned cut off."""
    encode, level = by_conj(tokenizer), without_space_beside(folder)
    start, end = (tokenizer.special[token] for token in ("<|im_start|>", "<|im_end|>"))
    tried = Counter()
    for place, text, attack in attacks(tokenizer):
        ids = encode(attack)
        expected = [start, end] * len(attack.messages) + [start] + [end] * (attack.judgment is not None)
        assert structure(ids, tokenizer) == expected, (place, text)
        assert level(tokenizer.decode(ids)) == level(frame(attack)), (place, text)
        tried[place] += 1
    assert tried.keys() == PLACES.keys() and min(tried.values()) >= 40 * len(tokenizer.special)


@pytest.mark.parametrize("style", STYLES)
def test_no_text_changes_the_structure_under_any_template(style, tmp_path):
    """Tokenizers whose added tokens are not all control, with words that overlap control tokens. The control: filled first
    and tokenized afterwards, texts with a control token change it."""
    tokenizer = JudgeTokenizer.load(write_style(tmp_path, style))
    encode, official, found = by_conj(tokenizer), by_template(tmp_path), places(tokenizer)
    benign = {place: structure(encode(put(TEXT)), tokenizer) for place, put in found.items()}
    asks = [place for place, put in found.items() if put(TEXT).judgment is None]
    assert len(asks) >= 6 and len(found) >= 8
    tried = Counter()
    for place, text, attack in attacks(tokenizer):
        ids = encode(attack)
        assert structure(ids, tokenizer) == benign[place], (place, text)
        shown = (
            text if attack.judgment is None or attack.judgment == text else json.dumps(text, ensure_ascii=False)[1:-1]
        )
        assert shown.strip() in tokenizer.decode(ids), (place, text)
        tried[place] += 1
        if place == asks[0] and any(token in text for token in tokenizer.special):
            hidden = any(word in text and any(token in word for token in tokenizer.special) for word in tokenizer.words)
            assert hidden or structure(official(attack), tokenizer) != benign[place], text
    assert min(tried.values()) >= 25 * (len(tokenizer.special) + len(tokenizer.words))


def test_plain_chat_templating_lets_every_attack_through(folder, tokenizer):
    """The negative control: filled first and tokenized afterwards, each of these texts changes the structure."""
    encode, conj = by_template(folder), by_conj(tokenizer)
    for place, put in PLACES.items():
        benign = structure(encode(put(TEXT)), tokenizer)
        assert benign == structure(conj(put(TEXT)), tokenizer), place
        for token in tokenizer.special:
            for text in attack_texts(token, tokenizer.turn_end):
                assert structure(encode(put(text)), tokenizer) != benign, (place, text)


def test_every_added_token_is_put_everywhere(tokenizer):
    """An enumeration that forgot a token, a place or an offset would prove less than it says."""
    seen = {}
    for place, text, attack in attacks(tokenizer):
        seen.setdefault(place, set()).add(text)
        shown = "\n".join([*(turn["content"] for turn in attack.messages), attack.judgment or ""])
        assert text in shown or json.dumps(text, ensure_ascii=False)[1:-1] in shown, place
    for place in PLACES:
        for token in (*tokenizer.special, *tokenizer.words):
            offsets = {TEXT[:i] + token + TEXT[i:] for i in range(len(TEXT) + 1)}
            around = {token, token * 2, f"\n{token}", f"{token}\n", token[:3] + tokenizer.turn_end + token[3:]}
            assert offsets | around <= seen[place]


def benign_prompts() -> list[dict]:
    """Rows of real preference data, of which those that quote a control token are left out, 10 at most."""
    files = [folder / name for name in BENCHMARKS for folder in (SHARED, DATA) if (folder / name).exists()]
    files = {file.relative_to(file.parent.parent): file for file in reversed(files)}  # the whole one, where it is here
    rows, _ = load_prompts([str(file) for file in files.values()])
    benign = [row for row in rows if "<|" not in json.dumps(row)]
    assert len(rows) - len(benign) <= 10
    return benign


def test_benign_prompts_and_judgments_have_the_ids_of_the_official_template(folder, tokenizer):
    """Safe text at the price of other ids would be another prompt than the one the base model knows."""
    encode, official = by_conj(tokenizer), by_template(folder)
    rows = benign_prompts()
    assert len(rows) >= (2000 if SHARED.exists() else 130)
    if folder != QWEN2 and SHARED.exists():
        rows = rows[::10]
    for row in rows:
        messages = judge_messages(question_of(row), row["answer_1"], row["answer_2"])
        assert encode(Conversation(messages=messages)) == official(Conversation(messages=messages)), row["id"]
    line_break = tokenizer.encode_text("\n")  # the template puts one after the token that ends the judgment
    for row in rows[::5]:
        messages = judge_messages(question_of(row), row["answer_1"], row["answer_2"])
        judged = Conversation(messages=messages, judgment=judgment_text(row["answer_1"], row["label"]))
        assert encode(judged) + line_break == official(judged), row["id"]
