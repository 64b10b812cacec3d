"""Existing judgments: published runs reproduce their published counts, conj's own must fit the data they judged."""

import json
from pathlib import Path

import pytest
from conftest import DATA, SHARED, here

from conj import InputError
from conj.data.files import write_jsonl
from conj.data.manifest import manifest_path, write_sealed
from conj.data.preprocess import load_prompts
from conj.sample.evaluation.judgments import read_judgments_file

RESULT = DATA / "llmbar_judge_outputs" / "adver_neighbor" / "Falcon_CoT" / "result.json"
LLMBAR, PANDALM = str(DATA / "llmbar"), str(DATA / "pandalm" / "testset-v1.json")


def statistics(judgments: list[dict]) -> dict[str, str]:
    """LLMBar's counts: right as shown, right swapped, their mean, right in both, and the same answer in both orders
    (which two unparsed judgments also give)."""
    rows = {}
    for row in judgments:
        rows.setdefault(row["id"], {})[row["order"]] = row
    n = len(rows)
    right = {order: sum(pair[order]["choice"] == pair[order]["label"] for pair in rows.values()) for order in (1, 2)}
    both = sum(all(row["choice"] == row["label"] for row in pair.values()) for pair in rows.values())
    equal = sum(pair[1]["choice"] == pair[2]["choice"] for pair in rows.values())
    counts = {"correct_False": right[1], "correct_True": right[2], "correct_both": both, "equal": equal}
    shares = {name: f"{count} / {n} = {count / n * 100:.6f}%" for name, count in counts.items()}
    return shares | {"correct_average": f"{(right[1] + right[2]) / n / 2 * 100:.6f}%"}


def published_statistics(path: Path) -> dict[str, str]:
    published = json.loads((path.parent / "statistics.json").read_text("utf-8"))
    published = {name: text for name, text in published.items() if not name.startswith("kappa")}
    parts = {name: text.removesuffix("%").rpartition(" ") for name, text in published.items()}
    return {name: f"{head}{space}{float(number):.6f}%" for name, (head, space, number) in parts.items()}


def check_statistics(path: Path) -> None:
    prompts, judgments = read_judgments_file(path)
    assert statistics(judgments) == published_statistics(path)
    assert len(judgments) == 2 * len(prompts)


def test_llmbar_run_gives_its_published_counts():
    """All five of `statistics.json`; winners are told in the order of the file, whichever answer stood first."""
    check_statistics(RESULT)


@pytest.mark.parametrize("judge", ["ChatGPT_CoT", "Falcon_CoT", "GPT-4_CoT", "GPT-4_Vanilla"])
@pytest.mark.parametrize("subset", ["natural", "adver_neighbor"])
def test_every_llmbar_run_gives_its_published_counts(subset, judge):
    check_statistics(here(SHARED / "llmbar_judge_outputs" / subset / judge / "result.json"))


def test_swapping_the_swapped_winners_again_gives_other_counts():
    """Negative control: what a reader that maps `winner` back a second time would report."""
    _, judgments = read_judgments_file(RESULT)
    wrong = [row | {"choice": row["verdict"]} for row in judgments]
    assert statistics(wrong) != published_statistics(RESULT)


def test_llmbar_prompts_stand_in_the_order_of_the_file():
    """Published verdicts belong to that order: after a coin half of them would be for the other answer."""
    prompts, judgments = read_judgments_file(RESULT)
    source = json.loads(RESULT.read_text("utf-8"))
    for prompt, row in zip(prompts, source, strict=True):
        assert [prompt[k] for k in ("question", "answer_1", "answer_2", "label")] == list(row.values())[:4]
    assert {(row["benchmark"], row["subset"]) for row in prompts} == {("llmbar", "adver_neighbor")}
    first, second = judgments[:2]
    assert (first["order"], first["verdict"], first["choice"], first["rung"]) == (1, 1, 1, "published")
    assert (second["order"], second["verdict"], second["choice"]) == (2, 1, 2)
    assert first["text"].startswith("Output (a) provides three tips") and first["sample"] == 0


def test_repeated_rows_of_a_published_run_all_count(tmp_path):
    """Its counts are over rows, repeated or not."""
    row = json.loads(RESULT.read_text("utf-8"))[0]
    (tmp_path / "result.json").write_text(json.dumps([row] * 3))
    prompts, judgments = read_judgments_file(tmp_path / "result.json")
    id = prompts[0]["id"]
    assert [prompt["id"] for prompt in prompts] == [id, f"{id}-2", f"{id}-3"] and len(judgments) == 6


