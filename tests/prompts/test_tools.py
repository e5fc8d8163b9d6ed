"""Tool schemas in their spellings, and what is no schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.prompts.tools import calls_in_text, to_calls, to_tools

LOOK = {"name": "look", "description": "Look up.", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}
WHOLE = [{"type": "function", "function": LOOK}]


@pytest.mark.parametrize(
    "value",
    [
        WHOLE,
        [LOOK],
        json.dumps(WHOLE),
        [{key.replace("parameters", name): each for key, each in LOOK.items()} for name in ("input_schema",)],
        [{key.replace("parameters", name): each for key, each in LOOK.items()} for name in ("inputSchema",)],
        [{"function": {"parameters": None, **{k.replace("parameters", "inputSchema"): v for k, v in LOOK.items()}}}],
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


NAMES = ("arguments", "parameters", "args", "input", "kwargs", "params")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_arguments_are_read_under_every_name(name: str, write: Any) -> None:
    given = write({"city": "Bern"})
    for call in (
        {"name": "look", name: given, "type": "tool_call", "id": "c"},
        {"id": "c", "function": {"arguments": None, "name": "look", name: given}},
        {"id": "c", "function": {"name": "look"}, name: given},
    ):
        (found,) = to_calls(call, "turn 1", "here")
        assert found == {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"city": "Bern"}'}}


@pytest.mark.parametrize("given", [{}, {"arguments": None}, *({"arguments": x} for x in ("", " ", "null", "{}", {}))])
def test_no_arguments_are_an_empty_mapping(given: dict[str, Any]) -> None:
    assert to_calls({"name": "look", **given}, "turn 1", "here")[0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("value", [{"city": "Bern"}, '{"city": "Bern"}'])
def test_arguments_under_an_unknown_name_are_refused_by_it(value: Any) -> None:
    for call in ({"name": "look", "tool_input": value}, {"function": {"name": "look", "tool_input": value}}):
        with pytest.raises(DataError, match="turn 3 has a call without arguments, but with 'tool_input'"):
            to_calls(call, "turn 3", "here")


CALL = '{"name": "look", "arguments": {"city": "Bern"}}'
INVOKE = '<invoke name="look">\n<parameter name="city">Bern</parameter>\n</invoke>\n'
SPELT = {
    "Hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "GLM": "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n</tool_call>\n",
    "GLM, no arguments": "<tool_call>get_time</tool_call>",
    "DeepSeek": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>",  # noqa: RUF001
    "DeepSeek 3.2": '<｜DSML｜invoke name="look">\n</｜DSML｜invoke>\n',  # noqa: RUF001
    "Kimi": "<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "Mistral": "[TOOL_CALLS]look[ARGS]{}",
    "Mistral, with ids": "[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{}",
    "InternLM": f"<|action_start|><|plugin|>\n{CALL}<|action_end|>",
}
LISTS = {
    "Mistral": "[TOOL_CALLS] [{}]",
    "Nemotron": "Well.\n<TOOLCALL>[{}]</TOOLCALL>",
    "Phi": "<|tool_call|>[{}]<|/tool_call|>",
    "Granite": "<|tool_call|>[{}]",
    "Claude": "<function_calls>\n{}</function_calls>",
    "MiniMax": "<minimax:tool_call>\n{}</minimax:tool_call>",
}


@pytest.mark.parametrize("count", [1, 2])
def test_calls_that_are_spelt_in_a_text_are_counted(count: int) -> None:
    for family, text in SPELT.items():
        assert calls_in_text("I look.\n" + text * count) == count, family
    for family, text in LISTS.items():
        inner = INVOKE * count if "function" in text or "minimax" in text else ", ".join([CALL] * count)
        assert calls_in_text(text.replace("{}", inner)) == count, family


@pytest.mark.parametrize("text", ["Use <tool_call> here.", "<invoke name=", "[TOOL_CALLS] are a token", "<TOOLCALL>s"])
def test_a_text_about_calls_holds_none(text: str) -> None:
    assert calls_in_text(text) == 0
