"""What became of each column and file of a source: used, not used, or refused.

Columns that shape what a model sees (a system prompt, tools, an input, images) are used or refused; to leave one out is
the user's choice. All other columns are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.outside import JsonError, one_line, parse_json
from dllm.prompts.cells import as_turns
from dllm.prompts.tools import JsonCell, to_tools
from dllm.prompts.turns import ROLES, Unusable

REFERENCE = "reference"
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions")
TOOLS = ("tools", "functions")
_NAMES = re.compile(rf'"(?:{"|".join((*SYSTEMS, *TOOLS))})"')
TEXTS = ("instruction", "input", "context", "passage", "document", "documents", "history")
"""Names of texts that belong to a prompt, unless the chat holds them already."""
_MEDIA = re.compile(
    r"(?:.*_)?(?:image|img|picture|photo|audio|video|pixel_value|attachment)s?"
    r"(?:_(?:path|url|uri|file|filename|byte|base64|b64)s?)?"
)
_MORE_TOOLS = re.compile(r".*_(?:tools|functions)|custom_instructions?")
_CAMEL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
TEMPLATE = "chat_template_kwargs"
"""A column of arguments of the chat template, as TRL reads it: any of them may change the prompt."""
_TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "id"}
_RESULTS = {name for name, role in ROLES.items() if role == "tool"}
"""Roles whose turns may have a `name`."""

CHAT, EMPTY, UNUSED = "chat", "empty", "not used"
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
    reading.note(chat_column, CHAT)
    system, tools = _Choice("system prompt"), _Choice("tools")
    texts: dict[str, Any] = {}
    media = None
    for name, value in _columns(row, chat_column, chat):
        key = _key(name)
        if name == REFERENCE and not _is_empty(value):
            reading.note(name, "correct result")
        elif name in ignored or name.split(".")[0] in ignored:
            reading.note(name, "left out, as asked")
        elif name.startswith(f"{TEMPLATE}.") and key not in (*SYSTEMS, *TOOLS) and value is not None:
            if not isinstance(value, list | dict) or not _is_empty(value):
                texts[name] = value
        elif _is_empty(value, keys_count=key in TOOLS or _MORE_TOOLS.fullmatch(key) is not None):
            reading.note(name, EMPTY)
        elif key in SYSTEMS and isinstance(value, str):
            system.offer(name, value, value.strip(), place)
            reading.note(name, "system prompt")
        elif key in TOOLS and isinstance(value, str | list):
            tools.offer(name, value, to_tools(value, place), place)
            reading.note(name, "tools")
        elif _MEDIA.fullmatch(key) and isinstance(value, str | list | Mapping | bytes):
            media = name
            reading.note(name, "rows that have it are refused")
        elif key in (*SYSTEMS, *TOOLS) or _MORE_TOOLS.fullmatch(key) or (key in TEXTS and "." not in name):
            texts[name] = value
        else:
            reading.note(name, UNUSED)
    if media is not None:
        raise Unusable("content other than text")
    chat = _with_texts(chat, chat_column, texts, place, reading)
    return Cells(_with_system(chat, system.value, place), tools.value, row.get(REFERENCE))


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


def _columns(row: Mapping[str, Any], chat_column: str, chat: Any) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name == chat_column:
            continue
        value = _mapping_of(value, name)
        yield name, value
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if name == TEMPLATE or _belongs(_key(key)):
                    yield f"{name}.{key}", inner
    for turn in chat if isinstance(chat, list) else ():
        for key, value in turn.items() if isinstance(turn, Mapping) else ():
            is_used = key in _TURN_KEYS or (key == "name" and turn.get("role", turn.get("from")) in _RESULTS)
            if not is_used:
                yield f"{chat_column}[].{key}", value


def _belongs(key: str) -> bool:
    is_named = key in (*SYSTEMS, *TOOLS)
    return is_named or any(names.fullmatch(key) for names in (_MEDIA, _MORE_TOOLS))


def _mapping_of(value: Any, name: str) -> Any:
    """Parse a text that is a mapping with a key which may belong to the prompt."""
    if isinstance(value, JsonCell):
        value = value.value
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    if _key(name) in (*SYSTEMS, *TOOLS, *TEXTS) or not _NAMES.search(_fold(value)):
        return value
    try:
        return parse_json(value)
    except JsonError:
        return value


def _key(name: Any) -> str:
    return _fold(str(name).rpartition(".")[2]).replace(" ", "_").replace("-", "_")


def _fold(text: str) -> str:
    """Write names of camel case in lower case, with underscores."""
    return _CAMEL.sub("_", text).lower()


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
        if isinstance(value, str) and _holds(chat, value):
            reading.note(name, f"{UNUSED}: the chat holds it")
        elif (
            isinstance(chat, str) and _key(chat_column) == "instruction" and name == "input" and isinstance(value, str)
        ):
            chat = f"{chat}\n\n{value}"
            reading.note(name, f"joined to {chat_column}")
        elif isinstance(value, str | list | Mapping) or name.startswith(f"{TEMPLATE}."):
            raise UnusedColumn(
                f"the column {one_line(name, 60)} belongs to the prompt, and is not used",
                where=place,
                hint=f"name it in prepare.sources[].ignore_columns to leave it out, or put it into {chat_column}",
            )
        else:
            reading.note(name, UNUSED)
    return chat


def _holds(chat: Any, text: str) -> bool:
    if isinstance(chat, str):
        return text.strip() in chat
    turns = [turn for turn in chat if isinstance(turn, Mapping)] if isinstance(chat, list) else []
    return any(text.strip() in _text_of(turn.get("content") or turn.get("value")) for turn in turns)


def _text_of(content: Any) -> str:
    """Return the text of a turn: a string, or OpenAI's list of parts, of which those of text are joined."""
    content = content.value if isinstance(content, JsonCell) else content
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return "".join(part for part in parts if isinstance(part, str))


def _with_system(chat: Any, system: str | None, place: str) -> Any:
    if system is None or not isinstance(chat, list | str):
        return chat
    turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    for turn in turns:
        named = turn.get("role") or turn.get("from") if isinstance(turn, Mapping) else None
        if isinstance(named, str) and ROLES.get(named.lower()) == "system":
            if _holds([turn], system):
                return chat
            raise DataError("the system column and the chat's own system turn differ", where=place)
    return [{"role": "system", "content": system}, *turns]


def _listed(uses: Mapping[str, str]) -> str:
    named = [f"{one_line(name, 80)} ({one_line(use, 120)})" for name, use in list(uses.items())[:_SHOWN]]
    named += [f"{len(uses) - _SHOWN} more"] if len(uses) > _SHOWN else []
    return ", ".join(named)