def test_limit_and_subsets_select_rows():
    prompts, judgments = read_judgments_file(RESULT, limit=5)
    assert (len(prompts), len(judgments)) == (5, 10)
    with pytest.raises(InputError, match="--subsets: no records of 'natural'"):
        read_judgments_file(RESULT, subsets=["natural"])


def agreements(name: str, data: str, folder: Path) -> int:
    prompts, judgments = read_judgments_file(folder / f"{name}-testset-v1.json", [data])
    assert [row["label"] for row in judgments] == [prompt["label"] for prompt in prompts]
    assert {row["order"] for row in judgments} == {1}
    return sum(row["choice"] == row["label"] for row in judgments)


@pytest.mark.parametrize(("name", "expected"), [("gpt-3.5-turbo", 697), ("pandalm-7b", 667)])
def test_pandalm_judges_agree_with_the_majority_as_published(name, expected):
    """`Tie` and 0 are ties, which count where the majority is a tie; `garbage` is no verdict."""
    assert agreements(name, str(here(SHARED / "pandalm") / "testset-v1.json"), SHARED / "pandalm") == expected


@pytest.mark.parametrize(("name", "expected"), [("gpt-3.5-turbo", 8), ("pandalm-7b", 6)])
def test_pandalm_results_are_matched_by_idx(name, expected, tmp_path):
    """The fixture's rows are not in the order of the test set's; a shuffled copy gives the same."""
    folder = DATA / "pandalm_outputs"
    assert agreements(name, PANDALM, folder) == expected
    rows = json.loads((folder / f"{name}-testset-v1.json").read_text("utf-8"))
    (tmp_path / f"{name}-testset-v1.json").write_text(json.dumps(rows[::-1]))
    assert agreements(name, PANDALM, tmp_path) == expected


def judgments_of(prompts: list[dict]) -> list[dict]:
    """A judge that always takes what stands first."""
    row = {"sample": 0, "text": "t", "verdict": 1, "rung": "json", "finish_reason": "stop", "token_ids": [1, 2]}
    by_prompt = [row | {"id": prompt["id"], "label": prompt["label"]} for prompt in prompts]
    return [row | {"order": order, "choice": order} for row in by_prompt for order in (1, 2)]


@pytest.fixture
def own(tmp_path) -> tuple[Path, list[dict]]:
    prompts, _ = load_prompts([LLMBAR], limit=20, benchmark=True)
    path = tmp_path / "judgments_mine.jsonl"
    write_jsonl(path, judgments_of(prompts))
    return path, prompts


@pytest.mark.parametrize("limit", [20, 5])
def test_own_judgments_come_back_with_their_prompts(limit, own):
    """A part of what was judged may be scored by itself: judgments of the rest are no mistake."""
    path, prompts = own
    expected = prompts[:limit]
    assert read_judgments_file(path, [LLMBAR], limit=limit) == (expected, judgments_of(expected))


def test_unanswered_prompts_stay_if_the_manifest_says_that_they_were_too_long(own):
    """Prompts that fit no context have no rows. A file that lost rows otherwise is not scored as if it were whole."""
    path, prompts = own
    write_jsonl(path, judgments_of(prompts[3:]))
    with pytest.raises(InputError, match="3 prompts of the data without a judgment"):
        read_judgments_file(path, [LLMBAR], limit=20)
    sealed = {"inputs": [], "options": {}, "complete": True}
    overlong = [prompt["id"] for prompt in prompts[:3]]
    write_sealed(manifest_path(path), sealed | {"counts": {"overlong_ids": overlong}})
    found, rows = read_judgments_file(path, [LLMBAR], limit=20)
    assert found == prompts and len(rows) == 34
    write_sealed(manifest_path(path), sealed | {"counts": {"overlong_ids": overlong[:2]}})
    with pytest.raises(InputError, match=f"1 prompts of the data without a judgment: {overlong[2]}"):
        read_judgments_file(path, [LLMBAR], limit=20)


def test_cut_short_or_repeated_judgments_are_refused(own):
    """Half a run would be scored as if the rest were overlong, and a judgment that stands twice counts twice."""
    path, prompts = own
    write_sealed(manifest_path(path), {"inputs": [], "options": {}, "complete": False})
    with pytest.raises(InputError, match="judgments_mine.jsonl: was cut short; run its stage again"):
        read_judgments_file(path, [LLMBAR], limit=20)
    manifest_path(path).unlink()
    rows = judgments_of(prompts)
    write_jsonl(path, [*rows, rows[3]])
    with pytest.raises(InputError, match=rf"1 judgments .* appear twice: {rows[3]['id']} 2 0"):
        read_judgments_file(path, [LLMBAR], limit=20)


