"""What became of each column and file of a source: used, not used, or refused.

Columns that shape what a model sees (a system prompt, tools, an input, images) are used or refused; to leave one out is
the user's choice. All other columns are listed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts.chats.cells import CHATS, as_turns, is_list_of_json
from dllm.prompts.chats.tools import to_tools
from dllm.prompts.chats.turn_texts import holds, num_asked, role_of, said, text_of, turns_of
from dllm.prompts.chats.turns import Unusable
from dllm.prompts.rows import column_names, parts
from dllm.prompts.rows.column_names import key

REFERENCE = "reference"
CHAT, EMPTY, UNUSED = "chat", "empty", "not used"
_NO_TEXT = ("None", "nan", "NaN", "<NA>")
"""What pandas makes of a missing text where it is turned into one."""
_NO_INPUT = ("<noinput>", "<no input>", "N/A")
"""What copies of Alpaca have in place of an empty `input`."""
_NUMBERS = ("input", "context", "question", "query")
"""Columns in which a number is a text of the prompt, and not a count or an id."""
_SHOWN = 40
"""Columns and files that are named; of the others the number."""


@dataclass
class Reading:
    """The columns and files of a source, and what became of each."""

    columns: dict[str, str] = field(default_factory=dict)
    """By name: columns, `messages[].KEY` for keys of turns, and `COLUMN.KEY` for what a column of mappings holds."""
    files: dict[str, int] = field(default_factory=dict)
    """Rows of each file that is read, where there are several."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Files that are not read, and why."""

    def note(self, column: str, use: str) -> None:
        """Record what became of a column in a row; a use in any row is one of the column."""
        known = self.columns.get(column)
        if known is None or known == EMPTY or (known.startswith(UNUSED) and not use.startswith((EMPTY, UNUSED))):
            self.columns[column] = use

    def to_json(self) -> dict[str, Any]:
        """Return columns and files as a manifest has them."""
        return {name: dict(sorted(each.items())) for name, each in vars(self).items()}

    def lines(self) -> list[str]:
        """Describe columns and files, a line each."""
        files = {name: f"{rows} rows" for name, rows in self.files.items()}
        found = [("columns", self.columns), ("files", files), ("not read", self.passed_over)]
        return [f"{title}: {_listed(each)}" for title, each in found if each]


class UnusedColumn(DataError):
    """A column that belongs to the prompts, and is not used: the source is refused rather than a row."""


class Cells(NamedTuple):
    """What a row holds of a prompt."""

    chat: Any
    tools: Any
    reference: Any


