"""One judge for all stages: what each asks, writes and names, and that a thought, or a hint in it, goes no further."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, judgment_text, make_run, open_thoughts
from fake_engine import use_fake_engine
from test_dpo import dpo_options
from test_evaluate import make_benchmark

from conj import InputError
from conj.data import judges, manifest
from conj.data.card import render_card
from conj.data.files import read_jsonl
from conj.data.identity import describe_judge, hash_judge
from conj.data.judges import load_judge
from conj.data.options import parse_options
from conj.data.pairs import PairsOptions, build_pairs, trained_text
from conj.data.tokenizer import JudgeTokenizer
from conj.model.folder import check_model
from conj.preflight import check
from conj.sample.engines.completion import Completion
from conj.sample.evaluation.evaluate import EvaluateOptions, evaluate
from conj.sample.hinted import HintedOptions, hinted_judgment, sample_hinted
from conj.sample.judge import judge
from conj.sample.repeated import RepeatedOptions, sample_repeated
from conj.sample.stage import opens_thought
from conj.settings import resolve, run_file_options
from conj.train import dpo, reference
from conj.train.audit.chain import check_chain
from conj.train.options import ReferenceOptions

ENGLISH, THINKING = load_judge("english"), load_judge("english-thinking")
TOLD = re.compile(r"answer ([12]) is the better one")  # by the English judge's hints


def text(reason: str, verdict: int, judge=ENGLISH) -> str:
    return judges.judgment_text(judge, reason, verdict)


def counting(write):
    """`write(prompt, number)`: what a model writes for the number-th request."""
    numbers = iter(range(10**6))
    return lambda prompt: write(prompt, next(numbers))


def judged_run(folder, model, monkeypatch, write, *, judge: str, **options):
    """A run folder with stages 2, 3 and 4, of what `write(prompt, number)` says."""
    use_fake_engine(monkeypatch, counting(write))
    common = {"run_dir": make_run(folder, 12), "judge": judge}
    sample_repeated(RepeatedOptions(model=model, num_samples=6, max_new_tokens=300, **common))
    sample_hinted(HintedOptions(model=model, max_new_tokens=300, **common))
    build_pairs(PairsOptions(eval_fraction=0, **common, **options))
    return folder


def of_both_kinds(prompt: str, number: int) -> str:
    """Sampled judgments with either verdict, and reasons."""
    return f"Reason {number}." if TOLD.search(prompt) else text(f"r{number}", 1 + number % 2)


def texts_of(run, side: str) -> list[str]:
    return [row[side][0]["content"] for row in read_jsonl(run / "pairs.jsonl")]


# ---- Through the stages ----


def test_a_run_is_of_one_judge_from_sampling_to_the_trained_folder(tied_model, tmp_path, monkeypatch, capsys):
    """A stage that asks by another prompt trains a judge that nobody asks. Each manifest names the judge; the folder holds it."""
    run = judged_run(tmp_path / "run", tied_model, monkeypatch, of_both_kinds, judge="english")
    rows = read_jsonl(run / "pairs.jsonl")
    assert all(row["prompt"][1]["content"].startswith(ENGLISH.user[:40]) for row in rows)
    assert {ENGLISH.parse(row["chosen"][0]["content"]) for row in rows if row["label"] == 2} == {(2, "json")}
    assert {row["pair_type"] for row in rows} == {"repeated", "hinted"}

    settings = {"run_dir": run, "model": tied_model, "device": "cpu", "dtype": "float32"}
    with pytest.raises(
        InputError, match=r"pairs.jsonl: was made with judge english \(.*\), now judge con-j \(.*\); give the"
    ):
        reference.main(ReferenceOptions(**settings))
    reference.main(ReferenceOptions(**settings, judge="english"))
    with pytest.raises(InputError, match="reference.safetensors: stale reference, made with another judge"):
        dpo.main(dpo_options(run, tied_model, max_steps=2))
    dpo.main(dpo_options(run, tied_model, max_steps=2, judge="english"))
    for name in ("repeated.jsonl", "hinted.jsonl", "pairs.jsonl", "reference.safetensors", "model"):
        assert describe_judge(ENGLISH) in [i["path"] for i in manifest.read_manifest(run / name)["inputs"]], name
    key, _ = reference.read_reference(run / "reference.safetensors")
    assert key["judge"] == hash_judge(ENGLISH)
    assert hash_judge(load_judge(str(run / "model" / "judge.toml"))) == hash_judge(ENGLISH)
    assert {check.outcome for check in check_chain(run, tied_model)} == {"holds"}

    asked = use_fake_engine(monkeypatch, lambda prompt: text("because", 2))
    judgment = judge(run / "model", "q", "a", "b")
    assert (judgment.verdict, judgment.reason) == (2, "because")
    assert judge(run / "model", "q", "a", "b", judge="con-j").verdict is None
    by_default, by_name = (check_model(tied_model, None).tokenizer.decode(request.prompt_ids) for request in asked)
    assert "Answer 1: a" in by_default and "回答1：a" in by_name

    page = render_card(run)
    assert '"reason" is a text that explains your decision' in page and 'json.loads(judgment)["better_answer"]' in page
    assert "The prompt is English" in page and "回答" not in page

    data = make_benchmark(tmp_path / "test.jsonl", 3)
    options = {"run_dir": run, "model": tied_model, "data": (data,), "num_resamples": 50}
    with pytest.raises(
        InputError, match=r"--judge con-j: .*model was trained as another judge, english; give .*judge.toml"
    ):
        evaluate(EvaluateOptions(**options))
    evaluate(EvaluateOptions(**options, judge="english"))
    assert "was trained as another judge" not in capsys.readouterr().out
    evaluate(EvaluateOptions(**options | {"model": run / "model"}, name="on-purpose"))
    assert "was trained as another judge than con-j: its own is judge.toml there" in capsys.readouterr().out
    (run / "judgments_on-purpose.jsonl").unlink()
    manifest.manifest_path(run / "judgments_on-purpose.jsonl").unlink()
    evaluate(EvaluateOptions(**options, judge="english"))
    assert list(json.loads((run / "report.json").read_text())["judges"]) == ["base", "trained"]
    evaluate(EvaluateOptions(**options | {"model": run / "model"}, name="in-chinese"))  # on purpose


def test_judgments_of_one_judge_are_no_pairs_of_another(tied_model, tmp_path, monkeypatch):
    """Pairs with the one's prompt and the other's judgments would teach neither."""
    run = judged_run(tmp_path, tied_model, monkeypatch, of_both_kinds, judge="english")
    for path in run / "pairs.jsonl", run / "pairs.jsonl.manifest.json":
        path.unlink()
    with pytest.raises(InputError, match=r"repeated.jsonl: was made with judge english \(.{8}\), now judge con-j"):
        build_pairs(PairsOptions(run_dir=run))
    with pytest.raises(InputError, match=r"repeated.jsonl: was made with judge english \(.{8}\), now judge con-j"):
        sample_repeated(RepeatedOptions(run_dir=run, model=tied_model, num_samples=6, max_new_tokens=300))
    shutil.copy(judges.FOLDER / "english.toml", tmp_path / "copy.toml")
    build_pairs(
        PairsOptions(run_dir=run, judge=str(tmp_path / "copy.toml"), eval_fraction=0)
    )  # the same, by another name


def test_a_manifest_that_names_no_judge_is_of_the_cards(tied_model, tmp_path, monkeypatch, capsys):
    """As versions wrote them that knew no other: their runs go on, and are not taken for another judge's."""
    use_fake_engine(monkeypatch, counting(lambda prompt, number: judgment_text(f"r{number}", 1 + number % 2)))
    run = make_run(tmp_path)
    options = {"run_dir": run, "model": tied_model}
    sample_repeated(RepeatedOptions(**options))
    sample_hinted(HintedOptions(**options))
    for name in "repeated.jsonl", "hinted.jsonl":
        made = manifest.read_manifest(run / name)
        old = made | {"inputs": [entry for entry in made["inputs"] if not entry["path"].startswith("judge ")]}
        assert len(old["inputs"]) < len(made["inputs"])
        manifest.write_sealed(manifest.manifest_path(run / name), old)
    sample_repeated(RepeatedOptions(**options))
    assert "repeated.jsonl: already complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="was made with judge con-j"):
        build_pairs(PairsOptions(run_dir=run, judge="english"))
    build_pairs(PairsOptions(run_dir=run))


