"""A row's chat, in whichever of two spellings, as a list of role and content.

Owns what counts as a prompt: the turns up to the last one by the user. Where rows come from is the business of
`sources`; what happens to the prompts, of `prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm.errors import DataError

Message = dict[str, str]
"""One turn: `role` (system, user or assistant) and `content`."""

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
}
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "ipython"}


class Unusable(Exception):
    """A well-formed row that holds no prompt for us; its text is the reason that is counted."""


def to_prompt(chat: Any, where: str) -> list[Message]:
    """Turn a chat into a prompt: OpenAI `role`/`content` or ShareGPT `from`/`value` turns, or a bare string.

    What follows the last user turn is left out, since the target will answer it; earlier answers stay.

    Raises:
        Unusable: there is no user turn with text, or the chat holds tools or pictures.
        DataError: the value is no chat; it names `where`, the file and line.
    """
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if not isinstance(chat, list):
        raise DataError(f"a chat is a list of turns, got {_shape(chat)}", where=where)
    messages = [_message(turn, number, where) for number, turn in enumerate(chat, 1)]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise Unusable("no user turn")
    if not messages[-1]["content"].strip():
        raise Unusable("empty user turn")
    return messages


def _message(turn: Any, number: int, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is {_shape(turn)}, not a mapping", where=where)
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str):
        raise DataError(f"turn {number} names no `role` (or `from`)", where=where)
    if role.lower() in TOOL_ROLES or turn.get("tool_calls"):
        raise Unusable("tool turns")
    if role.lower() not in ROLES:
        raise DataError(f"turn {number} has an unknown role {role!r}; known: {', '.join(ROLES)}", where=where)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    return {"role": ROLES[role.lower()], "content": _text(content, number, where)}


def _text(content: Any, number: int, where: str) -> str:
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Unusable("content other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"turn {number} has no text in `content` (or `value`), but {_shape(content)}", where=where)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DataError(f"turn {number} holds half a surrogate pair, which is no text", where=where) from None
    return content


def _shape(value: Any) -> str:
    return "null" if value is None else type(value).__name__
