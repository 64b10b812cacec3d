"""Layouts: what people's preference data looks like, and what becomes of it; docs/data.md holds the same table."""

import json
import re
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

from conj import InputError
from conj.data.columns import layouts, recognise
from conj.data.fates import Fates
from conj.data.readers import read_preferences


def turn(role: str, text, keys: tuple[str, str] = ("role", "content"), **more) -> dict:
    return dict(zip(keys, (role, text))) | more


user, assistant, system = (partial(turn, role) for role in ("user", "assistant", "system"))
human, gpt = (partial(turn, role, keys=("from", "value")) for role in ("human", "gpt"))
CHOSEN, REJECTED = [user("q"), assistant("a")], [user("q"), assistant("b")]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
IN = (("q", "a", "b", None),)  # one record: question, better, worse, and why it is unusable
SEARCH = {"type": "function", "function": {"name": "search", "arguments": '{"query": "雨"}'}}
SYSTEM = [system("s"), user("q")]


def counted(why: str, question="q", better="a", worse="b") -> tuple:
    return ((question, better, worse, why),)


@dataclass(frozen=True)
class Case:
    """A row, the records that it must give, or what its refusal must say; and fates that must be counted."""

    row: dict
    records: tuple = IN
    refused: str = ""
    counts: dict = field(default_factory=dict)
    known: tuple[str, ...] = ()  # not needed, and counted as such
    unused: tuple[str, ...] = ()


