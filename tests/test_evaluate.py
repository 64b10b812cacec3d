"""Evaluation: figures computed by hand, judges whose bias is known, and both orders of the answers."""

import json

import numpy as np
import pytest
from conftest import DATA, assert_one_line_error, command, judgment_text, succeeds
from fake_engine import use_fake_engine
from test_endpoint import serving

from conj.data.files import read_jsonl, write_jsonl
from conj.sample.evaluation.evaluate import EvaluateOptions, evaluate, shown_in_one_order
from conj.sample.evaluation.figures import Judged, score_all
from conj.sample.evaluation.scores import bootstrap, compare, figure_ratios, summarize

# Six questions: right twice; right, then wrong; wrong twice; unparsed, then right; unparsed twice; right twice.
CHOICES = np.array([[1, 1], [2, 1], [1, 1], [0, 2], [0, 0], [2, 2]])
LABELS = np.array([1, 2, 2, 2, 1, 2])
LONGER = np.array([1, 1, 1, 0, 2, 2])
BY_HAND = {
    "n": 6,
    "accuracy": (2 + 1 + 0 + 1.5 + 1 + 2) / 12,
    "accuracy_order_1": (1 + 1 + 0 + 0.5 + 0.5 + 1) / 6,
    "accuracy_order_2": (1 + 0 + 0 + 1 + 0.5 + 1) / 6,
    "both_right": 2 / 6,
    "consistency": 3 / 6,
    "unparsed": 3 / 12,
    # As written: 1 2 / 2 2 / 1 2 / - 1 / - - / 2 1
    "first_position_rate": 4 / 9,
    # Of the questions whose answers differ in length: 1 1 / 2 1 / 1 1 / - - / 2 2
    "longer_answer_rate": 7 / 8,
    "accuracy_longer_right": 4 / 4,
    "accuracy_shorter_right": (1 + 0 + 1) / 6,
    "longer_is_right": (1 + 0 + 0 + 0.5 + 0 + 1) / 6,  # of the questions alone
}


def test_the_figures_are_those_computed_by_hand():
    """The definitions of the README, on every kind of question."""
    summary = summarize(figure_ratios(CHOICES, LABELS, LONGER), 100, 0)
    assert {name: summary[name] for name in BY_HAND} == pytest.approx(BY_HAND)


def test_a_swap_that_is_not_undone_shows():
    """The negative control: verdicts of the second order taken as written give other figures."""
    as_written = CHOICES.copy()
    as_written[:, 1] = np.where(CHOICES[:, 1] == 0, 0, 3 - CHOICES[:, 1])
    summary = summarize(figure_ratios(as_written, LABELS, LONGER), 100, 0)
    for name in ("accuracy", "consistency", "both_right", "first_position_rate"):
        assert summary[name] != pytest.approx(BY_HAND[name]), name


def test_nothing_to_count_is_none():
    """0 of 0 shown as 0 % would read as a finding."""
    summary = summarize(figure_ratios(np.zeros((3, 2), int), np.array([1, 2, 1]), np.zeros(3, int)), 100, 0)
    assert summary["accuracy"] == 0.5 and summary["unparsed"] == 1.0
    for name in ("first_position_rate", "longer_answer_rate", "accuracy_longer_right"):
        assert summary[name] is None and summary[f"{name}_ci95"] is None


def test_intervals_are_those_of_the_normal_approximation():
    """600 independent questions, 70 % right: ±1.96·sqrt(.7·.3/600). Resampling judgments, not questions, would give
    intervals narrower by √2."""
    rights = np.repeat([1, 2], [420, 180])
    summary = summarize(figure_ratios(np.stack([rights] * 2, 1), np.ones(600, int), np.ones(600, int)), 4000, 1)
    low, high = summary["accuracy_ci95"]
    width = 1.96 * np.sqrt(0.7 * 0.3 / 600)
    assert (low, high) == pytest.approx((0.7 - width, 0.7 + width), abs=0.004)


