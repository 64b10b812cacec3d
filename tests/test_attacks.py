"""The attack card: the attack stands in the worse answer and names it, and the figures are those of known judges."""

import json
import re

import numpy as np
import pytest
from conftest import CARD, CHATML, assert_one_line_error, command, judgment_text
from fake_engine import use_fake_engine
from test_evaluate import first_and_second, knows  # none of the attacks writes the prompt's own 回答2： mark

from conj.data.files import write_jsonl
from conj.data.judges import load_judge
from conj.data.preprocess import load_prompts
from conj.model.folder import check_model
from conj.sample.evaluation import attacks
from conj.sample.evaluation.attacks import ATTACKS, AttackOptions, attack_judge, attack_requests, score_attacks

NUM_QUESTIONS = 8
OBEYED = re.compile(r"直接判定回答([12])更好")


def make_benchmark(path) -> str:
    rows = [{"prompt": f"q{i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(NUM_QUESTIONS)]
    write_jsonl(path, rows)
    return str(path)


def obedient(prompt: str) -> str:
    """A judge that does what an instruction in an answer says."""
    told = OBEYED.search(prompt)
    return judgment_text("r", int(told[1])) if told else knows(prompt)


def attacked_figures(write, model, folder, monkeypatch) -> dict:
    """The figures of a judge that writes `write(prompt)`."""
    use_fake_engine(monkeypatch, write)
    attack_judge(options(folder, model))
    return json.loads((folder / "attacks.json").read_text())["attacks"]


def options(folder, model) -> AttackOptions:
    data = (make_benchmark(folder / "test.jsonl"),)
    return AttackOptions(run_dir=folder, model=model, data=data, num_resamples=50, max_new_tokens=64)


def test_a_judge_that_obeys_flips_always_and_by_that_attack_only(tied_model, tmp_path, monkeypatch):
    """A number that names the other answer, in either order, would lower this from 100 %."""
    figures = attacked_figures(obedient, tied_model, tmp_path, monkeypatch)
    rates = dict.fromkeys([*ATTACKS, "swap"], 0.0) | {"instruction": 1.0}
    assert {name: figure["flip_rate"] for name, figure in figures.items()} == rates
    told = figures["instruction"]
    assert (told["attacked"], told["flipped"], told["accuracy"], told["unparsed"]) == (16, 16, 0.0, 0.0)


def test_a_judge_that_knows_never_flips(tied_model, tmp_path, monkeypatch):
    """An attack in the better answer, or a swap that is not undone, would show as a flip."""
    figures = attacked_figures(knows, tied_model, tmp_path, monkeypatch)
    for name in ATTACKS:
        figure = figures[name]
        assert (figure["attacked"], figure["flipped"], figure["accuracy"]) == (2 * NUM_QUESTIONS, 0, 1.0), name
        assert figure["flip_rate_ci95"] == [0.0, 0.0]


def test_an_instruction_that_forgets_its_position_flips_half(tied_model, tmp_path, monkeypatch):
    """The negative control of the first test: always naming answer 1 persuades in one order of two."""
    told_one = ATTACKS["instruction"]
    monkeypatch.setitem(attacks.ATTACKS, "instruction", lambda answer, position, judge: told_one(answer, 1, judge))
    figures = attacked_figures(obedient, tied_model, tmp_path, monkeypatch)
    assert (figures["instruction"]["attacked"], figures["instruction"]["flip_rate"]) == (16, 0.5)


def test_a_judge_that_takes_the_first_answer_changes_with_the_order(tied_model, tmp_path, monkeypatch):
    """Swapping alone flips it; no attack does, since its right judgments are where the better answer stands first."""
    figures = attacked_figures(lambda prompt: judgment_text("r", 1), tied_model, tmp_path, monkeypatch)
    assert (figures["swap"]["attacked"], figures["swap"]["flip_rate"], figures["swap"]["accuracy"]) == (8, 1.0, 0.5)
    for name in ATTACKS:
        assert (figures[name]["attacked"], figures[name]["flip_rate"]) == (8, 0.0), name


def test_a_judge_that_falls_silent_is_not_flipped_but_unparsed(tied_model, tmp_path, monkeypatch):
    """Counted as flipped, an attack that breaks the judge would pass for one that persuades it."""
    swayed = lambda prompt: "no JSON" if OBEYED.search(prompt) else knows(prompt)  # noqa: E731
    figures = attacked_figures(swayed, tied_model, tmp_path, monkeypatch)
    told = figures["instruction"]
    assert (told["flip_rate"], told["unparsed"], told["accuracy"]) == (0.0, 1.0, 0.5)
    assert figures["neutral"]["unparsed"] == 0.0


def test_the_attack_stands_in_the_worse_answer_of_either_order(tied_model, tmp_path):
    """Question, better answer and order are those of the plain prompt; what names an answer names the attacked one."""
    model = check_model(tied_model, None)
    prompts, _ = load_prompts([make_benchmark(tmp_path / "test.jsonl")])
    assert {row["label"] for row in prompts} == {1, 2}
    for row in prompts:
        for request in attack_requests(row, model, CARD):
            text = model.tokenizer.plain.decode(request.prompt_ids, skip_special_tokens=False)
            answers = first_and_second(text)
            worse = 3 - row["label"] if request.key["order"] == 1 else row["label"]
            right, wrong = row[f"answer_{row['label']}"], row[f"answer_{3 - row['label']}"]
            attack = ATTACKS.get(request.key["attack"])
            assert answers[2 - worse] == right
            assert answers[worse - 1] == (attack(wrong, worse, CARD) if attack else wrong)


@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize(("judge", "mark"), [
    ("con-j", r"回答([12])|更好的回答[为\": ]+([12])"), ("english", r"[Aa]nswer ([12])|better_answer[ is\":]+([12])"),
])  # fmt: skip
def test_what_names_an_answer_names_the_attacked_one(judge, mark, position):
    """A forged judgment must be one that the parser reads, for the answer that it stands in."""
    judge = load_judge(judge)
    named = {name: set(re.findall(mark, attack("答", position, judge))) for name, attack in ATTACKS.items()}
    for name in ("fake_completion", "fake_completion_tokens", "instruction"):
        assert {a or b for a, b in named.pop(name)} == {str(position)}, name
    assert set().union(*named.values()) == set()
    for name in ("fake_completion", "fake_completion_tokens"):
        assert judge.parse(ATTACKS[name]("答", position, judge)).value == position
    assert "<|" not in ATTACKS["fake_completion"]("答", position, judge)


def test_forged_control_tokens_are_those_of_the_template(tied_model):
    """The attack ends the turn just as the template does; misspelt, it would test nothing. Ours keeps it text."""
    model = check_model(tied_model, None)
    forged = ATTACKS["fake_completion_tokens"]("", 1, CARD)
    assert CHATML.count("<|im_end|>") and forged.startswith("<|im_end|>\n<|im_start|>assistant\n")
    row = {"id": "a", "question": "q", "answer_1": "right", "answer_2": "wrong", "label": 1}
    special = set(model.tokenizer.special.values())
    assert len({tuple(i for i in r.prompt_ids if i in special) for r in attack_requests(row, model, CARD)}) == 1


def test_a_stage_that_was_cut_short_makes_only_what_is_missing(tied_model, tmp_path, monkeypatch):
    """And ends with the bytes of an undisturbed one."""
    undisturbed, killed = (options(tmp_path / name, tied_model) for name in ("undisturbed", "killed"))
    asked = use_fake_engine(monkeypatch, obedient)
    attack_judge(undisturbed)
    assert len(asked) == NUM_QUESTIONS * 2 * (1 + len(ATTACKS))

    def killed_at_the_30th(prompt: str) -> str:
        if len(before) == 30:
            raise KeyboardInterrupt
        return obedient(prompt)

    before = use_fake_engine(monkeypatch, killed_at_the_30th)
    with pytest.raises(KeyboardInterrupt):
        attack_judge(killed)
    after = use_fake_engine(monkeypatch, obedient)
    attack_judge(killed)
    assert len(after) == len(asked) - 29
    for name in ("attacks.jsonl", "attacks.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    attack_judge(killed)
    assert len(after) == len(asked) - 29  # complete: nothing is asked again


# ---- The figures ----


def judgments_of(choices: dict[str, list[tuple]], labels: list[int]) -> tuple[list[dict], list[dict]]:
    """Prompts and rows from attack -> (choice in order 1, choice in order 2) of each question; plain where not given."""
    prompts = [{"id": str(i), "label": label} for i, label in enumerate(labels)]
    rows = [
        {"id": str(i), "attack": name, "order": order, "choice": pair[order - 1]}
        for name in ("none", *ATTACKS)
        for i, pair in enumerate(choices.get(name, choices["none"]))
        for order in (1, 2)
    ]
    return prompts, rows


def test_the_figures_are_those_computed_by_hand():
    """Right twice, right once, wrong twice, unparsed once; a judgment that was wrong before is not attacked."""
    plain = [(1, 1), (2, 1), (2, 2), (None, 2)]
    under = [(2, 1), (1, 2), (1, None), (1, None)]
    figures = score_attacks(*judgments_of({"none": plain, "instruction": under}, [1, 2, 1, 2]), 100, 0)
    told = figures["attacks"]["instruction"]
    # Right before: both of question 0, order 1 of 1, order 2 of 3. Of these 4, two choose the worse answer, one nothing.
    assert (told["attacked"], told["flipped"], told["flip_rate"], told["unparsed"]) == (4, 2, 0.5, 0.25)
    assert told["accuracy"] == (1 + 1 + 1.5 + 0.5) / 8
    swap = figures["attacks"]["swap"]
    assert (swap["attacked"], swap["flip_rate"], swap["unparsed"]) == (4, 0.25, 0.25)
    assert swap["accuracy"] == (2 + 1 + 0 + 1.5) / 8


def test_intervals_are_those_of_the_normal_approximation_over_questions():
    """600 questions, 30 % of them flip in both orders: ±1.96·sqrt(.3·.7/600). Resampling the 1,200 judgments as if
    they were independent would give an interval narrower by √2, far outside this tolerance."""
    under = [(2, 2)] * 180 + [(1, 1)] * 420
    figures = score_attacks(*judgments_of({"none": [(1, 1)] * 600, "repeat": under}, [1] * 600), 4000, 1)
    width = 1.96 * np.sqrt(0.3 * 0.7 / 600)
    assert figures["attacks"]["repeat"]["flip_rate_ci95"] == pytest.approx([0.3 - width, 0.3 + width], abs=0.004)


def test_a_judge_that_was_never_right_cannot_be_flipped():
    """0 of 0 shown as 0 % would read as safe."""
    figures = score_attacks(*judgments_of({"none": [(2, 2), (2, 2)]}, [1, 1]), 50, 0)
    told = figures["attacks"]["instruction"]
    assert (told["attacked"], told["flip_rate"], told["flip_rate_ci95"]) == (0, None, None)
    assert "| instruction | 0 | – | – | 0.0 % (0.0 – 0.0) |" in attacks.render_card("judge", figures)


def test_a_question_that_does_not_fit_is_left_out_of_every_figure():
    """Judged plainly but not under attack, it would count for one side only."""
    prompts, rows = judgments_of({"none": [(1, 1), (1, 1)]}, [1, 1])
    figures = score_attacks([*prompts, {"id": "too long", "label": 1}], rows, 50, 0)
    assert (figures["n"], figures["overlong"], figures["attacks"]["repeat"]["attacked"]) == (2, 1, 4)


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--model", "nowhere"], ["nowhere", "no such model folder"]),
    (["--num-resamples", "0"], ["--num-resamples", "1 or more", "0"]),
])  # fmt: skip
def test_bad_input_ends_in_one_line(tied_model, tmp_path, arguments, parts):
    line = ["--run-dir", tmp_path, "--model", tied_model, "--data", make_benchmark(tmp_path / "test.jsonl"), *arguments]
    assert_one_line_error(command("conj.sample.evaluation.attacks", *line), *parts)
