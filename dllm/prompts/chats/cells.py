"""A chat as a cell holds it: a list of turns, a text of JSON that spells them out, a list for each key, or a wrapper.

A text is a chat where all of its JSON is one; any other text is a question and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dllm.errors import DataError
from dllm.outside import JsonError, parse_json
from dllm.prompts.chats import transcripts
from dllm.prompts.chats.tools import JsonCell

CHATS = ("messages", "conversations")
"""Names of a chat's column, and of the key of a wrapper."""
_PARSES = 2
"""Texts inside of one another that are parsed: JSON in JSON is, and a list of texts."""
_BLANK = "\ufeff \t\r\n"
_BEGINS = re.compile(r"""[\[\s"']*\{\s*\\*["'][^"'\\]*\\*["']\s*:""")
_ROLE = re.compile(r"""["'](?:role|from)\\*["']\s*:""")
"""A text that begins as a mapping and has such a key is a chat, also where it cannot be parsed."""


def as_turns(value: Any, where: str) -> Any:
    """Return a chat as a list of turns, or as the bare question that it is.

    Some files hold a chat, or each of its turns, as a text of JSON, and some a list for each key of the turns.

    Raises:
        DataError: a text begins as a chat in JSON does, and is none, or is a chat that was rendered; or a wrapper
            holds more than the chat.
    """
    if isinstance(value, JsonCell):
        value = value.value if isinstance(value.value, dict | list) else value.raw
    if isinstance(value, list):
        value = _parsed_turns(value, where, _PARSES)
    turns = _turns(value, "the chat", where, _PARSES)
    if isinstance(value, str) and turns is None and (how := transcripts.written(value)) is not None:
        raise DataError(f"a whole chat is written as one text {how}: write it as a list of turns", where=where)
    return value if turns is None else turns


def is_list_of_json(chat: Any) -> bool:
    """Return whether a text, which is no chat that we read, is a list of objects, lists or texts in JSON."""
    if not isinstance(chat, str) or not chat.strip(_BLANK).startswith("["):
        return False
    try:
        found = parse_json(chat.strip(_BLANK))
    except JsonError:
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(each, dict | list | str) for each in found)


def _turns(value: Any, what: str, where: str, parses: int) -> list[Any] | None:
    """Return the turns that a value spells out, or None where it is no chat."""
    if isinstance(value, str):
        parsed = _parsed(value, what, where) if parses else None
        return None if parsed is None else _turns(parsed, what, where, parses - 1)
    if isinstance(value, list):
        turns = _parsed_turns(value, where, parses)
        if len(turns) == 1 and isinstance(turns[0], list):
            return _turns(turns[0], what, where, parses)
        return turns if all(isinstance(turn, Mapping) for turn in turns) and _has_turns(turns) else None
    if not isinstance(value, Mapping):
        return None
    if _names_role(value):
        lists = {key: each for key, each in value.items() if each is not None}
        return _by_turn(lists) if lists and all(isinstance(each, list) for each in lists.values()) else [value]
    name = next((name for name in CHATS if value.get(name)), None)
    inner = None if name is None else _turns(value[name], what, where, parses)
    others = [str(key)[:40] for key, each in value.items() if key != name and each not in (None, "", [], {})]
    if inner is not None and others:
        raise DataError(f"{what} lies in a mapping beside {', '.join(others[:5])}, which are not read", where=where)
    return inner


def _parsed_turns(turns: list[Any], where: str, parses: int) -> list[Any]:
    """Parse turns that are texts; of one that is no turn the text stays."""
    found = []
    for number, turn in enumerate(turns, 1):
        inner = _turns(turn, f"turn {number}", where, parses) if isinstance(turn, str) else None
        found.append(turn if inner is None else inner[0] if len(inner) == 1 else inner)
    return found


def _by_turn(lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = max(map(len, lists.values()))
    keys = [(key, each) for key, each in lists.items() if each]
    return [{key: each[n] for key, each in keys if n < len(each) and each[n] is not None} for n in range(count)]


def _names_role(turn: Mapping[str, Any]) -> bool:
    return "role" in turn or "from" in turn


def _has_turns(found: list[Any]) -> bool:
    """Return whether mappings are turns: all name a role, or one that does has a text, and the others are damaged."""
    named = [turn for turn in found if _names_role(turn)]
    return bool(named) and (len(named) == len(found) or any("content" in turn or "value" in turn for turn in named))


def _parsed(text: str, what: str, where: str) -> Any:
    """Parse a text of JSON, or of one value a line; None for any other text.

    Raises:
        DataError: the text is a damaged chat.
    """
    text = text.strip(_BLANK)
    if not text.startswith(("[", "{", '"')):
        return None
    try:
        return parse_json(text)
    except JsonError as error:
        reason = str(error)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    is_lines = len(lines) > 1 and all(line.startswith(("{", '"{')) for line in lines)
    if is_lines:
        try:
            return [parse_json(line) for line in lines]
        except JsonError as error:
            reason = str(error)
    is_question = reason.startswith("Extra data") and not is_lines  # one that begins with a chat
    if is_question or not _BEGINS.match(text) or not _ROLE.search(text):
        return None
    raise DataError(f"{what} is a text that begins like JSON, and is not: {reason}", where=where)
