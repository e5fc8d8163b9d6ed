"""Tool schemas, calls and results, parsed into OpenAI's form.

A schema is {"type": "function", "function": {name, description, parameters}}, a call is {"id", "type":
"function", "function": {"name", "arguments"}} with the arguments as a JSON text, a result is a text.

Arguments that are a mapping lose their null keys, so that every container gives the same ones; those that are a text
of JSON keep them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dllm.errors import DataError
from dllm.outside import JsonError, is_text, parse_json
from dllm.prompts.chats.calls_in_text import calls_in_text

Tools = list[dict[str, Any]]
"""Schemas of the tools that the assistant may call."""


_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs", "params")
"""Names of a call's arguments: OpenAI's, Llama's, LangChain's, Anthropic's, and others."""
_SCHEMA_NAMES = ("input_schema", "inputSchema")
"""Other names of a schema's `parameters`: Anthropic's and MCP's."""


class JsonCell(NamedTuple):
    """A turn's text in a column of type `arrow.json`, where `datasets` writes 12 for the number and for the text "12".

    Whoever knows what is expected takes `raw` or `value`.
    """

    raw: str
    value: Any

    @property
    def is_value(self) -> bool:
        """Whether the text is a mapping or list as `datasets` writes one; people and models put spaces."""
        if not isinstance(self.value, dict | list):
            return False
        return json.dumps(self.value, separators=(",", ":")) == self.raw.replace("\\/", "/")


def to_tools(value: Any, where: str) -> Tools | None:
    """Read tool schemas: a list or JSON, each with or without the `function` around it; None where there are none.

    Raises:
        DataError: the value is no list of schemas with names.
    """
    value = _from_json(value, "the tools are", where)
    if not value:
        return None
    if not isinstance(value, list):
        raise DataError(f"tools are a list of schemas, got {shape(value)}", where=where)
    schemas = [_schema(_from_json(tool, f"tool {n} is", where), n, where) for n, tool in enumerate(value, 1)]
    _check_text(schemas, "the tools hold", where)
    return schemas


def to_calls(value: Any, turn: str, where: str) -> list[dict[str, Any]]:
    """Read the calls of one assistant turn: one or several, as mappings or as JSON.

    Raises:
        DataError: a call has no name, or its arguments are neither a mapping nor a text; it names `turn`.
    """
    value = _from_json(value, f"{turn} has a call that is", where)
    calls = [_call(call, turn, where) for call in (value if isinstance(value, list) else [value])]
    _check_text(calls, f"{turn} holds", where)
    return calls


def result_text(content: Any) -> Any:
    """Return a tool's result as text: some rows hold it as a value. Lists of text parts are unchanged."""
    if isinstance(content, JsonCell):
        content = content.value if content.is_value else content.raw
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return content
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def spelt_calls(content: str, after: Sequence[Mapping[str, Any]]) -> int:
    """Count the calls in an assistant turn's text: in a form that is not known, as many as results follow."""
    return calls_in_text(content) or sum(1 for _ in itertools.takewhile(lambda each: each["role"] == "tool", after))


def name_calls(messages: list[dict[str, Any]]) -> None:
    """Assign ids to calls that have none, and to results without one the ids of the calls before them, in order.

    Calls that an assistant turn spells out in its text count, though the turn stays as it is.
    """
    count, open_calls = 0, deque[str]()
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and "tool_calls" not in message:
            spelt = spelt_calls(message["content"], messages[number:])
            open_calls.extend(f"call{number:05d}" for number in range(count, count + spelt))
            count += spelt
        for call in message.get("tool_calls", ()):
            # Nine letters and digits: some templates take no other id.
            call["id"] = call["id"] or f"call{count:05d}"
            count += 1
            open_calls.append(call["id"])
        if message["role"] == "tool" and open_calls:
            id = message.setdefault("tool_call_id", open_calls[0])
            if id in open_calls:
                open_calls.remove(id)


def to_id(value: Any) -> str | None:
    """Return a call's id as text, also where it is a number; None where there is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def shape(value: Any) -> str:
    """Name a value's type for an error message."""
    return "null" if value is None else type(value).__name__


