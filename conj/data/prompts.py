"""A question as one text."""

from collections.abc import Mapping

ROLES = {"system": "系统：", "user": "用户：", "assistant": "助手：", "tool": "tool："}  # the card's


def question_text(question: str | list[dict], roles: Mapping[str, str] = ROLES) -> str:
    """A question as one text. A conversation keeps all its turns, each behind what `roles` has for its role; a conversation of
    one user turn is that turn's text."""
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0]["role"] == "user":
        return question[0]["content"]
    return "\n".join(roles.get(turn["role"], f"{turn['role']}：") + turn["content"] for turn in question)


def question_of(row: dict) -> str | list[dict]:
    """The question of a row of `prompts.jsonl`: a text, or chat messages."""
    return row["messages"] if "messages" in row else row["question"]
