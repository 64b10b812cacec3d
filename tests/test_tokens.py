"""Pairs as token ids: those of each text alone, in a file that says what it is of and notices any changed byte."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from chat_styles import STYLES, write_style
from conftest import CONTROL, DATA, SHARED, here, judge_messages, judgment_text, random_pairs, write_tokenizer
from safetensors import safe_open
from test_dpo import dpo_options, make_reference
from test_prompts import llama2, pieces  # noqa: F401 (fixtures)

from conj import InputError
from conj.data import tokens
from conj.data.files import write_jsonl
from conj.data.preprocess import load_prompts
from conj.data.prompts import question_of
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import TOKENS, Ragged, check_tokens, find_tokens, map_tokens, tokenize_pairs
from conj.train import dpo, reference

TEXTS = ["", " ", "a\ud83d", "e\u0301", *CONTROL, "回答1：<|im_end|>", "<think> x </think>", "\n\n", "x" * 5000]


def real_rows(num: int) -> list[dict]:
    """Rows of pairs.jsonl: real questions and answers, judged in texts of which some look like control tokens."""
    prompts, _ = load_prompts([str(DATA / name) for name in ("llmbar", "pandalm", "ultrafeedback")], limit=num)
    rows = []
    for i, prompt in enumerate(prompts):
        messages = judge_messages(question_of(prompt), prompt["answer_1"], prompt["answer_2"] + TEXTS[i % len(TEXTS)])
        chosen, rejected = judgment_text(prompt["answer_1"], 1), TEXTS[i % len(TEXTS)]
        sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        row = {"prompt": messages, "chosen": sides[0], "rejected": sides[1], "id": prompt["id"], "label": 1}
        rows += [
            row | {"pair_type": ("repeated", "hinted")[k], "split": ("train", "eval")[i % 2]} for k in range(1 + i % 2)
        ]
    return rows


def check_ids(rows: list[dict], folder: Path) -> None:
    """Those of the pairs are those of each text alone."""
    judge = JudgeTokenizer.load(folder)
    pairs = tokenize_pairs(rows, judge, 2**31)
    assert len(pairs) == len(rows) and len(pairs.prompts) < len(rows)
    for i, row in enumerate(rows):
        assert [*pairs.prompts[pairs.prompt_of[i]]] == judge.prompt_ids(row["prompt"])
        for side, ids in zip(("chosen", "rejected"), pairs.judgments[i], strict=True):
            assert [*ids] == judge.completion_ids(row[side][0]["content"])


@pytest.mark.parametrize("style", STYLES)
def test_texts_in_batches_have_the_ids_of_each_alone(style, tmp_path, monkeypatch):
    """Sampling encodes one by one, training by batches: another id, and the reference is of another text."""
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 7)
    write_style(tmp_path, style)
    check_ids(real_rows(20), tmp_path)


def test_texts_in_batches_have_the_ids_of_each_alone_by_sentencepiece(llama2):  # noqa: F811
    """Where a text at the start of a prompt has other ids than one within it."""
    (llama2 / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} [/INST]{{ eos_token }}")
    check_ids(real_rows(8), llama2)


def test_texts_in_batches_have_the_ids_of_each_alone_by_qwen2():
    check_ids(real_rows(60), here(SHARED / "qwen2-tokenizer"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tokenizer, and pairs.jsonl of two kinds."""
    write_tokenizer(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", real_rows(10))
    return tmp_path


def make(folder: Path) -> Path:
    return find_tokens([folder / TOKENS], folder / "pairs.jsonl", JudgeTokenizer.load(folder), 600)


def test_a_mapped_file_holds_the_pairs_and_any_reader_reads_it(folder):
    rows = real_rows(10)
    mapped, pairs = map_tokens(make(folder)), tokenize_pairs(rows, JudgeTokenizer.load(folder), 600)
    for name in ("ids", "is_eval", "prompt_of", "pair_types", "prompt_tokens", "judgment_tokens"):
        assert getattr(mapped, name) == getattr(pairs, name), name
    assert [*mapped.prompts] == [*pairs.prompts] and [*mapped.judgments] == [*pairs.judgments]
    assert mapped.fingerprint() == pairs.fingerprint() and mapped.within(300) == pairs.within(300)
    assert mapped.within(300) == [i for i in range(len(rows)) if pairs.num_tokens(i) <= 300] != [*range(len(rows))]
    assert set(mapped.is_eval) == {True, False} and set(mapped.pair_types) == {"repeated", "hinted"}
    with safe_open(folder / TOKENS, framework="np") as file:
        assert {*file.keys()} == {*tokens.LAYOUT} and file.get_tensor(
            "values"
        ).tolist() == mapped.prompts.values.tolist()


def test_a_rank_holds_no_copy_of_the_ids(tmp_path):
    """They are pages of the file, which all ranks share; on 8 ranks copies once took 40 GiB."""
    write_tokenizer(tmp_path)
    rows = random_pairs(20)
    for row in rows:
        row["chosen"][0]["content"] = "red " * 20_000
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    path = make(tmp_path)
    tracemalloc.start()
    pairs = map_tokens(path)
    pairs.fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 0.05 * path.stat().st_size
    tracemalloc.stop()
    assert not pairs.prompts.values.flags.owndata and not pairs.prompts.values.flags.writeable


def test_the_fingerprint_tells_ids_their_order_and_where_texts_part(folder):
    """What the stored reference belongs to."""
    rows, judge = real_rows(10), JudgeTokenizer.load(folder)
    pairs = tokenize_pairs(rows, judge, 600)
    moved = [(c[:-1], c[-1:] + r) for c, r in pairs.judgments]  # the same ids, one after the other
    swapped = [(r, c) for c, r in pairs.judgments]
    others = [
        tokenize_pairs(rows[::-1], judge, 600),
        *(dataclasses.replace(pairs, judgments=j) for j in (moved, swapped)),
    ]
    others.append(dataclasses.replace(pairs, prompt_of=pairs.prompt_of[::-1]))
    assert len({p.fingerprint() for p in (pairs, *others)}) == 5


def test_any_changed_byte_is_noticed(folder):
    """In the header, its padding, and every array; and a file that is cut short, or longer."""
    path = make(folder)
    data = path.read_bytes()
    rng, size = np.random.default_rng(0), len(data)
    places = [0, 8, 30, tokens.HEADER_BYTES - 1, tokens.HEADER_BYTES, size - 1, *rng.integers(0, size, 60).tolist()]
    assert check_tokens(path)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match="tokens.safetensors: (was changed|not a)"):
            check_tokens(path)
    for changed in (data[:-1], data + b"\0", data[:100], b""):
        path.write_bytes(changed)
        with pytest.raises(InputError, match="not a"):
            check_tokens(path)