def read_row(row: Mapping[str, Any], chat_column: str, source: Source, place: str, reading: Reading) -> Cells:
    """Collect a row's prompt from its columns, and record what became of each.

    Raises:
        Unusable: the row holds pictures or sounds.
        UnusedColumn: a column belongs to the prompt, and cannot be used.
        DataError: two columns contradict each other, or the chat is a damaged text of JSON.
    """
    ignored = set(source.ignore_columns or ())
    chat = as_turns(row[chat_column], place)
    if chat_column in CHATS and is_list_of_json(chat):
        raise DataError(f"{chat_column} is a text of JSON whose items are no turns", where=place)
    letters = isinstance(chat, str) and row.keys() >= {"A", "B", "C"}
    reading.note(chat_column, CHAT)
    system, tools = _Choice("system prompt"), _Choice("tools")
    texts: dict[str, Any] = {}
    other_chats: dict[str, Any] = {}
    media = None
    for name, value, column, is_deep in parts.found(row, chat, chat_column):
        named = key(name)
        if name == REFERENCE and not _is_empty(value):
            is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
            reading.note(name, "correct result" if is_text else f"{UNUSED}: neither a text nor a number")
        elif name in ignored or column in ignored:
            reading.note(name, "left out, as asked")
        elif _is_argument(name) and value is not None:  # false is a value of these
            if not isinstance(value, str | list | dict) or not _is_empty(value):
                texts[name] = value
        elif _is_empty(value, column_names.is_tools(named)) or _says_nothing(named, value):
            reading.note(name, EMPTY)
        elif is_deep:
            if parts.is_of_prompt(named, value):
                texts[name] = value
        elif column_names.is_system(named) and (text := _system_text(value)) is not None:
            system.offer(name, text, text.strip(), place)
            reading.note(name, "system prompt")
        elif letters and re.fullmatch("[A-J]", name):
            texts[name] = str(value)
        elif named in column_names.TOOLS and isinstance(value, Mapping) and ("name" in value or "function" in value):
            tools.offer(name, [value], to_tools([value], place), place)
            reading.note(name, "tools")
        elif (named in column_names.TOOLS and isinstance(value, str | list)) or _are_schemas(named, value):
            tools.offer(name, value, to_tools(value, place), place)
            reading.note(name, "tools")
        elif _is_media(name, value, chat_column):
            media = name
            reading.note(name, "rows that have it are refused")
        elif column_names.is_system(named) or column_names.is_tools(named) or _is_text(name, value, chat_column, chat):
            texts[name] = value
        elif name in CHATS and source.column is None and turns_of(other := as_turns(value, place)):
            other_chats[name] = other
        elif isinstance(chat, str) and name in ("role", "from") and role_of({name: value}):
            texts[name] = [value]  # each row is a turn, and the chat is in several
        else:
            reading.note(name, UNUSED)
    if media is not None:
        raise Unusable("content other than text")
    for name in _answer_keys(chat, chat_column, reading, ignored):
        texts[name] = "the beginning of the response"
    chat = _with_system(_with_texts(chat, chat_column, texts, place, reading), system.value, place)
    for name, other in other_chats.items():
        _compare_chats(chat, other, (chat_column, name), place)
        reading.note(name, f"{UNUSED}: {chat_column} holds it")
    return Cells(chat, tools.value, row.get(REFERENCE))


class _Choice:
    """One value that several columns may hold."""

    def __init__(self, what: str) -> None:
        self.what, self.value = what, None
        self._name, self._parsed = "", None

    def offer(self, name: str, value: Any, parsed: Any, place: str) -> None:
        """Take the first value; others must be the same."""
        if self.value is None:
            self.value, self._name, self._parsed = value, name, parsed
        elif parsed != self._parsed:
            raise DataError(f"{self._name} and {name} hold another {self.what} each", where=place)


def _answer_keys(chat: Any, chat_column: str, reading: Reading, ignored: Collection[str]) -> Iterator[str]:
    """Record what the response holds beside its text; find the keys that make it the beginning of a response."""
    turns = turns_of(chat)
    for turn in turns[num_asked(turns) :]:
        for inner, value in turn.items():
            name = f"{chat_column}[].{inner}"
            if name in ignored:
                reading.note(name, "left out, as asked")
            elif inner in column_names.CONTINUED and value is True:
                yield name
            elif inner not in parts.TURN_KEYS:
                reading.note(name, EMPTY if _is_empty(value) else UNUSED)


def _says_nothing(named: str, value: Any) -> bool:
    """Return whether a text stands for a missing one."""
    if not isinstance(value, str):
        return False
    is_known = column_names.is_system(named) or column_names.is_tools(named) or column_names.is_text(named)
    return (is_known and value.strip() in _NO_TEXT) or (named == "input" and value.strip() in _NO_INPUT)


def _is_argument(name: str) -> bool:
    """Return whether a column, or a key of arguments of the chat template, is one of these arguments."""
    start, _, inner = name.rpartition(".")
    if start and column_names.is_template(key(start)):
        return not column_names.is_system(key(inner)) and key(inner) not in column_names.TOOLS
    return not start and key(name) in column_names.TEMPLATE_ARGUMENTS


def _are_schemas(named: str, value: Any) -> bool:
    is_list = named in column_names.TOOLS_AS_SCHEMAS and isinstance(value, list)
    return is_list and all(isinstance(each, Mapping) and ("name" in each or "function" in each) for each in value)


