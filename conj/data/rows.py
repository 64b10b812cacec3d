"""The normal form of a row: a question of messages with known roles, two answers, and what is stated about them.

Roles are system, user, assistant and tool, whatever a data set calls them. What a model is to answer beside the last
turn becomes text of the messages: a system prompt is a system turn, tools stand in it, a call of a tool is the text of
its turn. Nothing here reads files or knows columns.
"""

import json
import re
from dataclasses import dataclass, field

from conj import InputError
from conj.data.columns import holds, missing

Answer = str | bool | int | float  # real data sets hold JSON booleans where a judge read "true"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "chatbot": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("tool_calls", "function_call")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TRANSCRIPT = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A question and its two answers; `unusable` says why a well-formed row states no preference."""

    question: str | list[dict]  # a text, or the chat messages up to the one to answer
    better: Answer
    worse: Answer
    subset: str = ""
    unusable: str | None = None  # "tie", "two_questions", "no_answer", "no_question", "scores_contradict"
    place: int = 1  # which of the source's two answers the better one is, where the source numbers them
    votes: tuple[int, ...] = ()  # each annotator's: 1 for `better`, 2 for `worse`, 0 for a tie
    own_id: str | int | None = None  # the row's own id, where it has one
    where: str = field(default="", compare=False)  # file and row, for messages and for subsets that file names tell


SWAPPED = "-swapped"  # how the id of a prompt ends that shows the answers of another one the other way round


def swapped(choice: int | None) -> int | None:
    """A choice between two answers (1, 2, 0 for a tie, None for none) when they are shown the other way round."""
    return 3 - choice if choice else choice


def read_turns(value, role: str, left: dict[str, object], name: str = "") -> list[dict]:
    """Chat messages of a text (one turn of `role`), a transcript, a message or a list of messages or of content parts.

    Keys of messages that are not understood go to `left`, named after the column `name`."""
    if isinstance(value, str) and is_transcript(value):
        return _read_transcript(value)
    if isinstance(value, list):
        if not value:
            raise InputError("expected messages, found an empty list")
        if not _is_parts(value):
            return [_read_turn(message, left, name) for message in value]
    elif isinstance(value, dict):
        return [_read_turn(value, left, name)]
    return [{"role": role, "content": _read_content(value)}]


def _read_turn(message, left: dict[str, object], name: str) -> dict:
    for role_key, key in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and isinstance(message.get(role_key), str):
            calls = [call for column in CALLS if holds(message.get(column)) for call in _as_list(message[column])]
            if key not in message and not calls:
                continue
            role = ROLES.get(message[role_key].casefold())
            if role is None:
                raise InputError(f"unknown role {message[role_key][:40]!r}; expected one of {', '.join(ROLES)}")
            content = _read_content(message.get(key))
            if calls:
                content = "\n".join([*([str(content)] if holds(content) else []), *map(_show_call, calls)])
            if len(message) > 2:
                _note_keys(message, {role_key, key, *CALLS}, left, name)
            return {"role": role, "content": content}
    raise InputError(f"expected a message with role and content or from and value, found {str(message)[:60]!r}")


def _note_keys(message: dict, read: set[str], left: dict[str, object], name: str) -> None:
    for key, value in message.items():
        if key not in read and holds(value):
            if key in MEDIA:
                raise InputError(f"a message holds {key}: expected text alone, a judge here reads no media")
            left[f"{name}[].{key}"] = value


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _show_call(call) -> str:
    """A call of a tool as one line: `tool_call: {"name": "search", "arguments": {"query": "rain"}}`."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"expected a tool call with a name and arguments, found {str(call)[:60]!r}")
    return f"tool_call: {_dump({'name': function['name'], 'arguments': undump(function.get('arguments'))})}"


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def undump(value):
    """JSON in a text as what it says, other texts as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # no JSON, or nested too deeply to be any here
        return value


def _is_parts(value: list) -> bool:
    return all(isinstance(part, dict) and "type" in part and not {"role", "from"} & part.keys() for part in value)


def _read_content(value):
    """A content: a list of text parts as their texts, one below the other. Raises InputError for a part that is no text."""
    if not isinstance(value, list) or not value or not _is_parts(value):
        return value
    texts = []
    for part in value:
        if part["type"] not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise InputError(f"content part of type {part['type']!r}: expected text alone, a judge here reads no media")
        if other := [key for key in part if key not in ("type", "text") and holds(part[key])]:
            raise InputError(f"content part with {', '.join(other)}: expected text alone, a judge here reads no media")
        texts.append(part["text"])
    return "\n".join(texts)