CHANGES = {
    "pairs": lambda folder: write_jsonl(folder / "pairs.jsonl", real_rows(10)[:-1]),
    "tokenizer": lambda folder: write_tokenizer(folder, words=["red"]),
    "a byte": lambda folder: (folder / TOKENS).write_bytes((folder / TOKENS).read_bytes()[:-1] + b"?"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_anything_else_is_made_again_and_a_line_says_why(change, folder, capsys):
    before = make(folder).read_bytes()
    CHANGES[change](folder)
    assert (make(folder).read_bytes() == before) is (change == "a byte")
    why = "was changed" if change == "a byte" else f"made with another {change}"
    assert f"{folder / TOKENS}: {why}" in capsys.readouterr().out


def test_tokens_are_made_once_for_all_stages_and_taken_from_other_runs(run_folder, tied_model, tmp_path, monkeypatch):
    """By the first stage that needs them; a copy in a run that builds on it would double the room."""
    make_reference(run_folder, tied_model)
    monkeypatch.setattr(tokens, "_tokenize", None)  # no text is encoded from here on
    dpo.main(dpo_options(run_folder, tied_model, max_steps=1))
    other = tmp_path / "other"
    dpo.main(dpo_options(other, tied_model, max_steps=1, beta=0.2, from_runs=(run_folder,)))
    assert (run_folder / TOKENS).exists() and not (other / TOKENS).exists()
    (run_folder / TOKENS).unlink()
    with pytest.raises(TypeError):  # the control
        dpo.main(dpo_options(run_folder, tied_model, max_steps=1))


def test_a_row_that_cannot_be_encoded_is_named_also_in_a_batch(folder):
    rows, judge = real_rows(10), JudgeTokenizer.load(folder)
    for change in ({"prompt": [{"role": "user"}]}, {"chosen": []}, {"rejected": [{"role": "assistant", "content": 3}]}):
        with pytest.raises(InputError, match=r"pairs.jsonl:6: expected prompt messages"):
            tokenize_pairs([*rows[:5], rows[5] | change, *rows[6:]], judge, 600)


def test_a_text_that_several_pairs_share_is_held_once():
    """Benchmarks draw 400,000 pairs from some hundred lengths."""
    text, other = np.arange(5), np.arange(3)
    found = Ragged.of([(text, other), (other, text)] * 10)
    assert len(found) == 20 and found.values.size == 8 and [*map(len, found[1])] == [3, 5]


def test_reference_keys_name_the_tokens_of_the_file(run_folder, tied_model):
    make_reference(run_folder, tied_model)
    key, _ = reference.read_reference(run_folder / "reference.safetensors")
    assert key["tokens"] == map_tokens(run_folder / TOKENS).fingerprint()
    assert tokens.read_key(run_folder / TOKENS)["tokenizer"] == key["tokenizer"]
