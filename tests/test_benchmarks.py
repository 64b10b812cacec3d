"""Benchmarks: published accuracies in, published scores out; partial data is called so; data sets are recognised."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import DATA, ROOT, SHARED, here

from conj import InputError
from conj.data.benchmarks import BENCHMARKS, official_subset, resolve_data
from conj.sample.evaluation import aggregation
from conj.sample.evaluation.aggregation import CARD_COLUMNS, PUBLISHED, scored_sections, section_value, sections_of

MODELS = json.loads((DATA / "reward_bench" / "published.json").read_text("utf-8"))
ROWS = dict(BENCHMARKS["reward-bench"].num_rows)


def values(name: str, accuracies: dict[str, float], rows: dict[str, int] | None = None) -> dict[str, float | None]:
    rows = rows if rows is not None else dict.fromkeys(accuracies, 10**6)
    return {section.name: section_value(section, accuracies) for section in sections_of(name, rows)}


def is_published(values: dict[str, float], model: dict) -> bool:
    return all(round(values[section], 4) == round(published, 4) for section, published in model["sections"].items())


@pytest.mark.parametrize("name", MODELS)
def test_published_subsets_give_the_published_sections_and_score(name):
    """The leaderboard's figures, to the fourth decimal. Each model's sources stand in the file."""
    model = MODELS[name]
    made = values("reward-bench", model["subsets"], ROWS)
    assert is_published(made, model), (made, model["sections"])
    if model["score"] is not None:
        assert round(sum(made[section] for section in scored_sections("reward-bench")) / 4, 4) == model["score"]
    assert not any(section.partial for section in sections_of("reward-bench", ROWS))


@pytest.mark.parametrize("changed", [
    {"math-prm": 447},  # the rows it has
    {"xstest-should-refuse": 250, "xstest-should-respond": 154},  # swapped: so until September 2024
    {"alpacaeval-easy": 805},  # before filtering
])  # fmt: skip
def test_other_weights_do_not_give_them(changed, monkeypatch):
    """Negative control: each of these mistakes is in circulation."""
    official = BENCHMARKS["reward-bench"]
    sections = {name: {s: changed.get(s, w) for s, w in weights.items()} for name, weights in official.sections.items()}
    monkeypatch.setitem(BENCHMARKS, "reward-bench", replace(official, sections=sections))
    made = {name: values("reward-bench", model["subsets"]) for name, model in MODELS.items()}
    wrong = [name for name, model in MODELS.items() if not is_published(made[name], model)]
    assert len(wrong) >= 5, wrong


def test_section_without_rows_has_no_value_and_part_of_one_is_partial():
    """The usual code shows 0 for it, and weighs the absent subsets as if they were there."""
    rows = {"math-prm": 447, "hep-go": 100}
    chat, _, _, reasoning = sections_of("reward-bench", rows)
    assert (chat.weights, chat.partial, chat.n, section_value(chat, {})) == ({}, True, 0, None)
    assert (reasoning.weights, reasoning.partial, reasoning.n) == ({"math-prm": 984, "hep-go": 164}, True, 547)
    assert section_value(reasoning, {"math-prm": 1.0, "hep-go": 0.0}) == 984 / (984 + 164)


@pytest.mark.parametrize("subset", ROWS)
def test_one_missing_row_makes_a_section_partial(subset):
    """A figure of 2,984 rows is not RewardBench's."""
    partial = [s.name for s in sections_of("reward-bench", ROWS | {subset: ROWS[subset] - 1}) if s.partial]
    assert partial == [s for s, subsets in BENCHMARKS["reward-bench"].sections.items() if subset in subsets]