def is_transcript(text: str) -> bool:
    r"""Whether a text is turns of "Human: …\n\nAssistant: …", as in hh-rlhf."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _read_transcript(text: str) -> list[dict]:
    r"""The turns of "\n\nHuman: …\n\nAssistant: …"."""
    _, *parts = TRANSCRIPT.split(text)
    return [
        {"role": ROLES[speaker.casefold()], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2])
    ]


def read_side(
    value, left: dict[str, object], name: str, num_answers: int | None = None
) -> tuple[list[dict], Answer | None]:
    """What stands before an answer, and the answer, None where there is none; of a text, a message or a conversation.

    `num_answers`: the conversation is cut after so many of the assistant's turns."""
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        raise InputError("expected an answer of text, found dict")
    turns = read_turns(value, "assistant", left, name)
    if num_answers is not None:
        ends = [place for place, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
        turns = turns[: ends[num_answers - 1]] if 0 < num_answers <= len(ends) else turns
    *opening, last = turns
    if last["role"] != "assistant":
        return opening or turns, None  # a lone turn is the question
    if missing(last["content"]):
        return opening, None
    if not isinstance(last["content"], Answer):
        raise InputError(f"expected an answer of text, found {type(last['content']).__name__}")
    return opening, last["content"]


def join_question(asked: list[dict], opening: list[dict], answers: tuple = ()) -> list[dict] | None:
    """The question of a prompt and of what a conversation opens with: one may hold the other, but for white space and a
    system turn, or go on from it. None where they ask two things."""
    if len(asked) > 1 and asked[-1]["role"] == "assistant" and asked[-1]["content"] in answers:  # the answer again
        asked = asked[:-1]
    if not opening or not asked:
        return asked or opening
    system, asked = _part_system(asked)
    own, opening = _part_system(opening)
    if system and own and _same(system) != _same(own):
        return None
    system, keys, opening_keys = own or system, _same(asked), _same(opening)
    if _opens_or_ends(opening_keys, keys):
        return system + opening
    if _opens_or_ends(keys, opening_keys):
        return system + asked
    if opening and opening[0]["role"] == "user" and asked[-1]["role"] == "user":
        return None  # two questions, not one shown twice
    return system + asked + opening


def _opens_or_ends(turns: list, part: list) -> bool:
    return part in (turns[: len(part)], turns[len(turns) - len(part) :]) and len(part) <= len(turns)


def _part_system(turns: list[dict]) -> tuple[list[dict], list[dict]]:
    return (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)


def _same(turns: list[dict]) -> list[tuple[str, str]]:
    """Equal for turns that differ in white space alone."""
    return [(turn["role"], " ".join(str(turn["content"]).split())) for turn in turns]


def same_question(turns: list[dict], others: list[dict]) -> bool:
    return turns == others or _same(turns) == _same(others)


def with_system(turns: list[dict], system) -> list[dict]:
    """Turns that open with a system prompt. Raises InputError where they do so with another already."""
    if not holds(system):
        return turns
    if not isinstance(system, str):
        raise InputError(f"expected a system prompt of text, found {type(system).__name__}")
    first = [{"role": "system", "content": system}]
    own, rest = _part_system(turns) if turns else ([], [])
    if own and _same(own) != _same(first):
        raise InputError(f"two system prompts: {system[:40]!r} and {str(own[0]['content'])[:40]!r}; expected one")
    return (own or first) + rest


def with_tools(turns: list[dict], tools) -> list[dict]:
    """Turns whose system prompt ends with the tools that a model could call: `tools: ` and their JSON."""
    if not holds(tools := undump(tools)):
        return turns
    own, rest = _part_system(turns) if turns else ([], [])
    texts = [turn["content"] for turn in own if holds(turn["content"])] + [f"tools: {_dump(tools)}"]
    return [{"role": "system", "content": "\n\n".join(map(str, texts))}, *rest]


def with_history(turns: list[dict], history, left: dict[str, object]) -> list[dict]:
    """Turns with those before them: messages, or pairs of what was asked and answered."""
    if not holds(history):
        return turns
    if not isinstance(history, list):
        raise InputError(f"expected a history of messages or of pairs, found {type(history).__name__}")
    if all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        roles = ("user", "assistant")
        before = [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair)]
    else:
        before = read_turns(history, "user", left, "history")
    own, rest = _part_system(turns) if turns else ([], [])
    return own + before + rest


def as_question(turns: list[dict]) -> str | list[dict]:
    """A lone user turn as its text, anything longer as messages: the same question is the same in every layout."""
    for turn in turns:
        if not isinstance(turn["content"], str):
            raise InputError(f"expected a question of text, found {type(turn['content']).__name__}")
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns
