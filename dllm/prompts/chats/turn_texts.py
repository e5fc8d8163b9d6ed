"""What the turns of a chat say, before they are parsed: which are asked, and whether they hold a text already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dllm.prompts.chats import transcripts
from dllm.prompts.chats.tools import JsonCell
from dllm.prompts.chats.turns import ROLES

SHORT_CHARS = 20
"""A word of fewer characters is short."""


def turns_of(chat: Any) -> list[Mapping[str, Any]]:
    """Return the turns of a chat that is a list; of a bare question there are none."""
    return [turn for turn in chat if isinstance(turn, Mapping)] if isinstance(chat, list) else []


def role_of(turn: Mapping[str, Any]) -> str:
    """Return what a turn's role means, as a key of OpenAI's form; "" where it is unknown."""
    named = turn.get("role") or turn.get("from")
    return ROLES.get(named.strip().lower(), "") if isinstance(named, str) else ""


def num_asked(turns: Sequence[Mapping[str, Any]]) -> int:
    """Count the turns before the response at the end of a chat."""
    asked = (number for number in range(len(turns), 0, -1) if role_of(turns[number - 1]) != "assistant")
    return next(asked, 0)


def said(chat: Any) -> list[tuple[str, str]]:
    """Return role and text of each turn before the response, with single spaces between words."""
    if isinstance(chat, str):
        return [("user", _spaced(chat))]
    turns = turns_of(chat)
    return [(role_of(turn), _spaced(" ".join(_texts(turn)))) for turn in turns[: num_asked(turns)]]


def holds(chat: Any, value: Any) -> bool:
    """Return whether the turns before the response hold a text, or all texts of a list or mapping.

    Spaces between words do not count. A single word may stand in a question by chance: alone, it is held
    where it is set off, as a line, an option or after a colon. What a template has rendered is held where it is this
    chat.
    """
    wanted = [text for each in _texts(value) if (text := _spaced(each))]
    asked = turns_of(chat)[: num_asked(turns_of(chat))]  # of the response nothing reaches the target
    given = [chat] if isinstance(chat, str) else list(_texts(asked))
    held = list(map(_spaced, given))
    if isinstance(value, str | int | float) and wanted and _is_short(wanted[0]):
        return any(_is_set_off(wanted[0], each) for each in given)
    if wanted and all(any(_stands_in(text, each) for each in held) for text in wanted):
        return True
    is_rendered = isinstance(value, str) and transcripts.written(value) is not None
    return is_rendered and bool(held) and all(each in wanted[0] for each in held)


def text_of(content: Any) -> str:
    """Return the text of a turn: a string, or OpenAI's list of parts, of which those of text are joined."""
    content = content.value if isinstance(content, JsonCell) else content
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return "".join(part for part in parts if isinstance(part, str))


def _is_short(text: str) -> bool:
    """Return whether a text is one short word; a character beyond ASCII says as much as three."""
    return len(text) + 2 * sum(not each.isascii() for each in text) < SHORT_CHARS and " " not in text


def _stands_in(text: str, held: str) -> bool:
    """Return whether a text stands in another one, as words of its own."""
    return text in held and (not text.isascii() or re.search(_bounded(text), held) is not None)


def _is_set_off(text: str, held: str) -> bool:
    """Return whether a text stands in another one apart from the words around it."""
    if any(_spaced(line) == text for line in held.split("\n")):
        return True
    after_mark = (
        rf"(?:[:\"`(\[\uff1a\uff08\u201c\u300c]|(?<!\w)'|(?:^|[\s(\[])(?:[A-Za-z]|\d{{1,2}})[.):\]])\s*{_bounded(text)}"
    )
    return re.search(after_mark, held, re.MULTILINE) is not None


def _bounded(text: str) -> str:
    return rf"(?<![A-Za-z0-9]){re.escape(text)}(?![A-Za-z0-9])"


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _texts(value: Any) -> Iterator[str]:
    """Find all texts in a value; of turns those that are said, and not the names of roles."""
    if isinstance(value, Mapping):
        if "role" in value or "from" in value:
            value = text_of(value.get("content") or value.get("value"))
        else:
            for each in value.values():
                yield from _texts(each)
    if isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str | int | float):
        yield str(value)