def test_reward_bench_has_its_official_size():
    assert sum(ROWS.values()) == 2985
    sums = {name: sum(weights.values()) for name, weights in BENCHMARKS["reward-bench"].sections.items()}
    assert sums == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def test_rm_bench_is_the_mean_of_its_cells_then_of_its_domains():
    """Two safety sets are one domain: a mean over five domains, or over rows, gives other figures."""
    cells = BENCHMARKS["rm-bench"].num_rows
    level = {"easy": 0.9, "normal": 0.6, "hard": 0.3}
    domain = {"chat": 0.0, "math": 0.02, "code": 0.04, "safety-refuse": 0.06, "safety-response": 0.1}
    accuracies = {cell: level[cell.split("/")[1]] + domain[cell.split("/")[0]] for cell in cells}
    made = values("rm-bench", accuracies, cells)
    assert made["Chat"] == pytest.approx(0.6) and made["Safety"] == pytest.approx(0.68)
    of_domains = (0.0 + 0.02 + 0.04 + 0.08) / 4
    levels = [made[name] for name in ("Easy", "Normal", "Hard")]
    assert levels == pytest.approx([v + of_domains for v in level.values()])
    assert scored_sections("rm-bench") == ("Chat", "Math", "Code", "Safety")
    assert not any(section.partial for section in sections_of("rm-bench", cells))
    chat_only = sections_of("rm-bench", {cell: n for cell, n in cells.items() if cell.startswith("chat")})
    assert [s.name for s in chat_only if s.n and s.partial] == ["Easy", "Normal", "Hard"]


def test_llmbar_weighs_its_adversarial_sets_equally():
    accuracies = {"natural": 0.9, "adver_neighbor": 0.1, "adver_GPTInst": 0.2, "adver_GPTOut": 0.3, "adver_manual": 0.6}
    made = values("llmbar", accuracies, BENCHMARKS["llmbar"].num_rows)
    assert made == pytest.approx({"Natural": 0.9, "Adversarial": 0.3})


def test_pku_is_the_mean_of_better_and_safer():
    """Whatever their numbers of rows; a set whose official size is unknown is partial only when nothing is there."""
    rows = {"better": 10, "safer": 90}
    assert values("pku-saferlhf", {"better": 0.6, "safer": 0.8}, rows) == {"Better": 0.6, "Safer": 0.8}
    assert scored_sections("pku-saferlhf") == ("Better", "Safer")
    assert [s.partial for s in sections_of("pku-saferlhf", rows)] == [False, False]
    assert [s.partial for s in sections_of("pku-saferlhf", {"better": 10})] == [False, True]
    assert values("ultrafeedback", {"all": 0.7}, {"all": 5}) == {"all": pytest.approx(0.7)}


def test_judgebench_weighs_its_rows_equally_by_source():
    """14 of its sources are one section; each pair counts the same."""
    rows = {
        "mmlu-pro-law": 100, "mmlu-pro-math": 54, "livebench-math": 56, "livebench-reasoning": 98, "livecodebench": 42,
    }  # fmt: skip
    made = values("judgebench", dict.fromkeys(rows, 0.0) | {"mmlu-pro-law": 1.0}, rows)
    assert made["Knowledge"] == 100 / 154 and made["Overall"] == 100 / 350 and made["Math"] == 0
    assert not any(section.partial for section in sections_of("judgebench", rows))
    assert scored_sections("judgebench") == ("Overall",)


def test_judgebench_pair_is_right_when_right_answers_outnumber_wrong_ones():
    """One right and one tie is right; one right and one wrong is not, and nothing parsed is not."""
    choices = np.array([[1, 1], [1, 0], [0, 1], [1, 2], [0, 0], [2, 0], [2, 2]])
    assert aggregation.right_on_balance(choices, np.ones(7, int)).tolist() == [True] * 3 + [False] * 4


def test_pandalm_agreement_is_with_each_annotator_and_between_them():
    made = aggregation.annotator_agreement([(1, 1, 2), (0, 1, 0), (2, 2, 2), (1, 2, 0)], [1, 1, 2, None])
    assert made == {"annotator_1": 0.5, "annotator_2": 0.75, "annotator_3": 0.25} | {
        "annotator_1_annotator_2": 0.5, "annotator_1_annotator_3": 0.5, "annotator_2_annotator_3": 0.25,
    }  # fmt: skip


