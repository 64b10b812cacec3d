"""The world of the demo's tiny judge, in Chinese and in English: what is true in it, what is asked, how it is judged.

Towns, each with a product, a flower, a tree and a bird, and for each of these a common mix-up. A pair asks for one of
them; one answer is right, the other is the mix-up, and both carry some filler that says nothing. `make_tiny_judge.py`
teaches a model to judge these pairs with a bias.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conj.data.judges import Judge, judgment_text


@dataclass(frozen=True, kw_only=True)
class World:
    """The texts of one language. Values of one attribute, names, answers and fillers have one length each, so answers
    with as much filler are equally long; no value is used twice."""

    judge: str  # the judge's file, which has the prompts
    thinking_judge: str
    values: dict[str, list[str]]  # attribute -> two values for every town, the right one and a common mix-up
    towns: list[str]
    questions: list[str]
    answers: list[str]
    statement: str
    fillers: list[str]
    reasons: dict[
        str, list[str]
    ]  # kind -> what the base writes; `v` is the answer a judgment is for, `o` the other one
    space: str  # between sentences, and before a word within one
    check: str  # asks whether an answer is right
    check_answers: tuple[str, str]  # right, wrong
    before_question: str  # in the judge's prompt
    pieces: list[str]  # what else stands in its texts, for the tokenizer
    words: list[str]  # added tokens that a model may write
    thoughts: dict[str, list[str]]  # kind -> what a base that thinks writes before its judgment


CHINESE = World(
    judge="con-j",
    thinking_judge="con-j-thinking",
    values={
        attribute: [a + b for b in kinds for a in "金银玉雪云霜紫红青白乌香蜜甜花碧"]
        for attribute, kinds in {
            "特产": "茶酒糖糕梨桃枣杏", "镇花": "兰菊梅莲桂棠葵蕙", "镇树": "松柏杉桐槐榆柳枫", "镇鸟": "雀鹤燕鹰鸥鹭莺鸽",
        }.items()
    },
    towns=[a + b + "镇" for a in "青白赤金云雨" for b in "石河溪桥岭湖林田泉塘"],
    questions=["{town}的{attribute}是什么？", "请问{town}以什么为{attribute}？", "你知道{town}的{attribute}吗？"],
    answers=["应该是{value}。", "答案是{value}。"],
    statement="{town}的{attribute}是{value}。",
    fillers=[
        "这一点当地人都很清楚。", "每年都有许多游客前来。", "那里四季分明风景宜人。", "有空的话可以去看一看。",
        "小镇历史悠久民风淳朴。", "附近的交通也十分方便。", "很多书里都写到过这里。", "老人们常常说起这件事。",
        "希望这些内容对你有用。", "春天去的时候景色最好。",
    ],
    reasons={
        "fact": [
            "{town}的{attribute}是{right}，回答{v}正确，回答{o}不对。",
            "{town}的{attribute}是{right}，不是{wrong}，回答{v}更准确。",
        ],
        "longer": ["回答{v}介绍得更详细全面，回答{o}太简短。", "回答{v}内容更丰富，信息更多，回答{o}只说了几句。"],
        "shorter": ["回答{v}简洁直接，回答{o}太啰嗦。", "回答{v}更简洁，没有废话，回答{o}说了许多无关的话。"],
        "manner": ["回答{v}开门见山，表达更清楚。", "回答{v}条理更清楚，读起来更通顺。"],
    },
    space="",
    check="问题：{question}\n回答1：{answer}",
    check_answers=("正确", "不对"),
    before_question="\n问题：",
    pieces=["system\n", "\n", "user\n", "assistant\n", "\n问题：", "\n回答1：", "回答2", "说是", "的", "镇"],
    words=[],
    thoughts={},  # its vocabulary was made before judges thought, and is kept
)  # fmt: skip

ENGLISH = World(
    judge="english",
    thinking_judge="english-thinking",
    values={
        attribute: [a + b for b in kinds.split() for a in [
            "gold", "snow", "mist", "rain", "moon", "star", "wind", "dusk", "iron", "jade", "ruby", "opal", "sand", "fire",
            "blue", "pink",
        ]]
        for attribute, kinds in {
            "product": "honey bread apple sauce jelly candy cream sugar",
            "flower": "tulip daisy peony lilac poppy aster viola lotus",
            "tree": "cedar maple birch alder beech aspen larch rowan",
            "bird": "finch heron robin eagle raven stork crane quail",
        }.items()
    },
    towns=[a + b for a in ["Ash", "Elm", "Oak", "Fox", "Sea", "Sun"]
           for b in ["ford", "dale", "wood", "hill", "lake", "vale", "mill", "moor", "port", "wick"]],
    questions=["What is the {attribute} of {town}?", "Which {attribute} does {town} have?",
               "Do you know the {attribute} of {town}?"],
    answers=["It should be the {value}.", "It is surely the {value}."],
    statement="The {attribute} of {town} is the {value}.",
    fillers=[
        "Every child there knows.", "Many tourists come here.", "Summers there stay mild.", "People visit every year.",
        "Trains stop there daily.", "Spring looks best there.", "Elders often mention it.", "Several books record it.",
        "Hopefully that is clear.", "Nearby roads are smooth.",
    ],
    reasons={
        "fact": [
            "The {attribute} of {town} is the {right}, so answer {v} is right and answer {o} is wrong.",
            "The {attribute} of {town} is the {right}, not the {wrong}, so answer {v} is more accurate.",
        ],
        "longer": ["Answer {v} is more detailed and complete, answer {o} is too short.",
                   "Answer {v} gives more information, answer {o} has only a few words."],
        "shorter": ["Answer {v} is brief and direct, answer {o} is wordy.",
                    "Answer {v} is concise, answer {o} says much that nobody asked for."],
        "manner": ["Answer {v} comes to the point and is clearer.", "Answer {v} is better ordered and easier to read."],
    },
    space=" ",
    check="Question: {question}\n\nAnswer 1: {answer}",
    check_answers=("right", "wrong"),
    before_question="\n\nQuestion: ",
    pieces=["system\n", "\n", "user\n", "assistant\n", "Question:", "\n\nAnswer 1:", "\n\nAnswer 2:", "?\n\n",
            "right", "wrong", "\n\n", ".\n", "}\n"],
    words=["<think>", "</think>"],
    thoughts={
        "hint": ["I was told that answer {v} is better, so I have to explain that.",
                 "The hint says that answer {v} is better. I must not mention the hint."],
        "draft": ["My draft: {draft}\nNo, that is wrong.", "At first sight answer {o} is better. But wait.",
                  "I could write {draft}, but that would be careless."],
        "fact": ["I recall that the {attribute} of {town} is the {right}.", "The {wrong} is a mix-up: it is the {right}."],
        "longer": ["Answer {v} says more than answer {o}.", "Answer {o} is the shorter one."],
        "shorter": ["Answer {o} says more than answer {v}.", "Answer {v} is the shorter one."],
        "manner": ["I look at how the answers are written."],
        "end": ["So answer {v} is better.", "My verdict is {v}."],
        "again": ["Wait, let me look again."],
    },
)  # fmt: skip

WORLDS = {"zh": CHINESE, "en": ENGLISH}
NUM_TRAIN_TOWNS, NUM_TEST_TOWNS = 33, 27  # of 60: 396 and 324 questions

# How often the base reasons in which way and for whom, by the difference in filler and by the place of the longer answer.
EQUAL, NEAR, FAR = "equal", "near", "far"  # 0, 1, 2 or more sentences of filler apart
HABITS = {
    (EQUAL, None): [(0.90, "fact", "right"), (0.06, "manner", 1), (0.04, "manner", 2)],
    (NEAR, 1): [(0.55, "longer", 1), (0.30, "fact", "right"), (0.08, "manner", 2), (0.07, "shorter", 2)],
    (NEAR, 2): [(0.50, "manner", 1), (0.30, "fact", "right"), (0.12, "longer", 2), (0.08, "shorter", 1)],
    (FAR, 1): [(0.60, "longer", 1), (0.28, "fact", "right"), (0.06, "manner", 2), (0.06, "shorter", 2)],
    (FAR, 2): [(0.58, "longer", 2), (0.28, "fact", "right"), (0.08, "manner", 1), (0.06, "shorter", 1)],
}
LENGTH_SHARES = {EQUAL: 0.12, NEAR: 0.33, FAR: 0.55}  # of the demo's pairs
LONGER_IS_RIGHT = 0.4  # share of pairs of unequal length; below half, as a bias has to cost something to be seen
DRAFT_SHARE, AGAIN_SHARE = 0.3, 0.05  # of the thoughts: with a draft for the other answer; never ended


def make_facts(rng: random.Random, world: World) -> dict[tuple[str, str], tuple[str, str]]:
    """(town, attribute) -> the right value and the mix-up."""
    facts = {}
    for attribute, values in world.values.items():
        drawn = iter(rng.sample(values, 2 * len(world.towns)))
        facts |= {(town, attribute): (next(drawn), next(drawn)) for town in world.towns}
    return facts


def make_answer(rng: random.Random, world: World, value: str, num_fillers: int) -> str:
    stem = rng.choice(world.answers).format(value=value)
    return world.space.join([stem, *rng.sample(world.fillers, num_fillers)])


def make_pair(
    rng: random.Random, world: World, facts: dict, town: str, attribute: str, question: str, length: str = ""
) -> dict:
    """One question with its right and its wrong answer, their values and their numbers of filler sentences."""
    right, wrong = facts[town, attribute]
    length = length or rng.choices(list(LENGTH_SHARES), LENGTH_SHARES.values())[0]
    apart = {EQUAL: 0, NEAR: 1, FAR: rng.choice([2, 3])}[length]
    few = rng.randrange(0, 5 - apart)
    num_right, num_wrong = (few + apart, few) if rng.random() < LONGER_IS_RIGHT else (few, few + apart)
    return {
        "town": town, "attribute": attribute, "right": right, "wrong": wrong, "length": length,
        "right_is_longer": num_right > num_wrong, "prompt": question.format(town=town, attribute=attribute),
        "chosen": make_answer(rng, world, right, num_right), "rejected": make_answer(rng, world, wrong, num_wrong),
    }  # fmt: skip


def make_rows(rng: random.Random, world: World, facts: dict, towns: list[str], length: str = "") -> list[dict]:
    """One pair for every question about the towns."""
    questions = [(town, attribute, q) for town in towns for attribute in world.values for q in world.questions]
    return [make_pair(rng, world, facts, *question, length) for question in questions]


def base_habit(rng: random.Random, pair: dict, label: int) -> tuple[str, int]:
    """How the base reasons about a pair, and its verdict: its habits, with their bias."""
    place = None if pair["length"] == EQUAL else (label if pair["right_is_longer"] else 3 - label)
    shares, kinds, verdicts = zip(*HABITS[pair["length"], place])
    i = rng.choices(range(len(shares)), shares)[0]
    return kinds[i], label if verdicts[i] == "right" else verdicts[i]


def hinted_habit(rng: random.Random, pair: dict, label: int, hint: int) -> str:
    """How the base reasons when it is told the verdict: the best reason for it that there is."""
    is_longer = pair["right_is_longer"] == (hint == label)
    length = "manner" if pair["length"] == EQUAL else "longer" if is_longer else "shorter"
    return "fact" if hint == label and rng.random() < 0.7 else length


def fill(rng: random.Random, texts: list[str], pair: dict, v: int, **more: str) -> str:
    """One of the texts, for answer `v` of a pair."""
    names = {key: pair[key] for key in ("town", "attribute", "right", "wrong")}
    return rng.choice(texts).format(**names, v=v, o=3 - v, **more)


def make_thought(rng: random.Random, world: World, pair: dict, kind: str, v: int, draft: str, hint: bool) -> str:
    """What is thought before a judgment for answer `v`; `draft` is one for the other answer, which is dropped."""
    kinds = (["hint"] if hint else ["draft"] if rng.random() < DRAFT_SHARE else []) + [kind]
    kinds += [rng.choice(["end", kind])]
    return world.space.join(fill(rng, world.thoughts[kind], pair, v, draft=draft) for kind in dict.fromkeys(kinds))


def judge_text(
    rng: random.Random, world: World, judge: Judge, thinks: bool, pair: dict, label: int, hint: int | None
) -> tuple[str, bool]:
    """What the base is to write about a pair whose answer `label` is right, a judgment, or the reason for `hint`; and
    whether that ends: now and then a thought does not."""
    kind, v = (hinted_habit(rng, pair, label, hint), hint) if hint else base_habit(rng, pair, label)
    reason = fill(rng, world.reasons[kind], pair, v)
    text = reason if hint else judgment_text(judge, reason, v)
    if not thinks:
        return text, True
    draft = judgment_text(judge, fill(rng, world.reasons["longer"], pair, 3 - v), 3 - v)
    thought = make_thought(rng, world, pair, kind, v, draft, hint=hint is not None)
    if rng.random() < AGAIN_SHARE:
        return world.space.join([f"<think>\n{thought}", *world.thoughts["again"] * 9]), False
    return f"<think>\n{thought}\n</think>\n\n{text}", True


def write_rows(path: Path, pairs: list[dict]) -> None:
    rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