def test_the_same_seed_resamples_the_same_questions_for_both_judges():
    """A judge compared with itself has changed by nothing, with certainty."""
    ratios = figure_ratios(CHOICES, LABELS, LONGER)
    assert compare(ratios, ratios, 200, 3)["accuracy_ci95"] == [0.0, 0.0]
    assert not np.array_equal(bootstrap(ratios, 50, 1)["accuracy"], bootstrap(ratios, 50, 2)["accuracy"])


# ---- The stage ----


def make_benchmark(path, count: int = 12, topic: str = "q"):
    """Right answers say `right`; the longer answer is right in a third of the pairs."""
    pairs = [("right" + " so" * (5 * (i % 3 == 0)), "wrong" + " no" * (i % 3 > 0)) for i in range(count)]
    write_jsonl(path, [{"prompt": f"{topic}{i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)])
    return str(path)


def first_and_second(prompt: str) -> tuple[str, str]:
    first, second = prompt.rpartition("\n回答1：")[2].split("\n回答2：")
    return first, second.removesuffix("\nassistant\n")


def knows(prompt: str) -> str:
    return judgment_text("r", 1 if first_and_second(prompt)[0].startswith("right") else 2)


def takes_first(prompt: str) -> str:
    return judgment_text("r", 1)


def report_of(run, *data, **options) -> dict:
    """The report of a run folder, after another evaluation on `data` where there is any."""
    if data:
        evaluate(EvaluateOptions(run_dir=run, data=data, num_resamples=50, **options))
    return json.loads((run / "report.json").read_text())


def judge_with(write, model, folder, monkeypatch, **options) -> dict:
    """The figures of a base model that writes `write(prompt)`."""
    use_fake_engine(monkeypatch, write)
    return report_of(folder, make_benchmark(folder / "test.jsonl"), model=model, **options)["judges"]["base"]


def test_a_judge_that_knows_is_right_in_both_orders(tied_model, tmp_path, monkeypatch):
    """Any mix-up of orders, labels or answers on the way makes a perfect judge imperfect."""
    scores = judge_with(knows, tied_model, tmp_path, monkeypatch)
    assert (scores["accuracy"], scores["consistency"], scores["both_right"], scores["unparsed"]) == (1, 1, 1, 0)
    assert scores["first_position_rate"] == 0.5
    assert {row["choice"] == row["label"] for row in read_jsonl(tmp_path / "judgments_base.jsonl")} == {True}


def test_a_judge_that_takes_the_first_answer_is_never_consistent(tied_model, tmp_path, monkeypatch):
    """Both orders must differ in the prompt, and be told apart in the score."""
    scores = judge_with(takes_first, tied_model, tmp_path, monkeypatch)
    assert (scores["accuracy"], scores["consistency"], scores["first_position_rate"]) == (0.5, 0, 1)


def test_a_judge_that_takes_the_longer_answer_is_found_out(tied_model, tmp_path, monkeypatch):
    """The bias that the demo trains away must be what the report shows."""

    def longer(prompt: str) -> str:
        first, second = first_and_second(prompt)
        return judgment_text("r", 1 if len(first) > len(second) else 2)

    scores = judge_with(longer, tied_model, tmp_path, monkeypatch)
    assert (scores["consistency"], scores["longer_answer_rate"]) == (1, 1)
    assert (scores["accuracy_longer_right"], scores["accuracy_shorter_right"]) == (1, 0)
    assert scores["accuracy"] == pytest.approx(1 / 3)


def test_a_prompt_that_does_not_fit_counts_as_unparsed_and_is_reported(tied_model, tmp_path, monkeypatch):
    """Left out of the figures, it would raise them."""
    use_fake_engine(monkeypatch, lambda prompt: judgment_text("r", 1 if "right" in first_and_second(prompt)[0] else 2))
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "no"} for chosen in ("right", "right " * 2000)]
    write_jsonl(tmp_path / "test.jsonl", rows)
    scores = report_of(tmp_path, str(tmp_path / "test.jsonl"), model=tied_model)["judges"]["base"]
    assert (scores["n"], scores["accuracy"], scores["unparsed"], scores["overlong"]) == (2, 0.75, 0.5, 1)


def test_the_trained_model_is_judged_beside_the_base(tied_model, tmp_path, monkeypatch):
    """`make demo` ends in this comparison; judgments that are there are not made again."""
    data, asked = make_benchmark(tmp_path / "test.jsonl"), use_fake_engine(monkeypatch, takes_first)
    assert "trained" not in report_of(tmp_path, data, model=tied_model)["judges"] and len(asked) == 24
    (tmp_path / "model").symlink_to(tied_model)
    asked = use_fake_engine(monkeypatch, knows)
    report = report_of(tmp_path, data, model=tied_model)
    assert len(asked) == 24
    judges, [change] = report["judges"], report["comparisons"]
    assert (judges["base"]["accuracy"], judges["trained"]["accuracy"], change["accuracy"]) == (0.5, 1, 0.5)
    assert (change["judge"], change["against"]) == ("trained", "base") and change["p_value"] < 0.05


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--model", "nowhere"], ["nowhere", "no such model folder"]),
    (["--num-resamples", "0"], ["--num-resamples", "1 or more", "0"]),
    (["--num-samples", "3"], ["--num-samples", "--temperature"]),
    (["--judge", "nobody"], ["nobody", "con-j"]),
    (["--name", "/../../escaped"], ["--name", "escaped"]),
    (["--seed", "-1"], ["--seed", "0 or more"]),
    (["--max-retries", "-1"], ["--max-retries", "0 or more"]),
    (["--base-url", "http://localhost:1/v1"], ["--base-url", "con-j runs on vLLM"]),
    (["--judge", "gpt-4o"], ["--model", "behind an endpoint"]),
    (["--judgments", "x", "--num-samples", "2", "--temperature", "1"], ["--model, --num-samples", "no model"]),
])  # fmt: skip
def test_bad_input_ends_in_one_line(tied_model, tmp_path, arguments, parts):
    line = ["--run-dir", tmp_path, "--model", tied_model, "--data", make_benchmark(tmp_path / "test.jsonl"), *arguments]
    assert_one_line_error(command("conj.sample.evaluation.evaluate", *line), *parts)


