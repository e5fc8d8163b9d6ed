"""Chat templates: what the assistant is asked with, and what ends its turn."""

from __future__ import annotations

import copy

import pytest

from dllm.config import Target
from dllm.data import chat
from dllm.errors import DataError
from dllm.models.targets import load_tokenizer

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
