"""Stage 4: the recipe's table, seeded choice, held-out questions, and a chain of files that must fit together."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import CARD, judge_messages, judgment_text

from conj import InputError
from conj.data.files import read_jsonl, write_jsonl
from conj.data.manifest import manifest_path, write_sealed
from conj.data.options import run_command
from conj.data.pairs import PairsOptions, build_pairs, make_pairs, make_rows
from conj.data.verdicts import parse_strict

RUN = Path("unused")
CUT = '{"原因": "cut off'


def judgment(text: str, kind: str = "repeated", id: str = "p") -> dict:
    return {"id": id, "kind": kind, "index": 0, "text": text, "verdict": parse_strict(text).value}


def judgments(*, right=0, wrong=0, unparsed=0, hint=None, hint_reversed=None) -> list[dict]:
    """Judgments of a prompt whose label is 1; the hinted ones by their texts."""
    texts = [judgment_text(f"right {i}", 1) for i in range(right)]
    texts += [judgment_text(f"wrong {i}", 2) for i in range(wrong)]
    texts += [f"{CUT} {i}" for i in range(unparsed)]
    hinted = [judgment(text, kind) for kind, text in (("hint", hint), ("hint_reversed", hint_reversed)) if text]
    return [judgment(text) for text in texts] + hinted


def pair_up(rows: list[dict], **options) -> list:
    return make_pairs("p", 1, rows, PairsOptions(run_dir=RUN, **options), CARD)


def types(pairs: list) -> list[str]:
    return [pair.pair_type for pair in pairs]


def prompt(id: str, question: str = "q", label: int = 1) -> dict:
    return {"id": id, "question": question, "answer_1": "a", "answer_2": "b", "label": label}


def pair_up_all(prompts: list, made: dict[str, list], **options) -> tuple[list[dict], Counter]:
    """Rows of pairs.jsonl, and the stage's counts."""
    counts = Counter()
    rows = make_rows(prompts, lambda id: made.get(id, []), PairsOptions(run_dir=RUN, **options), counts)
    return list(rows), counts


HINT, REVERSED = judgment_text("hint", 1), judgment_text("reversed", 2)
ALL = {"right": 4, "wrong": 3, "unparsed": 1, "hint": HINT, "hint_reversed": REVERSED}


@pytest.mark.parametrize(("made", "expected"), [
    ({"right": 4, "wrong": 4}, ["repeated"] * 3),
    ({"right": 2, "wrong": 6}, ["repeated"] * 2),
    ({"right": 5, "wrong": 1, "unparsed": 2}, ["repeated", "repeated_vs_unparsed"]),
    ({"right": 1, "wrong": 1, "unparsed": 6}, ["repeated"]),
    ({"right": 8}, []),
    ({"wrong": 5, "unparsed": 3}, []),
    ({"hint": HINT, "hint_reversed": REVERSED}, ["hinted"]),
    ({"hint": HINT, "hint_reversed": CUT}, ["hinted_vs_unparsed"]),
    ({"hint": CUT, "hint_reversed": REVERSED}, []),
    ({"hint": REVERSED, "hint_reversed": CUT}, []),
    ({"hint": HINT}, []),
    (ALL, ["repeated"] * 3 + ["repeated_vs_unparsed", "hinted"]),
])  # fmt: skip
def test_recipe(made, expected):
    """At most 3 right against wrong, 1 right against unparsed, 1 hinted; a right judgment is used once."""
    assert types(pair_up(judgments(**made))) == expected


def test_chosen_is_right_and_rejected_is_not():
    """A pair the wrong way round teaches the wrong verdict."""
    rows = judgments(**ALL)
    pairs = pair_up(rows)
    assert {parse_strict(pair.chosen).value for pair in pairs} == {1}
    assert 1 not in {parse_strict(pair.rejected).value for pair in pairs}
    assert {parse_strict(pair.chosen).value for pair in make_pairs("p", 2, rows, PairsOptions(run_dir=RUN), CARD)} == {
        2
    }


def test_identical_texts_are_used_once_and_never_against_each_other():
    """Eight equal right judgments are one: two pairs of the same texts would count double in the loss. Sampled and parsed
    by different versions, one text may carry two verdicts; against itself it teaches nothing."""
    assert types(pair_up([judgment(judgment_text("same", 1))] * 8 + judgments(wrong=3))) == ["repeated"]
    assert pair_up([judgment(HINT), judgment(HINT) | {"verdict": 2}]) == []


def test_choice_depends_on_the_seed_but_not_on_the_order_of_rows():
    """Resumed sampling writes rows in another order; the pairs must not change."""
    rows = judgments(right=6, wrong=6, unparsed=3)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert pair_up(rows) == pair_up(shuffled)
    assert pair_up(rows) != pair_up(rows, seed=1)


