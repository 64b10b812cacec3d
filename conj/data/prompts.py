"""The judge's prompt: one function writes it for every stage, so that sampling, training and evaluation see the same."""

import json

REASON_KEY, VERDICT_KEY = "原因", "更好的回答"

# The prompt of the model card (its usage snippet), cut where the user's text goes in.
JUDGE_INSTRUCTION = (
    "作为一个评价专家，给定一个问题和它的两个可能的回答，请选出哪一个回答在连贯性、准确性、覆盖度和上述定义的整体质量方面最为符合。"
    '请用JSON格式输出你的判断, 其中"原因"是你提供的解释，"更好的回答"是整数类型的1或2，'
    '例如{"原因": "你的解释", "更好的回答": 1}。以下是问题和候选回答的内容：\n    '
)
# Hint-driven sampling (paper, section 3.2) in our own words: the verdict is given, the reason is asked for.
HINT_INSTRUCTIONS = {
    1: "作为一个评价专家，已知下面问题的两个回答中，回答1更好。请直接写出回答1比回答2更好的原因，只写原因。以下是问题和候选回答的内容：\n    ",
    2: "作为一个评价专家，已知下面问题的两个回答中，回答2更好。请直接写出回答2比回答1更好的原因，只写原因。以下是问题和候选回答的内容：\n    ",
}
ROLE_NAMES = {"system": "系统", "user": "用户", "assistant": "助手"}


def question_text(question: str | list[dict]) -> str:
    """A question as one text. A conversation keeps all its turns, each under its role's name;
    a conversation of one user turn is that turn's text."""
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0]["role"] == "user":
        return question[0]["content"]
    return "\n".join(f"{ROLE_NAMES.get(turn['role'], turn['role'])}：{turn['content']}" for turn in question)


def judge_messages(question: str | list[dict], answer_1: str, answer_2: str, hint: int | None = None) -> list[dict]:
    """The chat messages that ask for a judgment; with `hint` (1 or 2), for the reason why that answer is better."""
    instruction = JUDGE_INSTRUCTION if hint is None else HINT_INSTRUCTIONS[hint]
    user = instruction + "\n问题：" + question_text(question) + "\n回答1：" + answer_1 + "\n回答2：" + answer_2
    return [{"role": "system", "content": ""}, {"role": "user", "content": user}]


def judgment_text(reason: str, verdict: int) -> str:
    """The JSON a judge writes. Source: the model card's usage snippet."""
    return json.dumps({REASON_KEY: reason, VERDICT_KEY: verdict}, ensure_ascii=False)