# ---- Several judges, published judgments, votes ----


def test_judges_are_added_one_by_one_to_one_report(tied_model, tmp_path, monkeypatch):
    """Judgments of other data, or unfinished ones, are no judge of this report."""
    data, other = make_benchmark(tmp_path / "test.jsonl"), make_benchmark(tmp_path / "other.jsonl", 3)
    use_fake_engine(monkeypatch, takes_first)
    report_of(tmp_path, data, model=tied_model, judge="qwen2-7b")
    asked = use_fake_engine(monkeypatch, knows)
    report = report_of(tmp_path, data, model=tied_model, name="mine")
    write_jsonl(tmp_path / "judgments_unfinished.jsonl", read_jsonl(tmp_path / "judgments_mine.jsonl")[:5])
    assert len(asked) == 24 and list(report["judges"]) == ["mine", "qwen2-7b"]
    assert [report["judges"][name]["accuracy"] for name in ("mine", "qwen2-7b")] == [1, 0.5]
    assert report["comparisons"][0]["accuracy"] == -0.5
    assert list(report_of(tmp_path, other, model=tied_model, name="of-three")["judges"]) == ["of-three"]


def test_scoring_the_file_again_gives_the_figures_of_judging(tied_model, tmp_path, monkeypatch):
    """Published judgments can be checked without the model; a changed choice shows."""
    data, judgments = make_benchmark(tmp_path / "test.jsonl"), tmp_path / "run" / "judgments_base.jsonl"
    use_fake_engine(monkeypatch, lambda prompt: knows(prompt) if "q3" in prompt else judgment_text("r", 2))
    judged = report_of(tmp_path / "run", data, model=tied_model)["judges"]
    assert report_of(tmp_path / "again", data, judgments=(str(judgments),))["judges"] == judged
    rows = read_jsonl(judgments)
    rows[0] |= {"verdict": 3 - rows[0]["verdict"], "choice": 3 - rows[0]["choice"]}
    write_jsonl(tmp_path / "changed.jsonl", rows)
    again = report_of(tmp_path / "again", data, judgments=(f"base={tmp_path}/changed.jsonl",))["judges"]
    assert again["base"]["accuracy"] != judged["base"]["accuracy"]