def test_judgments_of_other_prompts_are_refused(own, tmp_path):
    """Scored against other questions they would mean nothing."""
    path, _ = own
    with pytest.raises(InputError, match=r"20 judgments of prompts that are not in the data: \w{16}, .* and 10 more$"):
        read_judgments_file(path, [PANDALM])
    with pytest.raises(InputError, match="expected the data that was judged, found no --data"):
        read_judgments_file(path)


def test_judgments_of_another_seed_are_refused(own):
    """The coin fell otherwise: choices would be for the other answer."""
    with pytest.raises(InputError, match="have another label than the data; was another --seed used"):
        read_judgments_file(own[0], [LLMBAR], seed=7, limit=20)


@pytest.mark.parametrize(("change", "message"), [
    ({"order": 3}, "expected order to be one of 1, 2; found 3"), ({"order": True}, "expected order to be int"),
    ({"verdict": 5}, "expected verdict to be one of None, 0, 1, 2; found 5"),
    ({"verdict": "1"}, "expected verdict to be one of None, 0, 1, 2; found '1'"),
    ({"choice": 2}, "expected choice 1, of verdict 1 in order 1; found 2"), ({"text": None}, "expected text to be str"),
    *(({name: value}, f".*{name}|found others of 1") for name, value in (
        ("sample", "x"), ("sample", -1), ("sample", 10_000_000), ("sample", 0.5), ("p_first", 7.0), ("p_first", "a"),
        ("token_ids", 5), ("completion_tokens", "a"), ("dollars", "a"),
    )),
])  # fmt: skip
def test_a_row_that_no_judge_of_ours_wrote_is_refused(change, message, own):
    """Taken as they are, such rows become figures, or end the report after it has cost what it costs."""
    path, prompts = own
    rows = judgments_of(prompts)
    write_jsonl(path, [*rows[:2], rows[2] | change, *rows[3:]])
    with pytest.raises(InputError, match=rf"judgments_mine\.jsonl:3: {message}"):
        read_judgments_file(path, [LLMBAR], limit=20)


@pytest.mark.parametrize(("results", "message"), [
    ([{}], "expected results with 'swap = False' and its winner"),
    ([{"swap = False": {"winner": "a"}, "swap = True": {"winner": "1"}}], "expected winner '1', '2' or null; found 'a'"),
    ([{"swap = False": {"winner": [1]}}], r"expected winner .*; found \[1\]"),
    ("none", "expected results to be list"),
])  # fmt: skip
def test_malformed_llmbar_row_is_named(results, message, tmp_path):
    good = json.loads(RESULT.read_text("utf-8"))[0]
    (tmp_path / "result.json").write_text(json.dumps([good, good | {"results": results}]))
    with pytest.raises(InputError, match=rf"result\.json: row 2: {message}"):
        read_judgments_file(tmp_path / "result.json")


@pytest.mark.parametrize(("rows", "message"), [
    ([{"idx": 18, "x_result": "3"}], "row 1: expected x_result to be one of 0, 1, 2, Tie, garbage; found '3'"),
    ([{"idx": 18, "x_result": 1}] * 2, "row 2: idx 18 appears twice"),
    ([{"idx": 18, "x_result": 1}, {"idx": 1}], "row 2: missing column x_result; found idx"),
    ([{"idx": 5000, "x_result": 1}], "1 results whose idx is not in the data: 5000"),
    ([{"idx": 18, "x_result": 1}], r"11 rows of the data without a result: 91, .* and 1 more"),
])  # fmt: skip
def test_malformed_pandalm_results_are_named(rows, message, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rf"out\.json: {message}"):
        read_judgments_file(tmp_path / "out.json", [PANDALM])


def test_pandalm_results_need_its_test_set():
    with pytest.raises(InputError, match="expected --data with PandaLM's test set alone"):
        read_judgments_file(DATA / "pandalm_outputs" / "pandalm-7b-testset-v1.json", [LLMBAR])


def test_every_prompt_has_the_same_orders_and_samples(own):
    """A file that lost single rows would count them as judgments without a verdict."""
    path, prompts = own
    write_jsonl(path, judgments_of(prompts)[1:])
    with pytest.raises(InputError, match=f"expected 2 judgments of each prompt .* of 1: {prompts[0]['id']}"):
        read_judgments_file(path, [LLMBAR], limit=20)
    write_jsonl(path, [row for row in judgments_of(prompts) if row["order"] == 1])  # one order is as good
    assert len(read_judgments_file(path, [LLMBAR], limit=20)[1]) == 20