def _schema(tool: Any, number: int, where: str) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        inner = _mapping_of(tool.get("function", tool))
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            function = {key: value for key, value in inner.items() if key != "type"}
            for other in _SCHEMA_NAMES:
                if other in function and function.get("parameters") is None:
                    function["parameters"] = function.pop(other)
            if "parameters" in function:
                function["parameters"] = _mapping_of(function["parameters"])
            return {"type": "function", "function": _without_nulls(function)}
    raise DataError(f"tool {number} is no schema: it needs a `name`, or a `function` that has one", where=where)


def _call(call: Any, turn: str, where: str) -> dict[str, Any]:
    call = _mapping_of(call)
    inner = _mapping_of(call.get("function", call)) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{turn} has a call without a `name`", where=where)
    given = [each[key] for each in (inner, call) for key in _ARGUMENTS if each.get(key) is not None]
    others = [str(key) for each in (inner, call) for key, value in each.items() if _may_be_arguments(key, value)]
    if others and not given:
        raise DataError(f"{turn} has a call without arguments, but with {others[0][:40]!r}", where=where)
    # Parsed and written again: the same arguments are the same text from every file.
    own: Any = next((each for each in given if not _is_empty(each)), {})
    arguments, is_text = _arguments(own), isinstance(own, str)
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(
                arguments if is_text else _without_null_keys(arguments),
                ensure_ascii=False,
                default=str,
                allow_nan=False,
            )
        except ValueError:
            raise DataError(f"{turn} has a call with a number that JSON cannot represent", where=where) from None
    if not isinstance(arguments, str):
        raise DataError(f"{turn} has a call whose arguments are {shape(arguments)}, not a mapping", where=where)
    return {
        "id": to_id(call.get("id")) or "",
        "type": "function",
        "function": {"name": inner["name"], "arguments": arguments},
    }


def _arguments(value: Any) -> Any:
    """Parse arguments, also where they were written as JSON twice."""
    if isinstance(value, str) and value.lstrip().startswith('"'):
        with contextlib.suppress(JsonError):
            inner = _mapping_of(parse_json(value))
            return inner if isinstance(inner, Mapping) else value
    return _mapping_of(value)


def _without_null_keys(value: Any) -> Any:
    """Remove null keys at any depth: those of Arrow's structs cannot be told from the keys that other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_null_keys(each) for key, each in value.items() if each is not None}
    return [_without_null_keys(each) for each in value] if isinstance(value, list) else value


def _is_empty(arguments: Any) -> bool:
    return isinstance(arguments, str) and arguments.strip() in ("", "null")


def _may_be_arguments(key: Any, value: Any) -> bool:
    value = _mapping_of(value)
    return isinstance(value, Mapping) and bool(value) and key != "function"


def _from_json(value: Any, what: str, where: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return parse_json(value)
    except JsonError as error:
        raise DataError(f"{what} not JSON: {error}", where=where) from None


def _mapping_of(value: Any) -> Any:
    """Parse a text that is a mapping in JSON; return other values as they are, and one that has a key twice."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return parse_json(value, is_row=True)
    except JsonError:
        return value


def _check_text(value: Any, what: str, where: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{what} a value that JSON cannot represent", where=where) from None
    if not is_text(text):
        raise DataError(f"{what} an unpaired surrogate, which cannot be encoded", where=where)


_NULL_IS_A_VALUE = ("default", "const")
"""Keys of JSON Schema that may be null; elsewhere null is what a table of all rows' schemas adds."""


def _without_nulls(value: Any, names: bool = False) -> Any:
    """Remove null keys of a schema, but those that mean something; `names`: the keys are names of properties."""
    if isinstance(value, Mapping):
        kept = {}
        for key, inner in value.items():
            if not names and key in _NULL_IS_A_VALUE:
                kept[key] = inner
            elif inner is not None:
                kept[key] = _without_nulls(inner, names=key == "properties" and not names)
        return kept
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
