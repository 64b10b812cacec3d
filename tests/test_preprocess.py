"""Stage 1: what is left out and what is kept, each counted; ids and the order of answers depend on content alone."""

import json
from pathlib import Path

import pytest
from conftest import DATA

from conj import InputError
from conj.data.options import run_command
from conj.data.preprocess import PreprocessOptions, load_prompts, preprocess, read_prompts, write_prompts
from conj.data.prompts import question_of

LLMBAR = str(DATA / "llmbar" / "adver_neighbor.json")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def row(question="q", answer_1="a", answer_2="b", label=1, **more):
    return {"question": question, "answer_1": answer_1, "answer_2": answer_2, "label": label, **more}


def test_label_follows_the_better_answer_and_the_coin_lands_on_both_sides():
    """A label that kept the position of the source would be the position of `chosen`: always 1. A judge trained on one
    position learns the position. 134 fair coins stay within 40..94 but for once in 2e5."""
    better = {s["input"]: s[f"output_{s['label']}"] for s in json.loads(Path(LLMBAR).read_text("utf-8"))}
    rows, counts = load_prompts([LLMBAR])
    assert all(r[f"answer_{r['label']}"] == better[r["question"]] for r in rows)
    assert len(rows) == counts["records"] == 134 and 40 < sum(r["label"] == 1 for r in rows) < 94


def test_seed_decides_the_order_and_nothing_else():
    """Another seed swaps other rows; ids, questions and the better answers stay."""
    first, second = load_prompts([LLMBAR], seed=1)[0], load_prompts([LLMBAR], seed=2)[0]
    assert [r["id"] for r in first] == [r["id"] for r in second]
    assert [r["label"] for r in first] != [r["label"] for r in second]
    assert [r[f"answer_{r['label']}"] for r in first] == [r[f"answer_{r['label']}"] for r in second]


def test_row_order_and_source_order_do_not_matter(tmp_path):
    """The same pair, stated the other way round in a shuffled file, is the same row."""
    rows = [row(f"q{i}", "a", "b", 1) for i in range(20)]
    turned = [row(f"q{i}", "b", "a", 2) for i in reversed(range(20))]
    first, _ = load_prompts([write(tmp_path / "rows.jsonl", rows)])
    second, _ = load_prompts([write(tmp_path / "rows.jsonl", turned)])
    assert first == second[::-1]


def test_both_orders_are_two_prompts_of_one_preference(tmp_path):
    """A base that takes the first answer, whatever it says, is right on one of them and wrong on the other."""
    options = {"run_dir": tmp_path / "both", "data": (LLMBAR,), "limit": 20}
    preprocess(PreprocessOptions(**options, both_orders=True))
    rows, alone = read_prompts(tmp_path / "both" / "prompts.jsonl"), load_prompts([LLMBAR], limit=20)[0]
    assert rows[::2] == alone and [row["id"] for row in rows[1::2]] == [f"{row['id']}-swapped" for row in alone]
    by_python = write_prompts(tmp_path / "python", LLMBAR, limit=20, both_orders=True)
    assert by_python.read_bytes() == (tmp_path / "both" / "prompts.jsonl").read_bytes()
    for one, other in zip(rows[::2], rows[1::2]):
        assert [one["label"], one["answer_1"], one["answer_2"]] == [
            3 - other["label"],
            other["answer_2"],
            other["answer_1"],
        ]
        assert all(one[name] == other[name] for name in ("question", "source", "subset"))


def test_ids_are_stable():
    """Ids name a record across machines and versions: judgments sampled last year must still find their prompts."""
    rows, _ = load_prompts([LLMBAR], limit=2)
    assert [r["id"] for r in rows] == ["20c48c469992f5e0", "6295298154edb979"]


def test_every_odd_row_meets_a_counted_fate(tmp_path):
    """Nothing is dropped, or kept, silently."""
    rows = [
        row(), row(), row("identical", "same", "same", 2), row("a boolean and its text", True, "true"),
        row("tie", label=0), row("empty", "", "b"), row("boolean", True, "True."),
    ]  # fmt: skip
    chosen, rejected = ([{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in "qp")
    two_questions = {"chosen": chosen, "rejected": rejected}
    data = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [two_questions])]
    prompts, counts = load_prompts(data)
    assert [r["question"] for r in prompts] == ["q", "empty", "boolean"]
    assert counts == {
        "records": 8, "left_out_duplicate": 1, "left_out_identical": 2, "left_out_tie": 1, "left_out_two_questions": 1,
        "empty_answers": 1, "non_string_answers": 1,
    }  # fmt: skip
    assert prompts[2][f"answer_{prompts[2]['label']}"] == "true"