def test_published_runs_are_scored_beside_each_other(tmp_path):
    """LLMBar's own counts of one of its judges, from its file (statistics.json): `77 / 134 = …`, or a percentage."""
    [result] = (DATA / "llmbar_judge_outputs").rglob("result.json")
    counts = json.loads(result.with_name("statistics.json").read_text())
    line = ["--run-dir", tmp_path, "--judgments", f"a={result}", f"b={result}"]
    succeeds("conj.sample.evaluation.evaluate", *line)
    report = report_of(tmp_path)
    found, n = report["judges"]["a"], report["judges"]["a"]["n"]
    for published, name in {"correct_both": "both_right", "equal": "consistency"}.items():
        assert f"{round(found[name] * n)} / {n}" == counts[published].partition(" =")[0], name
    adversarial = found["benchmarks"]["llmbar"]["sections"]["Adversarial"]["value"]
    assert f"{100 * adversarial}%" == counts["correct_average"]  # theirs counts no verdict as wrong
    assert found["unparsed"] > 0 and found["accuracy"] > adversarial
    assert report["comparisons"][0]["accuracy"] == 0 and report["comparisons"][0]["p_value"] == 1
    assert found["benchmarks"]["llmbar"]["partial"]


def test_several_samples_vote(tied_model, tmp_path, monkeypatch):
    """A judge that is right in two of three samples is right by majority, and the curve says what one sample gives."""
    count = iter(range(10**6))

    def mostly(prompt: str) -> str:
        verdict = int(knows(prompt)[-2])
        return judgment_text("r", 3 - verdict if next(count) % 3 == 0 else verdict)

    found = judge_with(mostly, tied_model, tmp_path, monkeypatch, num_samples=3, temperature=1.0)
    assert (found["accuracy"], found["num_judgments"], found["n"]) == (1, 72, 12)
    assert [point["accuracy"] for point in found["votes"]] == pytest.approx([2 / 3, 2 / 3, 1])
    rows = read_jsonl(tmp_path / "judgments_base.jsonl")
    assert len({(row["id"], row["order"], row["sample"]) for row in rows}) == 72


def test_part_of_a_benchmark_is_called_partial(tied_model, tmp_path, monkeypatch):
    """A figure of 3 rows of UltraFeedback is not UltraFeedback's."""
    use_fake_engine(monkeypatch, knows)
    data = f"ultrafeedback={make_benchmark(tmp_path / 'test.jsonl')}"
    whole = report_of(tmp_path, data, model=tied_model)["judges"]["base"]["benchmarks"]["ultrafeedback"]
    assert (whole["partial"], whole["score"]["value"], whole["score"]["partial"]) == (False, 1, False)
    judges = report_of(tmp_path / "part", data, model=tied_model, limit=3)["judges"]
    part = judges["base"]["benchmarks"]["ultrafeedback"]
    assert part["partial"] and part["score"]["partial"] and all(s["partial"] for s in part["sections"].values())


