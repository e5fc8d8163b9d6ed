"""Tool schemas in their spellings, and what is no schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.prompts.tools import to_tools

LOOK = {"name": "look", "description": "Look up.", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}
WHOLE = [{"type": "function", "function": LOOK}]


@pytest.mark.parametrize(
    "value",
    [
        WHOLE,
        [LOOK],
        json.dumps(WHOLE),
        [json.dumps(LOOK)],
        # As parquet gives them, where another row's tool has a property of its own.
        [{"type": "function", "function": {**LOOK, "strict": None}}],
        [{**LOOK, "parameters": {**LOOK["parameters"], "properties": {"b": {"enum": None}, "a": {}, "c": None}}}],  # type: ignore[dict-item]
    ],
)
def test_every_spelling_makes_the_same_schema(value: Any) -> None:
    found = to_tools(value, "here")
    assert found == WHOLE
    assert found is not None and list(found[0]["function"]["parameters"]["properties"]) == ["b", "a"]


@pytest.mark.parametrize("value", [None, [], "", "  ", "[]", "null"])
def test_no_tools_are_none(value: Any) -> None:
    assert to_tools(value, "here") is None


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("[", "the tools are not JSON"),
        ({"name": "look"}, "tools are a list of schemas, got dict"),
        ([LOOK, {"description": "?"}], "tool 2 is no schema"),
        ([7], "tool 1 is no schema"),
        (["look"], "tool 1 is not JSON"),
        ([{"name": "\ud83d"}], "unpaired surrogate"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(value: Any, line: str) -> None:
    with pytest.raises(DataError, match=f"{line}.*file:3"):
        to_tools(value, "file:3")
