"""Chats as columns of parquet, in prompts and in shards.

A missing value is null in the columns and absent in a message, so rows with and without tools load together. Calls and
schemas are JSON texts, since tools differ in the types of their arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from dllm.outside import parse_json
from dllm.prompts.chats.turns import Message, Tools

_TEXTS = ("role", "content", "tool_calls", "tool_call_id", "name")


def chat_fields() -> list[pa.Field]:
    """Describe the columns `messages` and `tools`."""
    message = pa.struct([(name, pa.string()) for name in _TEXTS])
    return [pa.field("messages", pa.list_(message)), pa.field("tools", pa.string())]


def to_columns(messages: Sequence[Message], tools: Tools | None) -> dict[str, Any]:
    """Turn a chat and its tools into the values of the two columns."""
    turns = [
        {**message, "tool_calls": to_json(message["tool_calls"])} if "tool_calls" in message else message
        for message in messages
    ]
    return {"messages": turns, "tools": None if tools is None else to_json(tools)}


def from_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row's two columns into a chat and its tools again; the other columns stay as they are.

    Raises:
        ValueError, TypeError, KeyError: the columns hold something else.
    """
    messages = []
    for turn in row["messages"]:
        if not isinstance(turn, Mapping):
            raise TypeError("no turn")
        message = {name: value for name, value in turn.items() if value is not None}
        if "tool_calls" in message:
            message["tool_calls"] = _list(message["tool_calls"])
        messages.append({"role": message["role"], "content": message["content"], **message})
    tools = row["tools"]
    return {**row, "messages": messages, "tools": None if tools is None else _list(tools)}


def _list(text: str) -> list[Any]:
    value = parse_json(text)
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def to_json(value: Any) -> str:
    """Write a value as compact JSON, its keys in their order: templates render them in that order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
