"""Where a part of a prompt may stand in a row: in columns, inside columns of mappings, and in turns beside their text.

A name has the path to its value: `metadata.tools`, `messages[].context`, `metadata[].request.system`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dllm.outside import JsonError, parse_json
from dllm.prompts.chats.tools import JsonCell
from dllm.prompts.chats.turn_texts import num_asked, role_of, turns_of
from dllm.prompts.chats.turns import ROLES
from dllm.prompts.rows import column_names
from dllm.prompts.rows.column_names import key

TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "id"}
"""Keys of turns that are read with the chat."""
_RESULTS = {name for name, role in ROLES.items() if role == "tool"}
"""Roles whose turns may have a `name`."""
_LEVELS = 4
"""Mappings inside one another that are looked into."""


class Part(NamedTuple):
    """A value that may belong to the prompt."""

    name: str
    value: Any
    column: str
    """The column, or the key of turns, in which it stands."""
    is_deep: bool = False
    """Whether it stands in a list or in several mappings: then it is refused rather than used."""


def found(row: Mapping[str, Any], chat: Any, chat_column: str) -> Iterator[Part]:
    """Find a row's columns but for the chat's, and what may belong to the prompt inside them and in turns.

    Of the response that is generated again nothing is found.
    """
    for name, value in row.items():
        if name != chat_column:
            yield from _column(name, name, value)
    turns = turns_of(chat)
    for turn in turns[: num_asked(turns)]:
        for inner, value in turn.items():
            is_used = inner in TURN_KEYS or (inner == "name" and role_of(turn) in _RESULTS)
            is_read_by_users = value in column_names.ROUTES.get(inner, ()) if isinstance(value, str) else False
            if not is_used and not is_read_by_users:
                yield from _column(f"{chat_column}[].{inner}", inner, value)


def is_of_prompt(named: str, value: Any) -> bool:
    """Return whether a value that stands deep in a row is a part of a prompt, by its name and by what it is."""
    if column_names.is_template(named):
        return not isinstance(value, Mapping)  # each of its keys is a part
    if column_names.is_tools(named):
        is_json = isinstance(value, str) and value.lstrip().startswith(("[", "{"))
        return is_json or isinstance(value, Mapping) or (isinstance(value, list) and bool(_mappings(value)))
    return are_media(value) if column_names.MEDIA.fullmatch(named) else has_words(value)


def has_words(value: Any) -> bool:
    """Return whether a value has a text of several words, which ids and names of categories are not."""
    # Chinese has no spaces between words.
    return any(len(text.split()) > 1 or not text.isascii() for text in _texts(value))


def are_media(value: Any) -> bool:
    """Return whether a value is bytes, a mapping, or a text that is a file's name or address; or a list of these."""
    if isinstance(value, list):
        return any(map(are_media, value))
    is_text = isinstance(value, str) and column_names.IS_MEDIUM.fullmatch(value.strip()) is not None
    return is_text or isinstance(value, bytes | Mapping)


def _column(name: str, inner: str, value: Any) -> Iterator[Part]:
    value = _parsed(value, inner)
    yield Part(name, value, name)
    levels = 1 if column_names.is_of_responses(key(inner)) and isinstance(value, Mapping) else _LEVELS
    for path, each, is_deep in _inside(name, value, levels, is_deep=isinstance(value, list)):
        yield Part(path, each, name, is_deep)


def _inside(name: str, value: Any, levels: int, is_deep: bool) -> Iterator[tuple[str, Any, bool]]:
    """Find what a mapping, or a list of them, holds of a prompt, and whether it stands deep."""
    is_list = isinstance(value, list)
    mappings = [value] if isinstance(value, Mapping) else _mappings(value) if is_list else []
    if not mappings:
        return
    named = key(name)
    if column_names.is_tools(named) or named in column_names.TOOLS_AS_SCHEMAS:
        return  # schemas have names of their own
    if is_list and (column_names.is_of_responses(named) or any(map(role_of, mappings))):
        return
    start, is_template = f"{name}[]." if is_list else f"{name}.", column_names.is_template(named)
    for mapping in mappings:
        is_open = not is_deep or column_names.is_request(named, mapping)
        for inner, each in mapping.items():
            inner_key = key(str(inner))
            is_part = column_names.belongs(inner_key) and (is_open or not column_names.needs_a_request(inner_key))
            if is_template or is_part:
                yield f"{start}{inner}", each, is_deep
            if levels > 1 and not column_names.is_closed(inner_key):
                yield from _inside(f"{start}{inner}", _parsed(each, inner_key), levels - 1, is_deep=True)


def _mappings(values: list[Any]) -> list[Mapping[str, Any]]:
    return [each for each in values if isinstance(each, Mapping)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _parsed(value: Any, name: str) -> Any:
    """Parse a text that is a mapping, or a list of them, with a key which may belong to the prompt."""
    if isinstance(value, JsonCell):
        value = value.value
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    named = key(name)
    is_whole = column_names.is_system(named) or named in column_names.TOOLS or column_names.is_text(named)
    if is_whole or not (column_names.is_template(named) or column_names.are_in_json(value)):
        return value
    try:
        return parse_json(value)
    except JsonError:
        return value