CASES = {
    "Prompt, chosen, rejected": Case(PAIR | {"chosen_model": "m"}, known=("chosen_model",)),
    "RewardBench": Case(PAIR | {"subset": "hep-go", "id": 3, "rejected_model": "m"}, known=("rejected_model",)),
    "TRL, messages": Case({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}),
    "TRL, implicit prompt": Case(
        {"chosen": "The sky is blue.", "rejected": "The sky is black."}, (("The sky is", "blue.", "black.", None),),
        counts={"questions_from_a_common_start": 1},
    ),
    "Skywork (chosen and rejected open with the question)": Case({"chosen": CHOSEN, "rejected": REJECTED, "source": "m"}),
    "UltraFeedback, binarized": Case(
        {"prompt": "q", "prompt_id": "i", "chosen": CHOSEN, "rejected": REJECTED, "messages": CHOSEN}
        | {"score_chosen": 8.0, "score_rejected": 7.5}, known=("messages",),
    ),
    "UltraFeedback, raw": Case(
        {"instruction": "q", "source": "evol", "models": ["x", "y", "z"], "completions": [
            {"response": text, "model": "x", "overall_score": 5, "critique": "c",
             "annotations": {"helpfulness": {"Rating": rating, "Rationale": "r"}, "honesty": {"Rating": "4"}}}
            for text, rating in (("b", "3"), ("a", "5"), ("c", "N/A"))]},
        (("q", "a", "b", None), ("q", "a", "c", None)),
        counts={"rows_of_several_answers": 1, "pairs_of_several_answers": 2},
        known=("models", "completions[].model", "completions[].overall_score", "completions[].critique",
               "completions[].annotations.helpfulness.Rationale"),
    ),
    "Infinity-Preference": Case({"prompt": "q", "task_category": "Math", "chosen": CHOSEN, "rejected": REJECTED, "id": 1}),
    "hh-rlhf": Case({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    "hh-rlhf, an empty answer": Case(
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"}, (("q", "a", "", None),)),
    "hh-rlhf, with a prompt": Case({"prompt": "Human: q\n\nAssistant:", "chosen": "a", "rejected": "b"}),
    "OpenAI, preference fine-tuning": Case(
        {"input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]}, known=("input.parallel_tool_calls",)),
    "Orca": Case({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ((SYSTEM, "a", "b", None),)),
    "Alpaca, chosen and rejected": Case(
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, (("q\n\ni", "a", "b", None),)),
    "Alpaca, two outputs": Case({"instruction": "q", "input": "", "output": ["a", "b"]}),
    "OpenRLHF": Case({"input": "q", "chosen": "a", "rejected": "b"}),
    "LLaMA-Factory, sharegpt": Case({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}),
    "LLaMA-Factory, system and history": Case(
        {"instruction": "q2", "system": "s", "history": [["q", "a1"]], "chosen": "a", "rejected": "b"},
        (([system("s"), user("q"), assistant("a1"), user("q2")], "a", "b", None),),
    ),
    "Argilla, chosen and rejected": Case(
        {"dataset": "d", "chosen": CHOSEN, "rejected": REJECTED, "chosen_rating": 5.0, "rejected_rating": 3.0}, known=("dataset",)),
    "Argilla, chosen and rejected response": Case(
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 4.5, "rejected_avg_rating": 3}),
    "Argilla, ranked responses": Case({"prompt": "q", "responses": ["b", "a"], "ranks": [2, 1]}),
    "distilabel, chosen and rejected": Case(
        {"system": "", "input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "order": ["x", "y"],
         "rating": [9, 1], "chosen_score": 9, "status": "unchanged"},
        known=("generations", "order", "rating"), unused=("status", "chosen_score"),
    ),
    "distilabel, ratings": Case({"instruction": "q", "generations": ["b", "a"], "ratings": [1, 5], "model_name": "m"},
                                known=("model_name",)),
    "distilabel, rating": Case({"input": "q", "generations": ["b", "a"], "rating": [1, 5], "rationale": ["x", "y"]},
                               known=("rationale",)),
    "HelpSteer2": Case(
        {"split": "train", "prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2,
         "preference_statement": "s"}, known=("split", "preference_statement")),
    "HelpSteer3": Case(
        {"domain": "code", "language": "c", "context": [user("q")], "response1": "a", "response2": "b",
         "overall_preference": -3, "individual_preference": [{"score": -3, "reasoning": "r"}]},
        known=("language", "individual_preference")),
    "Nectar": Case(
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 3, "source": ["x"], "good_natured": True,
         "answers": [{"answer": "c", "model": "x", "rank": 3.0}, {"answer": "a", "model": "y", "rank": 1.0},
                     {"answer": "b", "model": "z", "rank": 2.0}]},
        (("q", "a", "c", None), ("q", "a", "b", None)), known=("turns", "num_responses", "source", "good_natured", "answers[].model")),
    "SHP": Case(
        {"post_id": "p", "domain": "askculinary_train", "history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0,
         "score_A": 1, "score_B": 5}, known=("score_A", "score_B")),
    "LMSYS arena": Case(
        {"question_id": "i", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "j", "turn": 1, "anony": True,
         "conversation_a": [user("q"), assistant("b")], "conversation_b": CHOSEN, "language": "en", "tstamp": 1.0},
        known=("model_a", "model_b", "judge", "anony", "language", "tstamp")),
    "LMSYS arena, several turns": Case(
        {"winner": "model_a", "turn": 2, "conversation_a": [*CHOSEN, user("q2"), assistant("a")],
         "conversation_b": [*REJECTED, user("q2"), assistant("b")]},
        counted("two_questions", [user("q"), assistant("a"), user("q2")])),
    "LMArena 140k": Case(
        {"id": "i", "winner": "model_a", "conversation_a": [user([{"type": "text", "text": "q", "image": None}]), assistant("a")],
         "conversation_b": REJECTED, "full_conversation": [{"user": "q"}], "evaluation_order": 1},
        known=("full_conversation", "evaluation_order")),
    "LMArena, both bad": Case({"winner": "both_bad", "conversation_a": CHOSEN, "conversation_b": REJECTED}, counted("tie")),
    "LMArena, search": Case({"messages_a": CHOSEN, "messages_b": REJECTED, "winner": "model_a", "turn": 1}, known=("turn",)),
    "LMArena 55k, a null answer before": Case(
        {"prompt": '["q1", "q2"]', "response_a": '[null, "a"]', "response_b": '[null, "b"]', "winner_model_a": 1,
         "winner_model_b": 0}, counted("no_question", "")),
    "LMArena 55k": Case(
        {"id": 1, "model_a": "x", "prompt": '["q"]', "response_a": '["b"]', "response_b": '["a"]', "winner_model_a": 0,
         "winner_model_b": 1, "winner_tie": 0}, known=("model_a", "winner_tie")),
    "LMArena 48k, Kaggle": Case({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a"}),
    "MT-Bench, human judgments": Case(
        {"question_id": 81, "winner": "model_a", "turn": 1, "conversation_a": [*CHOSEN, user("q2"), assistant("a2")],
         "conversation_b": [*REJECTED, user("q2"), assistant("b2")]}),
    "PPE": Case({"question_id": "i", "prompt": "q", "response_1": "a", "response_2": "b", "winner": "model_a", "is_code": False},
                known=("is_code",)),
    "OpenAI summarize": Case(
        {"info": {"id": "i", "post": "p", "title": "t", "subreddit": "s"}, "choice": 1, "worker": "w", "batch": "1",
         "split": "train", "summaries": [{"text": "b", "policy": "sup"}, {"text": "a", "policy": "ppo"}], "extra": {"x": 1}},
        (("Summarize the following text.\n\nt\n\np", "a", "b", None),),
        known=("worker", "batch", "split", "info.subreddit", "summaries[].policy", "extra")),
    "WebGPT": Case(
        {"question": {"dataset": "d", "id": "i", "full_text": "q"}, "answer_0": "b", "answer_1": "a", "score_0": -1.0,
         "score_1": 1.0, "quotes_0": {"title": ["t"], "extract": ["e"]}, "tokens_0": {"prefix": [1]}},
        known=("question.dataset", "tokens_0"), unused=("quotes_0",)),
    "AlpacaFarm": Case({"instruction": "q", "input": "", "output_1": "b", "output_2": "a", "preference": 2}),
    "JudgeLM": Case({"question_body": "q", "answer1_body": "a", "answer2_body": "b", "score": [8, 5]}),
    "StackExchange, paired": Case({"qid": 1, "question": "q", "response_j": "a", "response_k": "b", "metadata": ["u"]},
                                  known=("qid", "metadata")),
    "CValues": Case({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "pos_type": "t"}, known=("pos_type",)),
    "RewardBench 2": Case(
        {"id": "i", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "num_incorrect": 3,
         "total_completions": 4, "models": ["m"] * 4, "subset": "Math", "additional_metadata": {"category": "x"}},
        (("q", "a", "b", None), ("q", "a", "c", None), ("q", "a", "d", None)),
        known=("num_correct", "num_incorrect", "total_completions", "models", "additional_metadata")),
    "RewardBench 2, ties": Case(
        {"prompt": "q", "chosen": ["a", "x", "y"], "rejected": ["b", "c", "d"], "num_correct": 3, "num_incorrect": 3, "subset": "Ties"},
        (("q", "a", "b", None), ("q", "a", "c", None), ("q", "a", "d", None)), counts={"answers_not_paired": 2},
        known=("num_correct", "num_incorrect")),
    "RM-Bench": Case(
        {"id": 1, "prompt": "q", "chosen": ["a", "a1", "a2"], "rejected": ["b", "b1", "b2"], "subset": "chat"},
        tuple(("q", better, worse, None) for better in ("a", "a1", "a2") for worse in ("b", "b1", "b2"))),
    "PKU-SafeRLHF": Case(
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1,
         "is_response_0_safe": False}, (*IN, ("q", "b", "a", None)), known=("is_response_0_safe",)),
    "LLMBar": Case({"input": "q", "output_1": "b", "output_2": "a", "label": 2}),
    "LLMBar, with an instruction": Case({"instruction": "q", "input": "i", "output_1": "a", "output_2": "b", "label": 1},
                                        (("q\n\ni", "a", "b", None),)),
    "JudgeBench": Case(
        {"pair_id": "i", "original_id": "o", "source": "law", "response_model": "m", "question": "q", "response_A": "b",
         "response_B": "a", "label": "B>A"}, known=("original_id", "response_model")),
    "PandaLM": Case(
        {"idx": 0, "motivation_app": "g", "cmp_key": "k", "instruction": "q", "input": "", "response1": "b", "response2": "a",
         "annotator1": 2, "annotator2": 2, "annotator3": 1}, known=("motivation_app", "cmp_key")),
    "conj": Case({"question": "q", "answer_1": "a", "answer_2": "b", "label": 1}),
    "conj, multi-turn": Case({"messages": SYSTEM, "answer_1": "a", "answer_2": "b", "label": 1}, ((SYSTEM, "a", "b", None),)),
    "Prompt and system prompt": Case(PAIR | {"system_prompt": "s"}, ((SYSTEM, "a", "b", None),)),
    "Prompt and the first turn differ by white space": Case({"prompt": "q\n", "chosen": CHOSEN, "rejected": REJECTED}),
    "Prompt and a conversation with a system turn": Case(
        {"prompt": "q", "chosen": [*SYSTEM, assistant("a")], "rejected": [*SYSTEM, assistant("b")]}, ((SYSTEM, "a", "b", None),)),
    "Prompt is the conversation's last question": Case(
        {"prompt": "q2", "chosen": [*CHOSEN, user("q2"), assistant("x")], "rejected": [*CHOSEN, user("q2"), assistant("y")]},
        (([*CHOSEN, user("q2")], "x", "y", None),)),
    "Conversation is the prompt's last question": Case(
        {"prompt": [*CHOSEN, user("q2")], "chosen": [user("q2"), assistant("x")], "rejected": [user("q2 "), assistant("y")]},
        (([*CHOSEN, user("q2")], "x", "y", None),)),
    "Conversation with the chosen answer": Case({"messages": CHOSEN, "chosen": "a", "rejected": "b"}),
    "Prompt and conversation ask two things": Case({"prompt": "p", "chosen": CHOSEN, "rejected": REJECTED},
                                                   counted("two_questions", "p")),
    "Other names of the roles": Case(
        {"chosen": [turn("Human", "q"), turn("Assistant", "a")], "rejected": [turn("prompter", "q"), turn("bot", "b")]}),
    "Unknown role": Case({"chosen": [turn("narrator", "q"), assistant("a")], "rejected": REJECTED}, refused="unknown role 'narrator'"),
    "Content parts": Case({"chosen": [user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": "a"}])], "rejected": REJECTED}),
    "Content parts with an image": Case(
        {"chosen": [user([{"type": "image_url", "image_url": {"url": "u"}}]), assistant("a")], "rejected": REJECTED},
        refused="content part of type 'image_url'"),
    "Images": Case(PAIR | {"images": ["cat.png"]}, refused="images holds"),
    "Tool calls and results": Case(
        {"prompt": [user("q"), assistant(None, tool_calls=[SEARCH]), turn("tool", "wet")], "chosen": "a", "rejected": "b"},
        (([user("q"), assistant('tool_call: {"name": "search", "arguments": {"query": "雨"}}'), turn("tool", "wet")], "a", "b", None),)),
    "Tool call as the answer": Case(
        {"prompt": "q", "chosen": [assistant("", tool_calls=[SEARCH])], "rejected": [assistant("b")]},
        (("q", 'tool_call: {"name": "search", "arguments": {"query": "雨"}}', "b", None),)),
    "Tools": Case(PAIR | {"system": "s", "tools": '[{"name": "search"}]'},
                  (([system('s\n\ntools: [{"name": "search"}]'), user("q")], "a", "b", None),)),
    "Tool definitions and a system turn": Case(
        {"tools": [{"name": "f"}], "chosen": [*SYSTEM, assistant("a")], "rejected": [*SYSTEM, assistant("b")]},
        (([system('s\n\ntools: [{"name": "f"}]'), user("q")], "a", "b", None),)),
    "Last turn is the user's": Case({"prompt": "q", "chosen": [*CHOSEN, user("thanks")], "rejected": REJECTED},
                                    counted("no_answer", [user("q"), assistant("a")], "")),
    "Both last turns are the user's": Case({"chosen": CHOSEN[:1], "rejected": REJECTED[:1], "prompt": "q"}, counted("no_answer", "q", "", "")),
    "Question ends with an answer": Case(
        {"messages": [user("q"), assistant("x")], "answer_1": "a", "answer_2": "b", "label": 1},
        counted("no_question", [user("q"), assistant("x")])),
    "Null answer": Case(PAIR | {"rejected": None}, counted("no_answer", worse="")),
    "NaN answer": Case(PAIR | {"chosen": float("nan")}, counted("no_answer", better="")),
    "Null question": Case(PAIR | {"prompt": None}, counted("no_question", "")),
    "Scores contradict": Case(PAIR | {"score_chosen": 2.0, "score_rejected": 3.0}, counted("scores_contradict")),
    "Scores are equal": Case(PAIR | {"score_chosen": 3, "score_rejected": "3"}, counted("tie")),
    "Two system prompts": Case({"system": "s", "prompt": [system("t"), user("q")], "chosen": "a", "rejected": "b"}, refused="two system prompts"),
    "KTO (one answer)": Case({"prompt": "q", "completion": "a", "label": True}, refused="of no known layout"),
    "HelpSteer, ratings (one answer)": Case({"prompt": "q", "response": "a", "helpfulness": 4}, refused="of no known layout"),
    "Alpaca, one output": Case({"instruction": "q", "input": "", "output": "a"}, refused="of no known layout"),
}  # fmt: skip


def read(*rows: dict, **options) -> tuple[list[tuple], Fates]:
    fates = Fates()
    found = list(read_preferences(rows, fates=fates, **options))
    return [(record.question, record.better, record.worse, record.unusable) for record in found], fates


@pytest.mark.parametrize("name", CASES)
def test_input_gives_these_records_or_one_line(name):
    """A layout read the wrong way round trains the judge to prefer the worse answers; a column that is lost in silence may
    have decided which is right."""
    case = CASES[name]
    if case.refused:
        with pytest.raises(InputError, match=f"^tuple: row 1: .*{re.escape(case.refused)}"):
            read(case.row)
        return
    found, fates = read(case.row)
    assert found == list(case.records)
    assert case.counts.items() <= fates.counts.items()
    assert set(fates.leftover) == set(case.unused)
    assert set(fates.not_needed) == set(case.known)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_no_column_is_lost_in_silence(name):
    """A column that no path reads is named, with how many rows hold it and an example; so is a key of messages."""
    if name == "TRL, implicit prompt":  # the column may be the question, so the texts' common start is none
        with pytest.raises(InputError, match="missing column prompt"):
            read(CASES[name].row | {"surprise": "x"})
        return
    row = CASES[name].row
    plain, _ = read(row)
    found, fates = read(row | {"surprise": "x"}, row | {"surprise": ""}, row | {"surprise": {"y": 1}})
    assert found == plain * 3
    assert fates.report()["unused_columns"]["surprise"] == {"rows": 2, "example": "tuple: row 1: 'x'"}
    assert set(fates.leftover) == {"surprise", *CASES[name].unused}


def test_every_layout_is_among_the_cases():
    """A layout without a case here could be read the wrong way round."""
    met = {recognise(case.row).name for case in CASES.values() if not case.refused}
    assert {layout.name for layout in layouts()} == met


def test_keys_of_messages_that_nothing_reads_are_named():
    chosen = [user("q", name="Ann"), assistant("a", reasoning_content="because", tool_calls=None)]
    _, fates = read({"chosen": chosen, "rejected": REJECTED})
    assert fates.leftover == {
        "chosen[].name": {"rows": 1, "example": "tuple: row 1: 'Ann'"},
        "chosen[].reasoning_content": {"rows": 1, "example": "tuple: row 1: 'because'"},
    }


@pytest.mark.parametrize(("scores", "pairs", "unpaired"), [
    ([1, 3, 2], ["ba", "bc"], 0), ([3, 3, 1], ["ac"], 1), ([1, 3, 3], ["ba"], 1), ([2, None, 1], ["ac"], 1),
])  # fmt: skip
def test_the_best_of_several_answers_is_paired_with_each_that_is_lower(scores, pairs, unpaired):
    """All pairs of seven answers would weigh a question 21 times; two of equal score state no preference."""
    found, fates = read({"instruction": "q", "generations": list("abc"), "ratings": scores})
    assert [better + worse for _, better, worse, _ in found] == pairs
    assert fates.counts == {
        "rows_of_several_answers": 1, "pairs_of_several_answers": len(pairs), "answers_not_paired": unpaired,
    }  # fmt: skip


@pytest.mark.parametrize(("scores", "why"), [([2, 2, 2], "tie"), ([2, None, None], "no_answer")])
def test_several_answers_of_one_score_state_no_preference(scores, why):
    found, _ = read({"instruction": "q", "generations": list("abc"), "ratings": scores})
    assert [unusable for *_, unusable in found] == [why]


ODD = [
    None, float("nan"), float("inf"), "", 0, 1, -5, 2.5, True, 10**400, [], {}, [None], [[]], ["x"], [1, 2, 3], {"a": {"b": 1}},
    {"role": "user"}, {"role": "assistant", "content": None}, [user("z")], [system("s")], "Human: a\n\nAssistant: b",
    {"type": "text"}, [{"type": "text", "text": 3}], assistant("", tool_calls=[{"id": 3}]), user([]),
]  # fmt: skip


def places(value, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def replaced(value, path: tuple, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", CASES)
def test_a_row_with_an_odd_value_is_read_or_refused_in_one_line(name):
    """A traceback at row 60,000 says nothing to whoever has the file."""
    row = CASES[name].row
    for place, odd in product(places(row), ODD):
        try:
            found, _ = read(replaced(row, place, odd))
        except InputError as e:
            assert "\n" not in str(e)
        else:
            assert all(isinstance(answer, str | bool | int | float) for record in found for answer in record[1:3])


ROW = {
    "ask": {"text": "q"},
    "replies": [{"text": "b", "by": "x"}, {"text": "a", "by": "y"}],
    "rules": "s",
    "won": 1,
    "when": "x",
}
MAP = {
    "question": "ask.text",
    "answer_1": "replies.0.text",
    "answer_2": "replies.-1.text",
    "system": "rules",
    "index": "won",
}


def test_columns_that_the_user_names_are_read_and_the_rest_is_named():
    """Dotted paths and places in lists; what is not named is not read, be it a system prompt."""
    found, fates = read(ROW, columns=MAP)
    assert found == [(SYSTEM, "a", "b", None)]
    assert set(fates.leftover) == {"replies[].by", "when"}
    found, fates = read(ROW, columns={k: v for k, v in MAP.items() if k != "system"})
    assert found == list(IN) and "rules" in fates.leftover


@pytest.mark.parametrize(("row", "columns"), [
    ({"x": "q", "y": "a", "z": "b"}, {"question": "x", "better": "y", "worse": "z"}),
    ({"x": "q", "y": [{"t": "b", "s": 1}, {"t": "a", "s": 2}]}, {"question": "x", "answers": "y.*.t", "scores": "y.*.s"}),
    ({"x": "q", "y": ["b", "a"], "z": [2, 1]}, {"question": "x", "answers": "y", "ranks": "z"}),
    ({"x": "q", "y": ["a"], "z": ["b"]}, {"question": "x", "betters": "y", "worses": "z"}),
    ({"x": "q", "y": "b", "z": "a", "l": "B"}, {"question": "x", "answer_1": "y", "answer_2": "z", "label": "l"}),
    ({"x": "q", "y": "b", "z": "a", "v": [2, 2, 0]}, {"question": "x", "answer_1": "y", "answer_2": "z", "votes": "v"}),
    ({"x": "q", "y": "b", "z": "a", "s": 1, "t": 2}, {"question": "x", "answer_1": "y", "answer_2": "z", "score_1": "s", "score_2": "t"}),
    ({"x": CHOSEN, "y": REJECTED}, {"better": "x", "worse": "y"}), ({"a.b": "q", "y": "a", "z": "b"}, {"question": "a.b", "better": "y", "worse": "z"}),
])  # fmt: skip
def test_every_way_to_state_a_preference_can_be_named(row, columns):
    found, fates = read(row, columns=columns)
    assert found == list(IN) and not fates.leftover


@pytest.mark.parametrize(("columns", "message"), [
    ({"question": "prompts", "better": "chosen", "worse": "rejected"}, "--columns question=prompts: no such column; found chosen, prompt, rejected"),
    ({"question": "prompt", "better": "chosen.-1.contents", "worse": "rejected"}, "--columns better=chosen.-1.contents: leads to nothing"),
    ({"ask": "prompt"}, "--columns ask=: no such target; expected one of answer_1, "),
    ({"question": "prompt", "better": "chosen"}, "--columns: expected better and worse or "),
    ({"question": "prompt", "answer_1": "chosen", "answer_2": "rejected"}, "--columns: expected one of label, index, votes, score_1; found none"),
    ({"question": "prompt", "better": ""}, "--columns better: expected the name of a column"),
    ({"question": "prompt", "better": "chosen", "worse": "rejected", "score_better": "x"}, "--columns: expected the scores of both"),
])  # fmt: skip
def test_a_map_that_cannot_be_is_refused_in_one_line(columns, message):
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        read(PAIR, columns=columns)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("labels", "refused"),
    [((0, 1), True), (("0", "1"), True), ((0, 1, 2), False), ((1, 1), False), (("A", "tie"), False)],
)
def test_labels_that_count_from_0_are_not_taken_for_ties(labels, refused):
    """0 would be a tie and 1 the first answer: every preference of the file would be lost or turned round."""
    columns = {"question": "prompt", "answer_1": "chosen", "answer_2": "rejected", "label": "l"}
    rows = [PAIR | {"l": label} for label in labels]
    if refused:
        with pytest.raises(InputError, match="labels in l: expected 1, 2, .*give --columns … index=l"):
            read(*rows, columns=columns)
        columns["index"] = columns.pop("label")
        assert [better for _, better, *_ in read(*rows, columns=columns)[0]] == ["a", "b"]
    else:
        assert len(read(*rows, columns=columns)[0]) == len(rows)


def test_a_column_that_some_rows_lack_is_refused_only_where_it_is_needed():
    columns = {"question": "prompt", "better": "chosen", "worse": "rejected", "system": "rules"}
    found, _ = read(PAIR | {"rules": "s"}, PAIR, columns=columns)
    assert [question for question, *_ in found] == [SYSTEM, "q"]
    with pytest.raises(InputError, match="row 2: missing column chosen; found prompt, rejected"):
        read(PAIR | {"rules": "s"}, {"prompt": "q", "rejected": "b"}, columns=columns)


def test_own_ids_and_subsets_are_kept():
    (record,) = read_preferences([PAIR | {"prompt_id": "p7", "source": "law"}])
    assert (record.own_id, record.subset) == ("p7", "law")


FRAMES = {
    "list of dicts": lambda rows: rows,
    "generator": lambda rows: (row for row in rows),
    "pandas DataFrame": lambda rows: pytest.importorskip("pandas").DataFrame(rows),
    "Dataset": lambda rows: pytest.importorskip("datasets").Dataset.from_list(rows),
    "arrow table": lambda rows: pytest.importorskip("pyarrow").Table.from_pylist(rows),
}


@pytest.mark.parametrize("name", FRAMES)
def test_python_objects_are_read_like_a_file(name, tmp_path):
    """A frame must not be sent to disk, nor looked for on the hub, to be read."""
    rows = [
        {"chosen": [user(f"q{i}"), assistant("a")], "rejected": [user(f"q{i}"), assistant("b")], "n": i}
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_preferences(FRAMES[name](rows))) == list(read_preferences(tmp_path / "rows.jsonl"))


def test_types_of_numpy_in_a_frame_are_pythons():
    """A frame made from parquet holds arrays for lists and NaN for null: neither is an answer."""
    np, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["q", "q"], "chosen": ["a", np.nan], "rejected": ["b", "b"]})
    assert read(*frame.to_dict("records"))[0] == list(IN + counted("no_answer", better=""))
    found = read_preferences(frame)
    assert [record.unusable for record in found] == [None, "no_answer"]
    frame = pandas.DataFrame(
        {
            "chosen": [np.array(CHOSEN, dtype=object)],
            "rejected": [np.array(REJECTED, dtype=object)],
            "id": [np.int64(3)],
        }
    )
    (record,) = read_preferences(frame)
    assert (record.question, record.better, record.own_id, type(record.own_id)) == ("q", "a", 3, int)


def test_members_of_a_dataset_dict_are_named():
    datasets = pytest.importorskip("datasets")
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR]))
    with pytest.raises(
        InputError, match="DatasetDict: expected rows, found a mapping of train; give one of its members"
    ):
        list(read_preferences(data))
    assert len(list(read_preferences(data["train"]))) == 1


def test_the_table_of_the_documentation_is_this_one():
    """A reader looks there for what becomes of a data set."""
    text = Path(ROOT / "docs" / "data.md").read_text("utf-8")
    table = text.partition("## Inputs")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \| .* \| ([^|]+?) \|$", table, re.M))
    rows = {name: outcome for name, outcome in rows.items() if name not in ("input", "---")}
    assert rows.keys() == CASES.keys()
    for name, case in CASES.items():
        unusable = case.records[0][3]
        expected = "refused" if case.refused else f"counted: {unusable}" if unusable else "in"
        assert rows[name].startswith(expected), f"{name}: {rows[name]}"


@pytest.mark.parametrize("label", ["²", "--1", "1.0", "", " one"])
def test_a_label_that_is_nearly_a_number_is_one_line(label):
    """`"²".isdigit()` is true."""
    columns = {"question": "prompt", "answer_1": "chosen", "answer_2": "rejected", "label": "l"}
    with pytest.raises(InputError, match="row 1: expected l to be one of 0, "):
        read(PAIR | {"l": label}, columns=columns)
    assert read(PAIR | {"l": " 2 "}, columns=columns)[0][0][1] == "b"


def test_labels_of_0_and_1_are_refused_in_a_known_layout_too():
    """`question, answer_1, answer_2, label` is what anyone calls them, and a ClassLabel counts from 0."""
    rows = [{"question": f"q{i}", "answer_1": "a", "answer_2": "b", "label": i} for i in (0, 1, 2)]
    with pytest.raises(InputError, match="labels in label: expected 1, 2, or 0 for a tie, found 0 and 1 alone"):
        read(*rows[:2])
    assert len(read(*rows)[0]) == 3


@pytest.mark.parametrize("depth", [600, 5000])
def test_a_row_that_is_nested_too_deeply_is_one_line(depth, tmp_path):
    value = []
    for _ in range(depth):
        value = [value]
    with pytest.raises(InputError, match="row 1: expected texts and messages, found values nested too deeply"):
        read(PAIR | {"x": value})
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR)[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(InputError, match="rows.jsonl:1: expected (texts|JSON)"):
        list(read_preferences(tmp_path / "rows.jsonl"))
    (record,), _ = read(PAIR | {"tools": "[" * 5000 + "]" * 5000})  # a text that is no JSON
    assert record[0][0]["content"].startswith('tools: "[[')


def test_a_column_that_stands_twice_in_a_frame_is_refused():
    """A dict would keep one of them."""
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    names = ["prompt", "chosen", "rejected", "prompt"]
    for data in (
        pandas.DataFrame([["q", "a", "b", "other"]], columns=names),
        pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 4, names=names),
        pandas.DataFrame([PAIR], index=pandas.Index([5], name="prompt")),
    ):
        with pytest.raises(InputError, match="of different names, found prompt twice"):
            list(read_preferences(data))


def test_the_python_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """And prints what stands below it."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    text = Path(ROOT / "docs" / "data.md").read_text("utf-8")
    examples = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", text, re.S)
    assert len(examples) == text.count("```python") == 2
    for code, printed in examples:
        exec(code, {})
        assert capsys.readouterr().out == printed


def test_a_conversation_of_a_question_alone_is_counted():
    """One such row is no reason to refuse 80,000."""
    (record,), _ = read({"chosen": [user("q")], "rejected": [user("q")]})
    assert record[0] == "q" and record[3] == "no_answer"


@pytest.mark.parametrize(
    "columns",
    [
        {"better": "chosen", "worse": "rejected", "label": "l"},
        {"answer_1": "chosen", "answer_2": "rejected", "label": "l", "score_better": "l", "score_worse": "l"},
        {"answers": "l", "scores": "l", "votes": "l"},
        {"betters": "l", "worses": "l", "ranks": "l"},
    ],
)
def test_a_target_that_the_answers_do_not_need_is_refused(columns):
    """Whoever names a label wants it read."""
    with pytest.raises(InputError, match="--columns (label|score_better|votes|ranks)=: not read beside "):
        read(PAIR | {"l": 2}, columns={"question": "prompt"} | columns)


def test_a_subset_or_an_id_of_another_type_is_named():
    records, fates = read(PAIR | {"subset": 3, "id": [1]})
    assert len(records) == 1 and fates.not_needed == {"subset": 1, "id": 1}
    (record,) = read_preferences([PAIR | {"subset": 3, "source": "s", "id": None, "uid": 4}])
    assert (record.subset, record.own_id) == ("s", 4)
