"""Tool schemas, calls and results, parsed into OpenAI's form.

A schema is {"type": "function", "function": {name, description, parameters}}, a call is {"id", "type":
"function", "function": {"name", "arguments"}} with the arguments as a JSON text, a result is a text.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

from dllm.errors import DataError

Tools = list[dict[str, Any]]
"""Schemas of the tools that the assistant may call."""


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
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return content
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def name_calls(messages: list[dict[str, Any]]) -> None:
    """Assign ids to calls that have none, and to results without one the ids of the calls before them, in order."""
    count, open_calls = 0, deque[str]()
    for message in messages:
        for call in message.get("tool_calls", ()):
            # Nine letters and digits: some templates take no other id.
            call["id"] = call["id"] or f"call{count:05d}"
            count += 1
            open_calls.append(call["id"])
        if message["role"] == "tool" and open_calls:
            id = message.setdefault("tool_call_id", open_calls[0])
            if id in open_calls:
                open_calls.remove(id)


def shape(value: Any) -> str:
    """Name a value's type for an error message."""
    return "null" if value is None else type(value).__name__


def _schema(tool: Any, number: int, where: str) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        inner = tool.get("function", tool)
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            function = {key: value for key, value in inner.items() if key != "type"}
            return {"type": "function", "function": _without_nulls(function)}
    raise DataError(f"tool {number} is no schema: it needs a `name`, or a `function` that has one", where=where)


def _call(call: Any, turn: str, where: str) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{turn} has a call without a `name`", where=where)
    arguments = inner.get("arguments", inner.get("parameters"))
    if arguments is None:
        arguments = {}
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False, default=str)
    if not isinstance(arguments, str):
        raise DataError(f"{turn} has a call whose arguments are {shape(arguments)}, not a mapping", where=where)
    id = call.get("id")
    return {
        "id": id if isinstance(id, str) else "",
        "type": "function",
        "function": {"name": inner["name"], "arguments": arguments},
    }


def _from_json(value: Any, what: str, where: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{what} not JSON: {error}", where=where) from None


def _check_text(value: Any, what: str, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else "a value that JSON cannot hold"
        raise DataError(f"{what} {reason}, which is no text", where=where) from None


def _without_nulls(value: Any) -> Any:
    """Remove null keys: a parquet row has every key of any schema in its column."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
