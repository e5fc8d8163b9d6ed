"""Requests as JSON, replies as ids."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Split
from transformers import PreTrainedTokenizerFast

from dllm.config.params import Target
from dllm.engines.engine import Refusal, Response
from dllm.engines.openai.completions import Completions
from dllm.engines.openai.faults import Fault
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.prompts import template as chat
from tests.engines.openai.asking import TARGET, requests

SERVER = Server("http://a:1/v1", {})
REQUEST = requests(2)[1]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def caller(tokenizer):
    """The tiny tokenizer with a chat template that knows tools."""
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = TEMPLATE
    return with_tools


def wire(tokenizer: Any, **target: Any) -> Completions:
    return Completions("m", Target(model="builtin:tiny", **target), tokenizer)


def reply(text: Any = "yes", reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **fields}
    return {"model": "m", "choices": [{"message": message, "finish_reason": reason}]}


def answer(tokenizer: Any, said: dict[str, Any], request=REQUEST) -> Response | Refusal:
    line = wire(tokenizer)
    return line.response(request, line.read(SERVER, said))


def test_a_request_asks_for_what_it_says(tokenizer) -> None:
    assert json.loads(wire(tokenizer).body(REQUEST)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "question 1"}],
        "max_tokens": 8,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 1,
    }
    assert json.loads(wire(tokenizer).body(replace(REQUEST, tools=TOOLS)))["tools"] == TOOLS


def test_thinking_is_asked_for_inside_the_text_or_not_at_all(tokenizer) -> None:
    on = json.loads(wire(tokenizer, enable_thinking=True).body(REQUEST))
    off = json.loads(wire(tokenizer, enable_thinking=False).body(REQUEST))
    assert on["chat_template_kwargs"] == {"enable_thinking": True} and on["separate_reasoning"] is False
    assert off["chat_template_kwargs"] == {"enable_thinking": False} and "separate_reasoning" not in off


def test_ids_are_the_text_s_and_end_as_the_server_says(tokenizer) -> None:
    ids, end = tokenizer("yes", add_special_tokens=False)["input_ids"], chat.end_of_turn_id(tokenizer)
    assert answer(tokenizer, reply()) == Response(REQUEST.key, (*ids, end), "yes", "stop")
    assert answer(tokenizer, reply(reason="length")) == Response(REQUEST.key, tuple(ids), "yes", "length")
    assert answer(tokenizer, reply("yes\ufffd\ufffd", "length")) == Response(REQUEST.key, tuple(ids), "yes", "length")
    assert answer(tokenizer, reply(None)) == Response(REQUEST.key, (end,), "", "stop")


def test_ids_of_words_are_those_after_the_prompt() -> None:
    words = ["user", "assistant", "question", "1", "\n", "Hello", "world", "x"]
    vocab = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocab |= {mark + word: 3 + 2 * at + (mark != "") for at, word in enumerate(words) for mark in ("", "\u2581")}
    model = Tokenizer(WordLevel(vocab, "<unk>"))
    lines = Split("\n", "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([lines, Metaspace(prepend_scheme="first")])
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    alone = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone) == ["\u2581Hello", "\u2581world"]
    for reason, end in (("stop", ["<|im_end|>"]), ("length", [])):
        found = answer(tokenizer, reply("Hello world", reason))
        assert isinstance(found, Response)
        assert tokenizer.convert_ids_to_tokens(list(found.token_ids)) == ["Hello", "\u2581world", *end]
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    spaced = answer(tokenizer, reply("Hello world "))
    assert isinstance(spaced, Response) and spaced.text == "Hello world ", "a template that strips it says nothing"


@pytest.mark.parametrize("reason", ["function_call", "stop"])
def test_an_older_server_s_call_is_one(caller, reason) -> None:
    older = {"name": "add", "arguments": '{"a": 1}'}
    found = answer(caller, reply(None, reason, function_call=older), replace(REQUEST, tools=TOOLS))
    assert isinstance(found, Response) and found.finish_reason == "tool_calls"
    assert found.tool_calls[0]["function"] == older


@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
def test_tool_calls_become_what_the_template_makes_of_them(caller, reason) -> None:
    asked = replace(REQUEST, tools=TOOLS, prompt_ids=tuple(chat.prompt_ids(caller, REQUEST.messages, tools=TOOLS)))
    found = answer(caller, reply("sure ", reason, tool_calls=[{**CALL, "index": 0}]), asked)
    assert isinstance(found, Response)
    assert (found.text, found.finish_reason, found.tool_calls) == ("sure ", "tool_calls", (CALL,))
    assert caller.decode(found.token_ids) == 'sure [add {"a": 1}]<|im_end|>'
    cut = answer(caller, reply("sure ", "length", tool_calls=[CALL]), asked)
    assert isinstance(cut, Response) and cut.token_ids == found.token_ids[:-1] and cut.finish_reason == "length"


def test_arguments_that_are_no_text_are_made_one(caller) -> None:
    for arguments, text in (({"a": 1}, '{"a": 1}'), (None, "{}"), ("", "{}")):
        call = {"id": "c1", "function": {"name": "add", "arguments": arguments}}
        found = answer(caller, reply(None, "tool_calls", tool_calls=[call]))
        assert isinstance(found, Response) and found.tool_calls[0]["function"]["arguments"] == text


def test_a_template_that_renders_the_context_otherwise_refuses_the_row(caller) -> None:
    fickle = copy.deepcopy(caller)
    fickle.chat_template = "{{ messages | length }}" + TEMPLATE
    found = answer(fickle, reply("", "tool_calls", tool_calls=[CALL]))
    assert isinstance(found, Refusal) and "chat template" in found.reason


@pytest.mark.parametrize(
    "said",
    [
        [],
        "text",
        None,
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"message": "yes", "finish_reason": "stop"}]},
        reply([{"type": "image_url", "image_url": {"url": "x"}}]),
        reply(tool_calls=[{"name": "add"}]),
        reply(tool_calls=7),
    ],
)
def test_what_is_no_completion_is_a_fault_of_the_server(tokenizer, said) -> None:
    with pytest.raises(Fault, match="not a chat completion") as caught:
        wire(tokenizer).read(SERVER, said)
    assert caught.value.kind == "outage"


@pytest.mark.parametrize("reason", ["abort", "content_filter", "tool_calls", None])
def test_another_ending_is_odd(tokenizer, reason) -> None:
    with pytest.raises(Fault, match=f"{reason!r} and 0 tool calls") as caught:
        wire(tokenizer).read(SERVER, reply(reason=reason))
    assert caught.value.kind == "unusable"


def test_an_answer_by_another_model_is_a_lie(tokenizer) -> None:
    with pytest.raises(Fault, match="answered as 'other', not as 'm'") as caught:
        wire(tokenizer).read(SERVER, {**reply(), "model": "other"})
    assert caught.value.kind == "wrong_model"
    assert wire(tokenizer).read(SERVER, {**reply(), "model": None}).text == "yes"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_kept_apart_is_refused(tokenizer, field) -> None:
    with pytest.raises(ServerError, match=r"separates the reasoning.*reasoning parser"):
        wire(tokenizer).read(SERVER, reply(**{field: "first I think"}))
    assert wire(tokenizer).read(SERVER, reply(**{field: None})).text == "yes"


def test_a_prompt_the_server_counts_otherwise_is_reported_once(tokenizer, caplog) -> None:
    line = Completions("m", TARGET, tokenizer)
    for counted in (2, None, 99, 99):
        line.response(REQUEST, line.read(SERVER, {**reply(), "usage": {"prompt_tokens": counted}}))
    assert len(caplog.records) == 1 and "counts 99 tokens" in caplog.text and "is it the same template?" in caplog.text