def test_counts_and_types_are_options():
    """Each of the recipe's counts, and the ablations by type."""
    rows = judgments(right=8, wrong=8, unparsed=8, hint=HINT, hint_reversed=CUT)
    assert types(pair_up(rows, max_right_vs_wrong=5)).count("repeated") == 5
    assert types(pair_up(rows, max_right_vs_unparsed=2)).count("repeated_vs_unparsed") == 2
    assert types(pair_up(rows, max_hinted=0)).count("hinted_vs_unparsed") == 0
    assert types(pair_up(rows, pair_types=("repeated_vs_unparsed",))) == ["repeated_vs_unparsed"]


def test_without_rationale_one_pair_of_bare_verdicts_is_left():
    """The verdict-only ablation: all reasons gone, the pairs collapse, and nothing unparsed keeps its reason."""
    (pair,) = pair_up(judgments(**ALL), rationale=False)
    assert pair == ('{"更好的回答": 1}', '{"更好的回答": 2}', "repeated")
    assert [parse_strict(text).value for text in pair[:2]] == [1, 2]


def test_length_of_the_better_answer_chooses_prompts():
    """The paper's bias experiments: what is left out is counted, and equal lengths are neither."""
    answers = {"longer": ("long", "a"), "shorter": ("a", "long"), "turned": ("long", "a"), "equal": ("a", "b")}
    prompts = [prompt(id) | {"answer_1": one, "answer_2": two} for id, (one, two) in answers.items()]
    prompts[2]["label"] = 2
    made = {id: judgments(right=1, wrong=1) for id in answers}

    def kept(**options) -> tuple[list[str], dict[str, int]]:
        rows, counts = pair_up_all(prompts, made, **options)
        return [row["id"] for row in rows], {k: v for k, v in counts.items() if k.startswith("left_out")}

    assert kept() == (["longer", "shorter", "turned", "equal"], {})
    left_out = {"left_out_better_is_equal": 1}
    assert kept(chosen_length="longer") == (["longer"], left_out | {"left_out_better_is_shorter": 2})
    assert kept(chosen_length="shorter") == (["shorter", "turned"], left_out | {"left_out_better_is_longer": 1})


def test_question_is_never_on_both_sides():
    """Duplicated questions across train and eval would let the evaluation see the training data."""
    prompts = [prompt(f"p{i}", question=f"q{i // 4}") for i in range(400)]
    made = {p["id"]: judgments(right=1, wrong=1) for p in prompts}
    rows, counts = pair_up_all(prompts, made, eval_fraction=0.3)
    splits = {}
    for row in rows:
        assert splits.setdefault(row["prompt"][1]["content"], row["split"]) == row["split"]
    assert 15 < sum(split == "eval" for split in splits.values()) < 45  # of 100 questions
    assert counts["eval"] == sum(row["split"] == "eval" for row in rows)


def test_rows_are_the_conversational_preference_format():
    """What other trainers read: message lists; the prompt is the judge's own."""
    (row,), _ = pair_up_all([prompt("p")], {"p": judgments(right=1, wrong=1)})
    assert row["prompt"] == judge_messages("q", "a", "b")
    assert row["chosen"] == [{"role": "assistant", "content": judgment_text("right 0", 1)}]
    assert row["rejected"] == [{"role": "assistant", "content": judgment_text("wrong 0", 2)}]
    assert (row["id"], row["label"], row["pair_type"]) == ("p", 1, "repeated")


def test_prompts_without_a_pair_are_counted_with_the_reason():
    """A base model that is always right, or never parses, shows here."""
    made = {"right": judgments(right=8), "wrong": judgments(wrong=4, unparsed=4)}
    made["good"] = judgments(right=1, wrong=1, hint=CUT, hint_reversed=REVERSED)
    prompts = [prompt(id) for id in ("good", "right", "wrong", "absent")]
    _, counts = pair_up_all(prompts, made)
    assert counts["prompts_without_pair"] == 3
    assert [counts[f"because_{why}"] for why in ("only_right_judgments", "no_right_judgment", "not_sampled")] == [1] * 3
    assert counts["hints_without_the_label"] == 1


def test_no_pair_at_all_is_an_input_error():
    """An empty file would fail two stages later."""
    with pytest.raises(InputError, match="no pair can be made: prompts_without_pair 1, because_only_right_judgments 1"):
        pair_up_all([prompt("p")], {"p": judgments(right=8)})


@pytest.fixture
def run(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [prompt("p") | {"source": "s", "subset": ""}])
    write_jsonl(tmp_path / "repeated.jsonl", judgments(right=2, wrong=2))
    write_jsonl(tmp_path / "hinted.jsonl", judgments(hint=HINT, hint_reversed=REVERSED))
    return tmp_path