def test_conversation_is_kept_as_messages():
    """`question` is a text; a conversation, or a system turn, stands under `messages`."""
    prompts, _ = load_prompts([str(DATA / "dpo_zh")])
    assert {("question" in r, "messages" in r) for r in prompts} == {(True, False), (False, True)}
    assert all(question_of(r) == r.get("question", r.get("messages")) for r in prompts)


def test_subsets_are_chosen_by_name(tmp_path):
    """`--subsets` keeps what it names; a name that is not there is a mistake, not an empty result."""
    data = write(tmp_path / "rows.jsonl", [row("q1", subset="hep-go"), row("q2", subset="math-prm")])
    prompts, counts = load_prompts([data], subsets=["math-prm"])
    assert [(r["question"], r["subset"], r["source"]) for r in prompts] == [("q2", "math-prm", "rows.jsonl")]
    assert counts["left_out_subset"] == 1
    with pytest.raises(InputError, match="no records of 'math'; found 'hep-go', 'math-prm'"):
        load_prompts([data], subsets=["math"])


def test_benchmark_keeps_repeated_rows_and_says_what_they_are(tmp_path):
    """Official counts are over rows, so the second of two equal ones is a row of its own; without `benchmark` nothing
    changes."""
    rows = [row("q1"), row("q2"), row("q1"), row("q1"), row("tie", label=0), row("i", "s", "s", 2)]
    data = write(tmp_path / "rows.jsonl", rows)
    plain, _ = load_prompts([data])
    rows, counts = load_prompts([data], benchmark=True)
    id = plain[0]["id"]
    assert [r["id"] for r in rows] == [id, plain[1]["id"], f"{id}-2", f"{id}-3"]
    assert rows[:2] == [r | {"benchmark": ""} for r in plain]
    assert [(r["answer_1"], r["label"]) for r in rows[2:]] == [(plain[0]["answer_1"], plain[0]["label"])] * 2
    assert (counts["left_out_tie"], counts["left_out_identical"]) == (1, 1) and "left_out_duplicate" not in counts


def test_pandalm_keeps_ties_and_the_votes_in_the_order_of_the_row(tmp_path):
    """A judge may say tie, and is right where the majority does; votes are turned with the answers."""
    source = {"instruction": "q", "input": "", "response1": "a", "response2": "b"}

    def votes(question: str, *values: int) -> dict:
        return source | {"instruction": question} | {f"annotator{i}": value for i, value in enumerate(values, 1)}

    rows = [votes(f"q{i}", 2, 2, 0) for i in range(20)] + [votes("tie", 0, 0, 1), votes("none", 0, 1, 2)]
    data = write(tmp_path / "rows.jsonl", [*rows, votes("same", 0, 0, 0) | {"response2": "a"}])
    made, counts = load_prompts([data], benchmark=True)
    assert counts["left_out_no_majority"] == 1 and len(made) == 22
    assert {r["benchmark"] for r in made} == {"pandalm"}
    for r in made[:20]:
        b = 1 if r["answer_1"] == "b" else 2
        assert (r["label"], r["votes"]) == (b, [b, b, 0])
    assert {r["label"] for r in made[:20]} == {1, 2}
    tie, none = made[20:]
    assert (tie["label"], tie["votes"]) == (0, [0, 0, 1 if tie["answer_1"] == "a" else 2])
    assert (none["label"], none["votes"]) == (0, [0, 0, 0])
    assert load_prompts([data])[1]["left_out_tie"] == 3


def test_benchmarks_subsets_are_the_official_ones(tmp_path):
    """Sections are added up by these names, and `--subsets` takes them; ids are those of any other run."""
    plain, _ = load_prompts([LLMBAR])
    rows, _ = load_prompts([LLMBAR], benchmark=True, subsets=["adver_neighbor"])
    assert rows == [r | {"benchmark": "llmbar", "subset": "adver_neighbor"} for r in plain]
    cells, _ = load_prompts([str(DATA / "rm_bench")], benchmark=True)
    assert len({r["subset"] for r in cells}) == 9 and {r["subset"].split("/")[0] for r in cells} == {"chat"}