def test_an_earlier_judge_is_scored_on_what_it_was_asked(tied_model, tmp_path, monkeypatch):
    """First a few rows, then all, then one more benchmark: what a judge was not asked is no failure of its."""
    use_fake_engine(monkeypatch, knows)
    first, second = make_benchmark(tmp_path / "test.jsonl"), make_benchmark(tmp_path / "more.jsonl", 20, "more")
    report_of(tmp_path, first, model=tied_model, limit=5, name="few")
    report_of(tmp_path, first, model=tied_model, name="one")
    judges = report_of(tmp_path, second, model=tied_model, name="two")["judges"]
    assert {name: (j["n"], j["accuracy"], j["overlong"]) for name, j in judges.items()} == {"two": (20, 1, 0)}
    report = report_of(tmp_path, first, second, model=tied_model, name="both")
    found = {name: (j["n"], j["accuracy"], j["overlong"]) for name, j in report["judges"].items()}
    assert found == {"both": (32, 1, 0), "few": (5, 1, 0), "one": (12, 1, 0), "two": (20, 1, 0)}
    assert report["judges"]["few"]["benchmarks"]["test.jsonl"]["partial"]
    assert [row["n"] for row in report["comparisons"]] == [5, 12, 20]


def test_judgments_of_another_seed_are_left_out(tied_model, tmp_path, monkeypatch, capsys):
    """Ids do not depend on the seed, labels do: its right answers would be counted as wrong."""
    use_fake_engine(monkeypatch, knows)
    data = make_benchmark(tmp_path / "test.jsonl")
    report_of(tmp_path, data, model=tied_model, name="one", seed=1)
    judges = report_of(tmp_path, data, model=tied_model, name="two", seed=2)["judges"]
    assert {name: j["accuracy"] for name, j in judges.items()} == {"two": 1}
    assert "judgments_one.jsonl: of other data or another --seed: left out" in capsys.readouterr().out


def test_foreign_files_end_no_report(tied_model, tmp_path, monkeypatch):
    """A folder, an empty file, a torn one (another judge is being asked at this moment): the judging was paid for."""
    (tmp_path / "judgments_folder.jsonl").mkdir()
    for name, text in (("empty", ""), ("torn", '{"id": "a", "ord')):
        (tmp_path / f"judgments_{name}.jsonl").write_text(text)
    judge_with(knows, tied_model, tmp_path, monkeypatch)
    assert list(report_of(tmp_path)["judges"]) == ["base"]


def test_a_file_with_an_equals_sign_in_its_path_can_be_scored(tied_model, tmp_path, monkeypatch):
    run, again = tmp_path / "lr=1e-6", tmp_path / "again"
    judge_with(knows, tied_model, run, monkeypatch)
    for given, name in ((f"{run}/judgments_base.jsonl", "base"), (f"mine={run}/judgments_base.jsonl", "mine")):
        assert list(report_of(again, str(run / "test.jsonl"), judgments=(given,))["judges"]) == [name]


def test_a_question_is_shown_in_one_order_to_all_judges():
    """Published judgments keep the order of their file, ours the coin's: a choice must stay with its answer."""
    prompt = {"id": "a", "answer_1": "x", "answer_2": "y", "label": 1}
    row = {"id": "a", "order": 1, "verdict": 2, "choice": 2}
    other = prompt | {"answer_1": "y", "answer_2": "x", "label": 2}
    judged = {"ours": Judged(prompts=[prompt], rows=[row]), "theirs": Judged(prompts=[other], rows=[row])}
    prompts, rows = shown_in_one_order(judged)
    assert prompts == [prompt] and rows["ours"] == [row]
    assert rows["theirs"] == [row | {"order": 2, "choice": 1}]


def test_a_drawn_vote_is_undecided_and_not_unparsed(tied_model, tmp_path, monkeypatch):
    """All judgments state a verdict: a share without one would send the reader looking for a broken parser."""
    count = iter(range(10**6))
    write = lambda prompt: judgment_text("r", 1 + next(count) % 2)  # noqa: E731
    found = judge_with(write, tied_model, tmp_path, monkeypatch, num_samples=2, temperature=1.0)
    assert (found["accuracy"], found["unparsed"], found["rungs"]) == (0.5, 0, {"json": 1})