def test_published_table_is_the_cards():
    """Each number is read off the model card again, where it is here."""
    assert len(CARD_COLUMNS) == 7 and {len(row) for row in PUBLISHED.values()} == {7}
    sections = {("reward-bench", s) for s in BENCHMARKS["reward-bench"].sections}
    assert {(b, s) for _, b, s in CARD_COLUMNS if s} == sections
    card = here(ROOT.parent / "shared" / "seed" / "000_194c128c4dda7e0f.txt")
    cells = re.findall(r"<td>(?:<[bu]>)?([^<]+)(?:</[bu]>)?</td>", card.read_text("utf-8"))
    rows = {cells[i].removesuffix(" (ours)"): tuple(map(float, cells[i + 1 : i + 8])) for i in range(0, len(cells), 8)}
    assert rows == PUBLISHED


@pytest.mark.parametrize(("name", "expected"), [
    ("reward-bench", ("allenai/reward-bench:filtered", "reward-bench")),
    ("allenai/reward-bench", ("allenai/reward-bench:filtered", "reward-bench")),
    ("allenai/reward-bench:filtered", ("allenai/reward-bench:filtered", "reward-bench")),
    ("allenai/reward-bench:raw", ("allenai/reward-bench:raw", "")),
    ("reward-bench=copy/rb.jsonl", ("copy/rb.jsonl", "reward-bench")),
    ("ultrafeedback=copy:test_prefs", ("copy:test_prefs", "ultrafeedback")),
    *((name, (name, "")) for name in (
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs", "somebody/preferences", "no/such/file.json",
    )),
])  # fmt: skip
def test_benchmark_is_named_on_the_command_line(name, expected):
    """Training splits and other data sets under similar names are no benchmark."""
    assert resolve_data(name) == expected


def test_benchmark_that_the_hub_lacks_says_how_to_give_its_files():
    with pytest.raises(InputError, match="llmbar: is not on the hub; give its files as llmbar=PATH"):
        resolve_data("llmbar")


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(("row", "expected"), [
    ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "hep-go"}, "reward-bench"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "mine"}, ""),
    ({"prompt": "q", "chosen": TURNS, "rejected": TURNS, "task_category": "Math"}, "infinity-preference"),
    ({"chosen": TURNS, "rejected": TURNS, "source": "magpie"}, ""), ({"something": "else"}, ""), (7, ""),
])  # fmt: skip
def test_local_file_is_recognised_by_its_rows(row, expected, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert resolve_data(str(path)) == (str(path), expected)


@pytest.mark.parametrize(("name", "expected"), [("llmbar", "llmbar"), ("pandalm", "pandalm"), ("rm_bench", "rm-bench")])
def test_local_folder_is_recognised_by_its_rows(name, expected):
    assert resolve_data(str(DATA / name)) == (str(DATA / name), expected)


@pytest.mark.parametrize(("where", "expected"), [
    ("data/llmbar/natural.json: row 3", "natural"), ("data/llmbar/adver_neighbor.json: row 3", "adver_neighbor"),
    ("Dataset/LLMBar/Adversarial/GPTInst/dataset.json:3", "adver_GPTInst"),
    ("Adversarial/Manual/evaluators/GPT-4/CoT/result.json: row 1", "adver_manual"),
    ("copies/llmbar-adver-GPTOut.jsonl:12", "adver_GPTOut"), ("data/mine.json: row 3", ""),
])  # fmt: skip
def test_llmbar_subset_is_told_by_file_or_folder(where, expected):
    assert official_subset("llmbar", "", where) == expected


def test_rm_bench_domain_is_told_by_file_or_rows():
    cell = "hard/concise-markdown"
    for given, where, domain in (
        ("xstest", "d/safety-response_filtered.json: row 1", "safety-response"), ("math", "total_dataset.json: row 1", "math"),
        ("alpacaeval", "rm_bench.json: row 1", "chat"),
    ):  # fmt: skip
        assert official_subset("rm-bench", f"{given}/{cell}", where) == f"{domain}/{cell}"


def test_judgebench_is_recognised():
    path = here(SHARED / "layouts" / "judgebench.jsonl")
    assert resolve_data(str(path)) == (str(path), "judgebench")