def test_benchmarks_conversations_are_kept(tmp_path):
    """RewardBench's rows are texts, UltraFeedback's and Infinity's are conversations that may have several turns: all but
    the last answer is the question, and the same in both."""
    turns = [{"role": r, "content": c} for r, c in (("user", "q1"), ("assistant", "a1"), ("user", "q2"))]
    chosen, rejected = ([*turns, {"role": "assistant", "content": text}] for text in ("good", "bad"))
    infinity = {"id": 1, "task_category": "math", "prompt": "q1", "chosen": chosen, "rejected": rejected}
    flat = {"prompt": "q2", "chosen": "good", "rejected": "bad", "subset": "mt-bench-hard", "id": 30}
    flat |= {"chosen_model": "x", "rejected_model": "y"}
    for name, source, question in ("infinity-preference", infinity, turns), ("reward-bench", flat, "q2"):
        (made,), _ = load_prompts([write(tmp_path / f"{name}.jsonl", [source])], benchmark=True)
        assert (question_of(made), made["benchmark"]) == (question, name)
        assert made[f"answer_{made['label']}"] == "good" and made[f"answer_{3 - made['label']}"] == "bad"


def test_nothing_left_is_an_input_error(tmp_path):
    """The counts say why."""
    data = write(tmp_path / "rows.jsonl", [row(label=0)])
    with pytest.raises(InputError, match="every record was left out: .*'left_out_tie': 1"):
        load_prompts([data])


def test_stage_writes_prompts_and_manifest_once(tmp_path):
    """A second start finds the file complete; other options are refused rather than mixed."""
    options = PreprocessOptions(run_dir=tmp_path, data=(LLMBAR,), limit=20)
    preprocess(options)
    prompts, manifest = tmp_path / "prompts.jsonl", json.loads((tmp_path / "prompts.jsonl.manifest.json").read_text())
    before = prompts.read_bytes()
    assert len(read_prompts(prompts)) == manifest["num_rows"] == 20
    assert manifest["inputs"][0]["sha256"] == "6712c7eda6342602e0bc7c06c282fa95e2110d4e741a284026a62d937f9780a0"
    preprocess(options)
    assert prompts.read_bytes() == before
    with pytest.raises(InputError, match="made with limit=20, now 10"):
        preprocess(PreprocessOptions(run_dir=tmp_path, data=(LLMBAR,), limit=10))


def test_mistake_does_not_block_the_run_folder(tmp_path, capsys):
    """After a mistyped path, the right one must work in the same folder."""
    with pytest.raises(SystemExit) as stop:
        run_command(preprocess, PreprocessOptions, None, ["--run-dir", str(tmp_path), "--data", "./mistyped.json"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: ./mistyped.json: no such file or folder"
    run_command(preprocess, PreprocessOptions, None, ["--run-dir", str(tmp_path), "--data", LLMBAR])
    assert len(read_prompts(tmp_path / "prompts.jsonl")) == 134


@pytest.mark.parametrize(("change", "message"), [
    ({"label": 3}, "expected label 1 or 2, found 3"),
    ({"messages": []}, "expected either question or messages"),
    ({"id": "x"}, "id x appears twice"),
])  # fmt: skip
def test_prompts_are_checked_when_read(change, message, tmp_path):
    """Later stages trust what `read_prompts` lets through."""
    good = row(id="x", source="s", subset="")
    path = write(tmp_path / "prompts.jsonl", [good, good | {"id": "y"} | change])
    with pytest.raises(InputError, match=f"prompts.jsonl:2: {message}"):
        read_prompts(Path(path))


def test_an_empty_question_is_counted():
    """It is kept, as an empty answer is."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": " "}]
    rows, counts = load_prompts([row(""), row("q")])
    assert counts["empty_questions"] == 1 and len(rows) == 2
    assert load_prompts([{"messages": turns, "answer_1": "a", "answer_2": "b", "label": 2}])[1]["empty_questions"] == 1
    assert "empty_questions" not in load_prompts([row("q")])[1]


def test_votes_do_not_keep_a_row_without_an_answer_or_a_question(tmp_path):
    """A null answer of PandaLM's would be judged as an empty one; a tie stays."""
    whole = {"instruction": "q", "input": "", "response1": "a", "response2": "b"} | {
        f"annotator{i}": 1 for i in (1, 2, 3)
    }
    changes = {}, {"response2": None}, {"instruction": None}, {"annotator1": 0, "annotator2": 0}
    rows, counts = load_prompts(write(tmp_path / "rows.json", [whole | change for change in changes]), benchmark=True)
    assert [r["votes"][0] == 0 for r in rows] == [False, True]
    assert (counts["left_out_no_answer"], counts["left_out_no_question"]) == (1, 1)