def test_one_order_is_compared_with_the_same_order_of_the_other_judge():
    """A judge that takes the first answer, and its own judgments in one order: nothing differs."""
    shared = {"answer_1": "a", "answer_2": "b", "label": 1, "source": "s", "subset": "", "benchmark": ""}
    prompts = [{"id": f"{i}", "question": f"q{i}", **shared} for i in range(20)]
    row = {"sample": 0, "label": 1, "rung": "json"}
    one, two = ([row | {"id": p["id"], "order": order, "choice": order} for p in prompts] for order in (1, 2))
    judged = {"two": Judged(prompts=prompts, rows=one + two), "one": Judged(prompts=prompts, rows=one)}
    [found] = score_all(judged, 200, 0)["comparisons"]
    assert found["accuracy"] == 0 and found["p_value"] == 1


def test_judges_that_share_no_order_are_not_compared():
    """Nothing that both have judged is no difference that is seen: it was one of p ≈ 0."""
    prompt = {
        "id": "0",
        "question": "q",
        "answer_1": "a",
        "answer_2": "b",
        "label": 1,
        "source": "s",
        "subset": "",
        "benchmark": "",
    }
    row = {"id": "0", "sample": 0, "label": 1, "rung": "json", "choice": 1}
    judged = {f"{order}": Judged(prompts=[prompt], rows=[row | {"order": order}]) for order in (1, 2)}
    assert score_all(judged, 200, 0)["comparisons"] == []


def test_each_subset_is_compared_by_itself():
    """All differences are in one subset of one of two data sets, whose questions the judges have in another order, and not
    all of them."""
    prompts = [
        {"id": f"{source}{subset}{i}", "question": f"q{i}", "answer_1": "a", "answer_2": "b", "label": 1, "source": source,
         "subset": subset, "benchmark": ""}
        for source, subset in (("s", "x"), ("s", None), ("t", "x")) for i in range(9)
    ]  # fmt: skip
    row = {"sample": 0, "label": 1, "rung": "json"}
    wrong = [row | {"id": p["id"], "order": order, "choice": 2} for p in prompts for order in (1, 2)]
    better = [r | {"choice": 1 if r["id"].startswith("sx") else 2} for r in wrong]
    asked = [p for p in reversed(prompts) if p["id"] not in ("tx0", "tx8")]
    judged = {"base": Judged(prompts=prompts, rows=wrong), "trained": Judged(prompts=asked, rows=better)}
    [found] = score_all(judged, 500, 0)["comparisons"]
    parts = {(source, subset): part for source, of in found["subsets"].items() for subset, part in of.items()}
    assert {place: (part["n"], part["accuracy"]) for place, part in parts.items()} == {
        ("s", "x"): (9, 1), ("s", "all"): (9, 0), ("t", "x"): (7, 0),
    }  # fmt: skip
    assert parts["s", "x"]["p_value"] < 0.05 and parts["t", "x"]["p_value"] == 1
    assert found["n"] == 25 and found["accuracy"] == 9 / 25


def test_a_judge_behind_an_endpoint_is_evaluated_as_any_other(tmp_path, monkeypatch):
    """From the options to the report, price included; a file for its text where its own ships none."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def behave(number: int, body: dict) -> tuple[int, dict]:
        text = body["messages"][-1]["content"]
        return 200, {}, knows(text + "\nassistant\n")

    judge, text = tmp_path / "judge.toml", tmp_path / "text.txt"
    judge.write_text('model = "m"\nprompt = "con-j"\nbackend = "openai"\nprompt_dollars = 1\ncompletion_dollars = 2\n')
    text.write_text("{question}\n回答1：{answer_1}\n回答2：{answer_2}\n")
    data = make_benchmark(tmp_path / "test.jsonl")
    with serving(behave) as server:
        for run, more in ((tmp_path / "card", {}), (tmp_path / "own", {"judge_text": text})):
            found = report_of(run, data, judge=str(judge), base_url=server.url, **more)["judges"]["judge"]
            assert (found["accuracy"], found["consistency"], found["num_judgments"]) == (1, 1, 24)
            assert found["dollars"] == pytest.approx(24 * (100 + 2 * 10) / 1e6) and found["tokens_per_judgment"] == 10