def fails(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(build_pairs, PairsOptions, None, list(map(str, argv)))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_stage_writes_pairs_and_manifest(run):
    """The manifest names all three inputs, so that the chain is unbroken."""
    build_pairs(PairsOptions(run_dir=run))
    manifest = json.loads((run / "pairs.jsonl.manifest.json").read_text("utf-8"))
    *files, judge = manifest["inputs"]
    assert [Path(i["path"]).name for i in files] == ["prompts.jsonl", "repeated.jsonl", "hinted.jsonl"]
    assert judge["path"].startswith("judge con-j ")
    assert manifest["num_rows"] == len(read_jsonl(run / "pairs.jsonl")) == 3
    assert (manifest["counts"]["repeated"], manifest["counts"]["hinted"]) == (2, 1)


def many_judgments(num_prompts: int, num_ids: int) -> tuple[list, list]:
    """Prompts, and judgments of each with long lists of token ids."""
    prompts = [prompt(f"p{i}") | {"source": "s", "subset": ""} for i in range(num_prompts)]
    made = [judgment(judgment_text(f"{i} {j}", 1 + j % 2), id=f"p{i}") for i in range(num_prompts) for j in range(4)]
    return prompts, [row | {"token_ids": [1000] * num_ids} for row in made]


def test_the_order_of_judgments_in_their_file_changes_no_byte(run):
    """They are read where they stand, prompt by prompt."""
    prompts, rows = many_judgments(30, 3)
    write_jsonl(run / "prompts.jsonl", prompts)
    found = []
    for order in (rows, random.Random(0).sample(rows, len(rows))):
        write_jsonl(run / "repeated.jsonl", order)
        build_pairs(PairsOptions(run_dir=run, pair_types=("repeated",)))
        found.append((run / "pairs.jsonl").read_bytes())
        (run / "pairs.jsonl").unlink()
        manifest_path(run / "pairs.jsonl").unlink()
    assert found[0] == found[1] and found[0].count(b"\n") == 60


def test_judgments_and_pairs_are_not_held_in_memory(run):
    """80,000 prompts once took 17 GB. The negative control: all rows at once."""
    prompts, rows = many_judgments(100, 500)
    write_jsonl(run / "prompts.jsonl", prompts)
    write_jsonl(run / "repeated.jsonl", rows)

    def peak(work) -> int:
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    del rows
    size = (run / "repeated.jsonl").stat().st_size
    assert peak(lambda: build_pairs(PairsOptions(run_dir=run, pair_types=("repeated",)))) < 0.5 * size
    assert peak(lambda: read_jsonl(run / "repeated.jsonl")) > size


def test_hinted_judgments_are_needed_only_for_hinted_pairs(run, capsys):
    """The ablation without hints needs no hinted sampling; the default says what is missing."""
    (run / "hinted.jsonl").unlink()
    assert "hinted.jsonl: no such file; leave hinted pairs out of --pair-types" in fails(capsys, "--run-dir", run)
    build_pairs(PairsOptions(run_dir=run, pair_types=("repeated",)))
    assert len(read_jsonl(run / "pairs.jsonl")) == 2


@pytest.mark.parametrize(("change", "message"), [
    ({"id": "other"}, "id 'other' is not in prompts.jsonl"),
    ({"verdict": 3}, "expected verdict 1, 2 or null, found 3"),
    ({"kind": "hint_wrong"}, "expected kind repeated, hint or hint_reversed, found 'hint_wrong'"),
])  # fmt: skip
def test_judgment_that_does_not_fit_is_named(change, message, run, capsys):
    """Judgments of another run's prompts would otherwise be dropped without a word."""
    a, b, c, _ = judgments(right=2, wrong=2)
    write_jsonl(run / "repeated.jsonl", [a, b, c | change])
    assert fails(capsys, "--run-dir", run) == f"error: {run}/repeated.jsonl:3: {message}"


def test_unfinished_sampling_is_refused(run, capsys):
    """Pairs from half of the judgments would look like a complete stage."""
    write_sealed(manifest_path(run / "repeated.jsonl"), {"inputs": [], "options": {}, "complete": False})
    assert "repeated.jsonl: was cut short; run its stage again" in fails(capsys, "--run-dir", run)


@pytest.mark.parametrize("option", ["--eval-fraction=1", "--chosen-length=no", "--max-hinted=-1", "--pair-types=other"])
def test_options_out_of_range_are_refused_before_anything_is_read(option, run, capsys):
    fails(capsys, "--run-dir", run, option)
    assert not (run / "pairs.jsonl.manifest.json").exists()
