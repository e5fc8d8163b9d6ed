"""Chat templates: what the assistant is asked with, and what ends its turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dllm.config.params import Target
from dllm.errors import DataError
from dllm.models.targets import load_tokenizer
from dllm.prompts import template as chat

ASKED = [{"role": "user", "content": "how many?"}]
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ 'no thought' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def shared():
    return load_tokenizer(Target(model="builtin:tiny"))


@pytest.fixture
def tokenizer(shared):
    return copy.deepcopy(shared)


def test_a_prompt_ends_where_the_assistant_begins(tokenizer) -> None:
    ids = chat.prompt_ids(tokenizer, ASKED)
    assert all(type(id) is int for id in ids)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"


def test_earlier_answers_stay_in_the_prompt(tokenizer) -> None:
    turns = [*ASKED, {"role": "assistant", "content": "two"}, {"role": "user", "content": "why?"}]
    assert "assistant\ntwo<|im_end|>" in tokenizer.decode(chat.prompt_ids(tokenizer, turns))


def test_thinking_reaches_templates_that_know_it(tokenizer) -> None:
    tokenizer.chat_template = THINKING
    ends = {flag: tokenizer.decode(chat.prompt_ids(tokenizer, ASKED, flag)) for flag in (None, True, False)}
    assert ends[False].endswith("assistant\nno thought")
    assert ends[None] == ends[True] and ends[None].endswith("assistant\n")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "opens no assistant turn"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}go{% endif %}",
            "renders no assistant turn",
        ),
        ("{{ raise_exception('only poems here') }}", "refuses turns by user: only poems here"),
    ],
)
def test_a_template_that_cannot_answer_is_refused(tokenizer, template: str | None, line: str) -> None:
    chat.prompt_ids(tokenizer, ASKED)
    tokenizer.chat_template = template
    for call in (lambda: chat.prompt_ids(tokenizer, ASKED), lambda: chat.end_of_turn_id(tokenizer)):
        with pytest.raises(DataError, match=line) as caught:
            call()
        assert "tiny" in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_ends_with_what_the_template_puts_there(tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.end_of_turn_id(tokenizer) == end
    # Many targets name another token as end of sequence than the one that ends a turn.
    tokenizer.eos_token = "<|endoftext|>"
    assert chat.end_of_turn_id(tokenizer) == end
    assert chat.stop_ids(tokenizer) == {end, tokenizer.eos_token_id}


def test_stop_ids_take_in_the_generation_config(tokenizer) -> None:
    from transformers import GenerationConfig

    end = chat.end_of_turn_id(tokenizer)
    assert chat.stop_ids(tokenizer, GenerationConfig(eos_token_id=7)) == {end, 7}
    assert chat.stop_ids(tokenizer, GenerationConfig(eos_token_id=[7, 8])) == {end, 7, 8}
    assert chat.stop_ids(tokenizer, GenerationConfig()) == {end}


def test_the_digest_changes_with_the_template(tokenizer) -> None:
    before = chat.template_digest(tokenizer)
    tokenizer.chat_template = THINKING
    assert chat.template_digest(tokenizer) != before and len(before) == 16


WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] + (c['function']['arguments'] | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d"}}]


def calling(arguments: str) -> dict[str, Any]:
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "so", "tool_calls": [call]}


def test_tools_and_calls_reach_templates_that_know_them(tokenizer) -> None:
    plain = chat.prompt_ids(tokenizer, ASKED)
    assert chat.prompt_ids(tokenizer, ASKED, tools=TOOLS) == plain, "this template knows no tools"
    tokenizer.chat_template = WITH_TOOLS
    assert chat.prompt_ids(tokenizer, ASKED) == plain
    message = calling('{"city": "K\u00f6ln"}')
    ids = chat.prompt_ids(tokenizer, [*ASKED, message, {"role": "tool", "content": "grey"}], tools=TOOLS)
    text = tokenizer.decode(ids)
    assert '"name": "look", "description": "d"' in text
    # Servers hand arguments to templates as mappings; as texts they would be quoted twice.
    assert '<call>look{"city": "K\u00f6ln"}<|im_end|>' in text and "tool\ngrey<|im_end|>" in text
    assert message == calling('{"city": "K\u00f6ln"}'), "the caller's message stays as it was"
    assert '<call>look"not JSON"' in tokenizer.decode(chat.prompt_ids(tokenizer, [*ASKED, calling("not JSON"), *ASKED]))


def test_an_answer_taken_apart_is_put_together_as_it_was_generated(tokenizer) -> None:
    tokenizer.chat_template = WITH_TOOLS
    asked = [*ASKED, calling("{}"), {"role": "tool", "content": "grey"}]
    ids = chat.answer_ids(tokenizer, asked, calling('{"city": 1}'), tools=TOOLS)
    assert tokenizer.decode(ids) == 'so<call>look{"city": 1}<|im_end|>'
    assert ids[-1] == chat.end_of_turn_id(tokenizer) and ids.count(ids[-1]) == 1
    whole = chat.prompt_ids(tokenizer, [*asked, calling('{"city": 1}'), *ASKED], tools=TOOLS)
    start = len(chat.prompt_ids(tokenizer, asked, tools=TOOLS))
    assert whole[start : start + len(ids)] == ids


def test_a_template_that_renders_the_past_otherwise_gives_no_answer_ids(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + WITH_TOOLS
    with pytest.raises(DataError, match=r"renders a response after another context.*tiny"):
        chat.answer_ids(tokenizer, ASKED, calling("{}"))