def _is_media(name: str, value: Any, chat_column: str) -> bool:
    """Return whether a column, or a key of a turn, holds pictures, sounds or documents."""
    named, is_turn_s = key(name), name.startswith(f"{chat_column}[].")
    if not isinstance(value, str | list | Mapping | bytes):
        return False
    if column_names.MEDIA.fullmatch(named) or (is_turn_s and column_names.FILES.fullmatch(named)):
        return True
    is_named = column_names.MEDIA_BY_VALUE.fullmatch(named) is not None and (is_turn_s or "." not in name)
    return is_named and parts.are_media(value)


def _is_text(name: str, value: Any, chat_column: str, chat: Any) -> bool:
    """Return whether a column, or a key of a turn, may be a part of the prompt that the chat lacks."""
    start, _, inner = name.rpartition(".")
    if start == f"{chat_column}[]":
        return column_names.is_text(key(inner)) or inner in column_names.ROUTES
    if column_names.is_template(key(name)):
        return not isinstance(value, Mapping)  # of a mapping each key is looked at
    if column_names.is_like_prompt(key(name)) and parts.has_words(value):
        return True
    is_asked = isinstance(chat, str) and column_names.TEXT_OF_A_QUESTION.fullmatch(key(name)) is not None
    return not start and (is_asked or column_names.is_text(key(name)))


def _system_text(value: Any) -> str | None:
    """Return a system prompt's text, also where it is a list of parts, as Anthropic's requests have it."""
    is_parts = isinstance(value, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value)
    is_text = is_parts and all(part.get("type") in (None, "text") for part in value)
    return text_of(value) if isinstance(value, str) or is_text else None


def _is_empty(value: Any, keys_count: bool = False) -> bool:
    """Return whether a value holds nothing; `keys_count`: the keys of mappings are something, as names of tools are."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(each is None or (not keys_count and _is_empty(each)) for each in value.values())
    if isinstance(value, list):
        return all(_is_empty(each, keys_count) for each in value)
    return value is None or value is False


def _with_texts(chat: Any, chat_column: str, texts: Mapping[str, Any], place: str, reading: Reading) -> Any:
    for name, value in texts.items():
        if key(name) in _NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        is_input = key(name) == "input" and "." not in name and isinstance(value, str)
        is_told = isinstance(value, str) or not column_names.is_tools(key(name))  # tools are more than their texts
        if is_told and not _is_argument(name) and holds(chat, value):
            reading.note(name, f"{UNUSED}: the chat holds it")
        elif isinstance(chat, str) and key(chat_column) == "instruction" and is_input:
            chat = f"{chat}\n\n{value}"
            reading.note(name, f"joined to {chat_column}")
        elif isinstance(value, str | list | Mapping) or _is_argument(name):
            raise UnusedColumn(
                f"the column {one_line(name, 60)} belongs to the prompt, and is not used",
                where=place,
                hint=f"name it in prepare.sources[].ignore_columns to leave it out, or put it into {chat_column}",
            )
        else:
            reading.note(name, UNUSED)
    return chat


def _compare_chats(chat: Any, other: Any, names: tuple[str, str], place: str) -> None:
    """Refuse a second chat that asks what the first does not."""
    if not set(said(other)) <= set(said(chat)):
        raise UnusedColumn(
            f"{names[0]} and {names[1]} hold two chats that differ",
            where=place,
            hint="name the chat's column in prepare.sources[].column",
        )


def _with_system(chat: Any, system: str | None, place: str) -> Any:
    if system is None or not isinstance(chat, list | str):
        return chat
    turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    for turn in turns:
        if isinstance(turn, Mapping) and role_of(turn) == "system":
            if holds([turn], system):
                return chat
            if turn.get("content") == "":
                return [{**each, "content": system} if each is turn else each for each in turns]
            raise DataError("the system column and the chat's own system turn differ", where=place)
    return [{"role": "system", "content": system}, *turns]


def _listed(uses: Mapping[str, str]) -> str:
    named = [f"{one_line(name, 80)} ({one_line(use, 120)})" for name, use in list(uses.items())[:_SHOWN]]
    named += [f"{len(uses) - _SHOWN} more"] if len(uses) > _SHOWN else []
    return ", ".join(named)