@pytest.mark.parametrize(("options", "message"), [
    ({"judge": "gpt-4o"}, "--judge gpt-4o: is behind an endpoint, and cannot be trained"),
    ({"judge": "nobody"}, "judge nobody: expected a .toml file or one of"),
    ({"judge": "TEMPLATE"}, "chat_template: expected none in training"),
    ({"judge": "BARE"}, "expected hint_1 and hint_2 in its file, to ask for reasons; found none"),
    ({"judge": "UNWRITTEN"}, "expected judgment in its file, to ask for reasons; found none"),
])  # fmt: skip
def test_a_judge_that_no_stage_can_train_is_refused_in_one_line(options, message, tmp_path):
    """Before an engine starts."""
    places = "{question}{answer_1}{answer_2}"
    hints = f"hint_1 = '{places}'\nhint_2 = '{places}'\nverdict_pattern = '(A|B)'\nverdicts = {{ A = 1, B = 2 }}\n"
    files = {"TEMPLATE": 'prompt = "con-j"\nchat_template = "x"', "BARE": f"user = '{places}'"}
    files["UNWRITTEN"] = files["BARE"] + "\n" + hints
    for name, content in files.items():
        (tmp_path / f"{name}.toml").write_text(content)
    name = str(tmp_path / f"{options['judge']}.toml") if options["judge"] in files else options["judge"]
    with pytest.raises(InputError, match=re.escape(message)):
        HintedOptions(run_dir=tmp_path, model=tmp_path, judge=name)


