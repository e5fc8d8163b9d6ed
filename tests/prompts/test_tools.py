"""Tool schemas in their spellings, and what is no schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.prompts.chats.calls_in_text import calls_in_text
from dllm.prompts.chats.tools import to_calls, to_tools

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


def test_arguments_that_were_written_twice_are_parsed_twice() -> None:
    text = json.dumps(json.dumps({"city": "Bern"}))
    assert (
        to_calls({"name": "look", "arguments": text}, "turn 1", "here")[0]["function"]["arguments"]
        == '{"city": "Bern"}'
    )
    for other in ('"Bern"', '"{"', '{"a": 1, "a": 2}', "{'a': 1}"):
        assert to_calls({"name": "look", "arguments": other}, "turn 1", "here")[0]["function"]["arguments"] == other


def test_arguments_with_a_number_that_json_has_not_are_refused() -> None:
    with pytest.raises(DataError, match="turn 2 has a call with a number that JSON cannot represent"):
        to_calls({"name": "look", "arguments": '{"n": 1e400}'}, "turn 2", "here")


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
OTHERS = {
    "gpt-oss": '<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{"city": "Bern"}<|call|>',
    "gpt-oss, the channel first": "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}<|call|>",
    "FunctionGemma": "<start_function_call>call:look{city:<escape>Bern<escape>}<end_function_call>",
    "Gemma 4": '<|tool_call>call:look{city:<|"|>Bern<|"|>}<tool_call|>',
    "Gemma 3": '```tool_code\nlook(city="Bern")\n```\n',
    "LFM2": '<|tool_call_start|>[look(city="Bern (BE), x")]<|tool_call_end|>',
    "LFM2, damaged": '<|tool_call_start|>[look(city="Bern<|tool_call_end|>',
    "Olmo 3": '<function_calls>\nlook(city="Bern")\n</function_calls>',
    "ReAct": "Action: look\nAction Input: {}\n",
    "Functionary": ">>>look\n{}\n",
    "tools of Llama 3": '<|python_tag|>brave_search.call(query="Bern")',
    "Step": '<steptml:invoke name="look">',
    "Hunyuan": f"<tool_calls>\n[{CALL}]\n</tool_calls>",
    "Jamba": f"<tool_calls>{CALL}</tool_calls>",
}
BARE = {
    "Llama 3.2": '[look(city="Bern")]',
    "ToolACE": '[look(city="Bern"),\n look()]',
    "xLAM": f"[{CALL}, {CALL}]",
    "xLAM, indented": f"[\n  {CALL}\n]",
    "Llama 3": CALL.replace("arguments", "parameters"),
}
LISTS = {
    "Mistral": "[TOOL_CALLS] [{}]",
    "Nemotron": "Well.\n<TOOLCALL>[{}]</TOOLCALL>",
    "Phi": "<|tool_call|>[{}]<|/tool_call|>",
    "Granite": "<|tool_call|>[{}]",
    "Claude": "<function_calls>\n{}</function_calls>",
    "MiniMax": "<minimax:tool_call>\n{}</minimax:tool_call>",
    "tool_calls": "<tool_calls>[{}]</tool_calls> So [1].",
    "Hermes, a list": "<tool_call>\n[{}]\n</tool_call>",
    "Apertus": "<|tools_prefix|>[{}]<|tools_suffix|>",
    "Cohere": "<|START_ACTION|>[\n{}\n]<|END_ACTION|>",
}


@pytest.mark.parametrize("count", [1, 2])
def test_calls_that_are_spelt_in_a_text_are_counted(count: int) -> None:
    for family, text in (SPELT | (OTHERS if count == 1 else {})).items():
        assert calls_in_text("I look.\n" + text * count) == count, family
    for family, text in LISTS.items():
        inner = INVOKE * count if "function" in text or "minimax" in text else ", ".join([CALL] * count)
        assert calls_in_text(text.replace("{}", inner)) == count, family


def test_calls_in_python_are_counted_each_and_texts_that_are_calls_as_a_whole() -> None:
    for start, end in (("<|tool_call_start|>", "<|tool_call_end|>"), ("<|python_start|>", "<|python_end|>")):
        assert calls_in_text(f'So. {start}[look(city="B, (x)"), look()]{end}') == 2
    assert calls_in_text("<function_calls>\nlook()\nlook(a=1)\n</function_calls>") == 2
    for family, text in BARE.items():
        assert calls_in_text(f" {text}\n") == text.count("look"), family
        assert calls_in_text(f"So: {text} it is.") == 0, family


ABOUT = ["[look(city)] is Python.", "[look(city)]", '[{"name": "ann"}]', '{"name": "ann", "age": 3}', "[1, 2]", "[f()"]
ABOUT += ["The <|tool_call_start|> token", "<tool_calls> is a tag", "`to=functions.look` routes", "```tool_code\n```"]
ABOUT += ["[" * 5000 + "f(" * 5000 + ")]", "[f(" * 2000 + ")]" * 2000]


@pytest.mark.parametrize("text", ABOUT, ids=range(len(ABOUT)))
def test_a_text_with_code_or_tokens_holds_no_call(text: str) -> None:
    assert calls_in_text(text) == 0


@pytest.mark.parametrize("text", ["Use <tool_call> here.", "<invoke name=", "[TOOL_CALLS] are a token", "<TOOLCALL>s"])
def test_a_text_about_calls_holds_none(text: str) -> None:
    assert calls_in_text(text) == 0
