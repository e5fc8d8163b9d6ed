"""A row's chat, in whichever of two spellings, as a list of messages in OpenAI's form.

Owns what counts as a prompt: the turns up to the last one that is not the assistant's. Where rows come from is the
business of `sources`; what happens to the prompts, of `prompts`; what tools look like, of `tools`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm.errors import DataError
from dllm.prompts import tools as tooling
from dllm.prompts.tools import Tools

__all__ = ["Message", "Tools", "Unusable", "given_answer", "to_chat"]

Message = dict[str, Any]
"""One turn: `role` (system, user, assistant or tool) and `content`, a text; where there are any, also `tool_calls` (a
list in OpenAI's form), `tool_call_id` and `name`. Keys without a value are absent, never None."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALL_ROLES = {"function_call"}
"""Roles whose text is a call, written as JSON."""


class Unusable(Exception):
    """A well-formed row that holds no prompt for us; its text is the reason that is counted."""


def to_chat(value: Any, tools: Any, where: str) -> tuple[list[Message], Tools | None]:
    """Turn a chat into a prompt: OpenAI `role`/`content` or ShareGPT `from`/`value` turns, or a bare string.

    What the assistant says after the last turn by a user or a tool is left out, since the target will say it anew;
    earlier answers stay. Calls without an id get one, and results without one are given to the calls in order.

    Args:
        tools: schemas of the tools the assistant may call, a list or JSON, or None.

    Raises:
        Unusable: there is no user turn with text, or the chat holds pictures.
        DataError: the value is no chat, or the tools no schemas; it names `where`, the file and line.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DataError(f"a chat is a list of turns, got {tooling.shape(value)}", where=where)
    messages = [_message(turn, number, where) for number, turn in enumerate(value, 1)]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    asked = [message for message in messages if message["role"] == "user"]
    if not asked:
        raise Unusable("no user turn")
    if not asked[-1]["content"].strip():
        raise Unusable("empty user turn")
    tooling.name_calls(messages)
    return messages, tooling.to_tools(tools, where)


def given_answer(value: Any, where: str) -> str | None:
    """Return what the assistant says after the last turn by a user or a tool, where it says one thing, in words.

    Raises:
        Unusable: the chat holds pictures.
        DataError: the value is no chat; it names `where`.
    """
    if not isinstance(value, list):
        return None
    messages = [_message(turn, number, where) for number, turn in enumerate(value, 1)]
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] not in ("user", "tool"):
        return None
    return None if "tool_calls" in messages[-1] else str(messages[-1]["content"]) or None


def _message(turn: Any, number: int, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is {tooling.shape(turn)}, not a mapping", where=where)
    named = turn.get("role") or turn.get("from")
    if not isinstance(named, str):
        raise DataError(f"turn {number} names no `role` (or `from`)", where=where)
    role = ROLES.get(named.lower())
    if role is None:
        raise DataError(f"turn {number} has an unknown role {named!r}; known: {', '.join(ROLES)}", where=where)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls") or turn.get("function_call")
    if named.lower() in CALL_ROLES and not calls:
        content, calls = "", content
    message: Message = {"role": role}
    if role == "assistant" and calls:
        message["content"] = "" if content is None else _text(content, number, where)
        message["tool_calls"] = tooling.to_calls(calls, f"turn {number}", where)
    elif role == "tool":
        message["content"] = _text(tooling.result_text(content), number, where)
        message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str) and turn[key]}
    else:
        message["content"] = _text(content, number, where)
    return message


def _text(content: Any, number: int, where: str) -> str:
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Unusable("content other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        shape = tooling.shape(content)
        raise DataError(f"turn {number} has no text in `content` (or `value`), but {shape}", where=where)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DataError(f"turn {number} holds half a surrogate pair, which is no text", where=where) from None
    return content