def test_a_pattern_judge_goes_through_the_stages(tied_model, tmp_path, monkeypatch):
    """Its judgments are written as its file says, and read by its pattern; a reason that says a verdict is none."""
    places = "{question}|{answer_1}|{answer_2}"
    (tmp_path / "own.toml").write_text(
        f"user = 'J {places}'\nhint_1 = 'H answer 1 is the better one {places}'\nhint_2 = 'H answer 2 is the better one {places}'\n"
        "verdict_pattern = 'verdict: ([AB])'\nverdicts = { A = 1, B = 2 }\njudgment = \"{reason}\\nverdict: {verdict}\"\n"
    )
    own = load_judge(str(tmp_path / "own.toml"))

    def write(prompt: str, number: int) -> str:
        told = TOLD.search(prompt)
        if told:
            return "Good. verdict: A and verdict: B" if number % 5 == 0 else f"Reason {number}."
        return f"Sampled {number}. verdict: {'AB'[number % 2]}"

    run = judged_run(tmp_path / "run", tied_model, monkeypatch, write, judge=str(tmp_path / "own.toml"))
    for row in read_jsonl(run / "pairs.jsonl"):
        chosen, rejected = (own.parse(row[side][0]["content"]).value for side in ("chosen", "rejected"))
        assert chosen == row["label"] and rejected in (3 - row["label"], None)
    assert any(re.fullmatch(r"Reason \d+\.\nverdict: [AB]", chosen) for chosen in texts_of(run, "chosen"))


# ---- Thoughts ----


