"""A row's chat, in either of two formats, as a list of messages in OpenAI's form.

Defines what a prompt is: the turns up to the last one by a user or a tool. `sources` reads the rows, `cells` finds the
turns in a cell, `tools` parses calls and schemas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dllm.errors import DataError
from dllm.outside import is_text
from dllm.prompts.chats import tools as tooling
from dllm.prompts.chats.cells import as_turns
from dllm.prompts.chats.tools import JsonCell, Tools

__all__ = ["Chat", "Message", "Tools", "Unusable", "parse_chat"]

Message = dict[str, Any]
"""One turn: `role` (system, user, assistant or tool) and `content`, a text; where there are any, also `tool_calls` (a
list in OpenAI's form), `tool_call_id` and `name`. Keys without a value are absent, never None."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
CALL_ROLES = {"function_call", "tool_call"}
"""Roles whose text is a call, written as JSON."""
_REASONING = re.compile(r"(?:reasoning|thinking|thoughts?)(?:_(?:content|text|details?))?")
"""Keys of a turn that hold the model's reasoning apart from its text."""
_OTHER_TEXTS = ("text", "message", "output", "result", "response")
"""Keys that hold a turn's text in formats that are not read."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of a content's parts that are text."""

_MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file")
"""Types of a content's parts that a tool's own result, which may be any value of JSON, does not have."""


class Unusable(Exception):
    """A well-formed row without a usable prompt; the exception's text is the reason that is counted."""


class Chat(NamedTuple):
    """A parsed chat, cut after the last turn by a user or a tool."""

    messages: list[Message]
    tools: Tools | None
    response: str | None
    """The text of the one assistant turn that follows; None where there is none, several, or one with calls or with
    reasoning beside its text."""


def parse_chat(value: Any, tools: Any, where: str) -> Chat:
    """Parse a chat: OpenAI `role`/`content` or ShareGPT `from`/`value` turns, or a bare string; see `cells`.

    Assistant turns after the last turn by a user or a tool are left out, since the target generates that response;
    nothing is asked of them. Earlier ones stay, and system turns between the two. Calls without an id get one, and
    results without one are assigned to the calls in order.

    Args:
        tools: schemas of the tools the assistant may call, a list or JSON, or None.

    Raises:
        Unusable: there is no user turn with text, or the chat holds pictures.
        DataError: the value is no chat, or the tools no schemas; it names `where`, the file and line.
    """
    value = as_turns(value, where)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DataError(f"a chat is a list of turns, got {tooling.shape(value)}", where=where)
    names = [_role_name(turn, number, where) for number, turn in enumerate(value, 1)]
    known = [ROLES.get(name.lower(), "") for name in names]
    end = max((number for number, role in enumerate(known, 1) if role in ("user", "tool")), default=0)
    if end:
        end += next((n for n, role in enumerate(known[end:]) if role != "system"), len(known) - end)
    # A turn of an unknown role may be a user's; one after the last response is left out with it.
    judged = max(number for number, role in enumerate(known, 1) if role) if end else len(known)
    roles = [(_role(name, number, where), name.lower() in CALL_ROLES) for number, name in enumerate(names[:judged], 1)]
    messages = [_message(turn, number, *roles[number - 1], where) for number, turn in enumerate(value[:end], 1)]
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise Unusable("no user turn")
    if not users[-1]["content"].strip():
        raise Unusable("empty user turn")
    tooling.name_calls(messages)
    return Chat(messages, tooling.to_tools(tools, where), _response(value[end:], roles[end:]))


def _response(turns: list[Any], roles: list[tuple[str, bool]]) -> str | None:
    if [role for role, _ in roles] != ["assistant"]:
        return None
    try:
        message = _message(turns[0], 1, *roles[0], "")
    except (DataError, Unusable):
        return None
    has_more = "tool_calls" in message or any(_REASONING.fullmatch(key) and value for key, value in turns[0].items())
    return None if has_more else message["content"] or None


def _role_name(turn: Any, number: int, where: str) -> str:
    """Return a turn's role as the turn names it."""
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is {tooling.shape(turn)}, not a mapping", where=where)
    named = turn.get("role") or turn.get("from")
    if not isinstance(named, str):
        raise DataError(f"turn {number} names no `role` (or `from`)", where=where)
    return named.strip()


def _role(name: str, number: int, where: str) -> str:
    role = ROLES.get(name.lower())
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"turn {number} has an unknown role {name[:40]!r}; known: {known}", where=where)
    return role


def _message(turn: Mapping[str, Any], number: int, role: str, is_call: bool, where: str) -> Message:
    content = turn.get("content")
    if content is None or (content == "" and turn.get("value") is not None):
        content = turn.get("value")
    is_missing = content is None or (content == "" and role == "tool")
    if is_missing and (other := next((key for key in _OTHER_TEXTS if turn.get(key)), None)) is not None:
        raise DataError(f"turn {number} has no text in `content` (or `value`), but in `{other}`", where=where)
    calls = _or_none(turn.get("tool_calls")) or _or_none(turn.get("function_call"))
    if is_call and not calls:
        content, calls = "", content.raw if isinstance(content, JsonCell) else content
    if role != "assistant" and calls and tooling.to_calls(calls, f"turn {number}", where):
        raise DataError(f"turn {number} has calls of tools, which only an assistant's turn makes", where=where)
    message: Message = {"role": role}
    if role == "assistant" and calls:
        message["content"] = "" if content is None else _text(content, number, where)
        message["tool_calls"] = tooling.to_calls(calls, f"turn {number}", where)
    elif role == "tool":
        if isinstance(content, list) and any(isinstance(x, Mapping) and x.get("type") in _MEDIA_PARTS for x in content):
            raise Unusable("content other than text")
        message["content"] = _text(tooling.result_text(content), number, where)
        named = {"tool_call_id": tooling.to_id(turn.get("tool_call_id")), "name": turn.get("name")}
        message |= {key: _text(name, number, where) for key, name in named.items() if isinstance(name, str) and name}
    else:
        message["content"] = _text(content, number, where)
    return message


def _or_none(calls: Any) -> Any:
    """Return calls, or None where all their keys are null, as a table of all rows' turns has them."""
    return None if isinstance(calls, Mapping) and all(value is None for value in calls.values()) else calls


def _text(content: Any, number: int, where: str) -> str:
    if isinstance(content, JsonCell):
        content = content.value if isinstance(content.value, list) and _are_parts(content.value) else content.raw
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Unusable("content other than text")
        if any(part.get("type") not in _TEXT_PARTS for part in content):
            raise Unusable("content other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        shape = tooling.shape(content)
        raise DataError(f"turn {number} has no text in `content` (or `value`), but {shape}", where=where)
    if not is_text(content):
        raise DataError(f"turn {number} has an unpaired surrogate, which cannot be encoded", where=where)
    return content


def _are_parts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(part, Mapping) and ("type" in part or "text" in part) for part in value)