def thinks(prompt: str, number: int) -> str:
    """A model that thinks first. On a hint it thinks of the hint, in every way that such models have been seen to end."""
    if not (told := TOLD.search(prompt)):
        draft = text("draft", 1 + number // 2 % 2)
        return f"<think>\nDraft {number}: {draft}\n</think>\n\n{text(f'r{number}', 1 + number % 2)}"
    i, thought = int(told[1]), f"SECRET: I was told that answer {told[1]} is better."
    return (
        f"<think>{thought}</think>\n\nReason {number}.",
        f"<think>\n{thought}\n</think>\n{text(f'Reason {number}.', i)}",
        f"<think>{thought}",  # unfinished
        f"<think>{thought}</think>",  # no answer
        f"<think>{thought} Draft: {text('SECRET', i)}",  # unfinished, with a draft
        f"<think>a</think><think>{thought}</think>Reason {number}.",
        f"{thought}</think>Reason {number}.",  # a template opened it
        f"Reason {number}.\n<think>{thought}",  # one more, unfinished
        f"<think>{thought}</think>Reason {number}. <think> {thought}",
        f"<think>{thought}</think>\n{text(f'Reason {number}.', 3 - i)}",  # against the hint
    )[number % 10]


@pytest.mark.parametrize("thoughts", ["keep", "drop"])
def test_no_text_that_is_trained_on_holds_a_hint(thoughts, tied_model, tmp_path, monkeypatch):
    """A judge that was taught on "I was told that answer 1 is better" would say so of any two answers."""
    run = judged_run(tmp_path, tied_model, monkeypatch, thinks, judge="english-thinking", thoughts=thoughts)
    for side in "chosen", "rejected":
        assert not [t for t in texts_of(run, side) if "SECRET" in t or "told" in t]
    hinted = read_jsonl(run / "hinted.jsonl")
    assert not [row for row in hinted if "SECRET" in row["text"]]
    assert {row["rung"] for row in hinted} == {"hint", "json", "unfinished", "none"}
    assert all(("<think>" in chosen) == (thoughts == "keep") for chosen in texts_of(run, "chosen") if "Draft" in chosen)


def test_the_search_for_hints_finds_one(tied_model, tmp_path, monkeypatch):
    """A negative control: a judge with other marks takes the thought for the reason, and the hint comes out."""
    (tmp_path / "other.toml").write_text('prompt = "english"\nthought = ["[THINK]", "[/THINK]"]')
    judge = str(tmp_path / "other.toml")
    run = judged_run(tmp_path / "run", tied_model, monkeypatch, thinks, judge=judge)
    assert [t for t in texts_of(run, "chosen") if "SECRET" in t]


def test_the_verdict_of_a_sampled_text_is_that_behind_its_thought(tied_model, tmp_path, monkeypatch):
    """The whole text is kept; the draft in its thought says something else half of the time."""
    run = judged_run(tmp_path, tied_model, monkeypatch, thinks, judge="english-thinking")
    rows = read_jsonl(run / "repeated.jsonl")
    assert all(row["text"].startswith("<think>") for row in rows)
    assert [row["verdict"] for row in rows] == [1 + int(re.search(r"Draft (\d+)", row["text"])[1]) % 2 for row in rows]


def test_thoughts_are_trained_on_or_not_as_asked(tied_model, tmp_path, monkeypatch):
    """Dropped, the answers stay as they are; an unfinished thought has none, and makes no pair."""

    def write(prompt: str, number: int) -> str:
        cut = number % 6 == 5 and not TOLD.search(prompt)
        return "<think>on and on" if cut else thinks(prompt, 0 if TOLD.search(prompt) else number)

    pairs = {}
    for thoughts in "keep", "drop":
        folder = tmp_path / thoughts
        judged_run(folder, tied_model, monkeypatch, write, judge="english-thinking", thoughts=thoughts)
        pairs[thoughts] = read_jsonl(folder / "pairs.jsonl")
        counts = manifest.read_manifest(folder / "pairs.jsonl")["counts"]
        assert counts.get("left_out_unfinished_thought", 0) == (12 if thoughts == "drop" else 0)
    kept = {row["pair_type"] for row in pairs["keep"]}
    assert kept == {"repeated", "repeated_vs_unparsed", "hinted"}
    assert {row["pair_type"] for row in pairs["drop"]} == {"repeated", "hinted"}
    sampled = [row["chosen"][0]["content"] for row in pairs["keep"] if row["pair_type"] == "repeated"]
    answers = {ENGLISH.answer(content) for content in sampled}
    assert all(content.startswith("<think>") for content in sampled)
    dropped = {row["chosen"][0]["content"] for row in pairs["drop"] if row["pair_type"] == "repeated"}
    assert all(json.loads(content)["reason"] for content in dropped) and answers & dropped


def test_a_judgment_that_quotes_the_end_mark_is_never_torn():
    """What stands behind the mark is no answer then. Without thoughts such a judgment is left out, with them it is whole."""
    quoted = text("Answer 1 has a stray </think> tag.", 2)
    for written in quoted, f"<think>a</think>{quoted}":
        row = {"text": written, "kind": "repeated", "rung": "json", "verdict": ENGLISH.parse(written).value}
        kept, dropped = (PairsOptions(run_dir=Path("unused"), thoughts=thoughts) for thoughts in ("keep", "drop"))
        assert row["verdict"] == 2
        assert (trained_text(row, kept, ENGLISH), trained_text(row, dropped, ENGLISH)) == (written, None)
    draft = f'{{"reason": "broken draft </think>\n{text("r", 1)}'  # of a template that opened the thought
    row = {"text": draft, "kind": "repeated", "rung": "json", "verdict": ENGLISH.parse(draft, opened=True).value}
    assert row["verdict"] == 1 and trained_text(row, dropped, ENGLISH) == f"</think>\n\n{text('r', 1)}"


def test_a_template_that_opens_the_thought_is_heeded(tied_model, tmp_path, monkeypatch):
    """Without its start mark, what a model thinks looks like its answer, and a draft like its verdict."""
    model = shutil.copytree(tied_model, tmp_path / "model")
    open_thoughts(model)
    assert opens_thought(check_model(model, None), THINKING) and not opens_thought(
        check_model(tied_model, None), THINKING
    )

    def write(prompt: str, number: int) -> str:
        if number % 6 == 5 and not TOLD.search(prompt):
            return f"Draft: {text('draft', 1)}"  # cut off
        return thinks(prompt, 0 if TOLD.search(prompt) else number).removeprefix("<think>").lstrip()

    run = judged_run(tmp_path / "run", model, monkeypatch, write, judge="english-thinking", thoughts="drop")
    rows = read_jsonl(run / "repeated.jsonl")
    assert {(row["verdict"], row["rung"]) for row in rows[5::6]} == {(None, "unfinished")}
    assert {row["verdict"] for row in rows if row["index"] < 5} == {1, 2}
    for side in "chosen", "rejected":  # what follows on <think> closes it first
        assert all(content.startswith("</think>\n\n{") for content in texts_of(run, side))
        assert not [content for content in texts_of(run, side) if "Draft" in content or "SECRET" in content]


def test_marks_that_leave_no_text_are_refused(tied_model, tmp_path):
    """Where the tokenizer hides them, thought and answer would be one text."""
    (tmp_path / "hidden.toml").write_text('prompt = "english"\nthought = ["<|im_start|>", "<|im_end|>"]')
    hidden = load_judge(str(tmp_path / "hidden.toml"))
    with pytest.raises(InputError, match=r"its tokenizer takes <\|im_start\|> for a control token, which is no text"):
        opens_thought(check_model(tied_model, None), hidden)


@pytest.mark.parametrize(("written", "opened", "expected"), [
    ("<think>h</think> One. Two.", False, (text("One. Two.", 2), 2, "hint")),
    ("h</think> One. Two.", True, ("</think>\n\n" + text("One. Two.", 2), 2, "hint")),
    ("h, and on", True, ("</think>\n\n", None, "unfinished")),
    ("<think>h</think>", False, ("", None, "none")),
    ("<think>h", False, ("", None, "unfinished")),
])  # fmt: skip
def test_a_hinted_text_is_what_stands_behind_its_thought(written, opened, expected, tied_model):
    """And nothing of the thought, which knows the hint."""
    completion = Completion(text=written, token_ids=[], finish_reason="stop")
    judged = hinted_judgment(completion, 2, THINKING, JudgeTokenizer.load(tied_model), opened)
    assert tuple(judged.values()) == expected


STARTS = 'prompt = "english"\nreason_start = "Answer {verdict} beats {other}: it"\n'


def test_the_model_is_given_how_a_reason_begins(tied_model, tmp_path, monkeypatch):
    """As the start of its own turn, and the judgment has it in front of what the model wrote."""
    (tmp_path / "starts.toml").write_text(STARTS)
    asked = []
    use_fake_engine(monkeypatch, lambda prompt: asked.append(prompt) or " is short. And more")
    run = make_run(tmp_path / "run", 1)
    sample_hinted(HintedOptions(run_dir=run, model=tied_model, judge=str(tmp_path / "starts.toml")))
    [label] = [row["label"] for row in read_jsonl(run / "prompts.jsonl")]
    starts = {1: "Answer 1 beats 2: it", 2: "Answer 2 beats 1: it"}
    assert [prompt.endswith(starts[hint]) for prompt, hint in zip(asked, (label, 3 - label))] == [True, True]
    texts = [text(f"{starts[hint]} is short. And more", hint) for hint in (label, 3 - label)]
    assert [row["text"] for row in read_jsonl(run / "hinted.jsonl")] == texts


def test_where_a_turn_cannot_be_begun_it_is_refused(model_copy, tmp_path):
    (tmp_path / "starts.toml").write_text(STARTS)
    options = {"run_dir": make_run(tmp_path / "run", 1), "judge": str(tmp_path / "starts.toml")}
    with pytest.raises(InputError, match="expected no reason_start with --api-model"):
        HintedOptions(api_model="x", base_url="http://localhost:1", **options)
    open_thoughts(model_copy)
    with pytest.raises(InputError, match="expected no reason_start: the model's prompts begin a thought"):
        sample_hinted(HintedOptions(model=model_copy, **options))


@pytest.mark.parametrize(("written", "finish", "said"), [
    (" is short. It", "stop", " is short. It"), (" is short. It", "length", " is short."), ("\n is short", "stop", "\n is short"),
    ("", "stop", None), (" \n", "stop", None), (".", "stop", None), (". It i", "length", None), (" is sho", "length", None),
    (" <think>hm</think> is short.", "stop", None), ("</think> It is short.", "stop", None),
    (' is: {"reason": "It is short.", "better_answer": 2}', "stop", None),
])  # fmt: skip
def test_a_reason_is_what_follows_on_how_it_begins(written, finish, said):
    """And never without that start: the judge would learn to leave it out."""
    start = "Answer 2 beats 1: it"
    judge = dataclasses.replace(ENGLISH, reason_start="Answer {verdict} beats {other}: it")
    judged = hinted_judgment(Completion(text=written, token_ids=[], finish_reason=finish), 2, judge, None)
    assert judged["verdict"] == (2 if said else None)
    assert judged["text"] == text(start + said, 2) if said else judge.parse(judged["text"]).value != 2


@pytest.mark.parametrize(("above", "table", "said"), [
    ("judge = '{}/starts.toml'\n", "", "expected no reason_start: the model's prompts begin a thought"),
    ("", "[repeated]\nstructured_output = true\n", "--structured-output: the model's prompts begin a thought"),
])  # fmt: skip
def test_what_cannot_follow_on_a_thought_is_refused_before_the_first_stage(above, table, said, model_copy, tmp_path):
    """Stage 3 would say so after stage 2."""
    open_thoughts(model_copy)
    (tmp_path / "starts.toml").write_text(STARTS)
    shared = f"run_dir = '{tmp_path}/run'\nmodel = '{model_copy}'\nstages = ['preprocess', 'repeated', 'hinted']\n"
    data = f"[preprocess]\ndata = ['{ROOT}/demo/train.jsonl']\n"
    (tmp_path / "run.toml").write_text(above.format(tmp_path) + shared + data + table)
    with pytest.raises(InputError, match=said):
        check(resolve(parse_options(run_file_options(), [str(tmp_path / "run.toml")])))
