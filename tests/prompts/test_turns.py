"""Chats in their two spellings become prompts, or say why not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.prompts.chats.turns import Message, Unusable, parse_chat


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


def to_prompt(chat: Any, where: str) -> list[Message]:
    return parse_chat(chat, None, where).messages


def turns_by_key(chat: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Write a chat as `datasets` gives a Sequence of mappings."""
    return {"role": [each["role"] for each in chat], "content": [each["content"] for each in chat]}


CHAT = [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "hello"), turn("user", "why?")]


@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
        said(("system", "be kind"), ("prompter", "hi"), (" AI ", "hello"), ("User", "why?"), ("CHATBOT", "because")),
        [{**message, "content": "", "value": message["content"]} for message in CHAT],
        [{**message, "function_call": {"name": None, "arguments": None}} for message in CHAT],
        [*CHAT, turn("assistant", "because")],
        said(("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("user", "why?"), ("assistant", "because")),
        [turn("developer", "be kind"), *CHAT[1:], turn("assistant", "because"), turn("assistant", "so")],
        [CHAT[0], turn("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), *CHAT[2:]],
        [{**message, "name": None, "weight": 1} for message in CHAT],
    ],
)
def test_both_spellings_make_the_same_prompt_without_its_last_answer(chat: Any) -> None:
    assert to_prompt(chat, "here") == CHAT


def test_a_bare_string_is_one_user_turn() -> None:
    assert to_prompt("how many?", "here") == [turn("user", "how many?")]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "no user turn"),
        ([turn("system", "a"), turn("assistant", "b")], "no user turn"),
        ([turn("user", " \n")], "empty user turn"),
        ("", "empty user turn"),
        ([turn("user", [{"type": "image_url", "image_url": {}}])], "content other than text"),
        ([turn("user", "a"), turn("tool", [{"type": "image_url", "image_url": {}}])], "content other than text"),
        ([turn("tool", "b")], "no user turn"),
        ([turn("user", " "), {"role": "tool", "content": "b"}], "empty user turn"),
    ],
)
def test_a_row_without_a_prompt_gives_its_reason(chat: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        to_prompt(chat, "here")


@pytest.mark.parametrize(
    ("chat", "line"),
    [
        (7, "a chat is a list of turns, got int"),
        (["hi"], "turn 1 is str"),
        ([turn("user", "a"), {"content": "b"}], "turn 2 names no `role`"),
        ([turn("wizard", "a")], "unknown role 'wizard'"),
        ([turn("user", None)], "turn 1 has no text .* null"),
        ([{**turn("user", "a"), "tool_calls": [{"function": {"name": "f"}}]}], "turn 1 has calls .* only an assistant"),
        ([{"role": "user", "text": "hi"}], "turn 1 has no text .* but in `text`"),
        ([turn("user", "a"), {"role": "tool", "content": "", "output": "42"}], "turn 2 has no text .* but in `output`"),
        ([turn("user", "a"), {"role": "tool", "output": "42"}], "turn 2 has no text .* but in `output`"),
        ([turn("user", "\ud83d")], "unpaired surrogate"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}, turn("user", "a")], "turn 1 has a call without a `name`"),
        ([turn("function_call", "search(x)"), turn("user", "a")], "turn 1 has a call that is not JSON"),
        ([turn("assistant", None), turn("user", "a")], "turn 1 has no text .* null"),
        ('[{"role": "user", "content": "cut', "begins like JSON, and is not: Unterminated string"),
        ("[{'role': 'user', 'content': 'as Python'}]", "begins like JSON, and is not"),
        ([turn("user", "a"), {"role": "tool", "content": "b", "tool_call_id": "\ud83d"}], "unpaired surrogate"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(chat: Any, line: str) -> None:
    with pytest.raises(DataError, match=f"{line}.*file:3"):
        to_prompt(chat, "file:3")


@pytest.mark.parametrize(
    "last",
    [
        turn("assistant", None),
        {"role": "assistant", "tool_calls": [{"id": "x"}]},
        turn("function_call", "search(x)"),
        turn("assistant", [{"type": "image_url", "image_url": {}}]),
        turn("assistant", "\ud83d"),
    ],
)
def test_nothing_is_asked_of_the_turn_that_is_generated_again(last: dict[str, Any]) -> None:
    assert parse_chat([turn("user", "a"), last], None, "here") == ([turn("user", "a")], None, None)


TEXTS = [
    "[1, 2] is what?",
    "[]",
    '[{"a": 1}]',
    '"quoted"',
    "null",
    '[{"role": "user", "content": "hi"}] What is this?',
    '{"city": "Bern"}',
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_question_that_looks_like_json_stays_a_text(text: str) -> None:
    assert to_prompt(text, "here") == [turn("user", text)]
    assert to_prompt([turn("user", text)], "here") == [turn("user", text)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("write", [json.dumps, lambda chat: [json.dumps(turn) for turn in chat], turns_by_key])
def test_a_chat_written_as_text_or_by_key_is_the_same_chat(write: Any, text: str) -> None:
    chat = [*CHAT, turn("assistant", text), turn("user", text)]
    assert to_prompt(write(chat), "here") == chat


def call(name: str, arguments: str, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


WITH_TOOLS = [
    turn("user", "weather?"),
    {"role": "assistant", "content": "", "tool_calls": [call("look", '{"city": "Köln"}', "call00000")]},
    {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "call00000"},
]


@pytest.mark.parametrize(
    "chat",
    [
        WITH_TOOLS,
        [*WITH_TOOLS, turn("assistant", "grey")],
        said(
            ("human", "weather?"),
            ("function_call", '{"name": "look", "arguments": {"city": "Köln"}}'),
            ("observation", '{"sky": "grey"}'),
            ("gpt", "grey"),
        ),
        said(
            ("human", "weather?"),
            ("tool_call", '{"name": "look", "arguments": {"city": "Köln"}}'),
            ("tool_response", '{"sky": "grey"}'),
        ),
        [
            WITH_TOOLS[0],
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"city": "Köln"}}]},
            turn("tool", {"sky": "grey"}),
        ],
        [
            WITH_TOOLS[0],
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"city": "Köln"}'}},
            turn("function", [{"type": "text", "text": '{"sky": '}, {"type": "text", "text": '"grey"}'}]),
        ],
    ],
)
def test_every_spelling_of_calls_and_results_makes_the_same_prompt(chat: Any) -> None:
    assert to_prompt(chat, "here") == WITH_TOOLS


def test_calls_and_results_keep_the_ids_they_have_and_get_those_they_lack_in_order() -> None:
    two = {"role": "assistant", "tool_calls": [call("a", "{}", "mine"), {"function": {"name": "b"}}]}
    chat = [turn("user", "go"), two, turn("tool", "of a"), turn("tool", "of b"), turn("user", "again"), two]
    chat += [{"role": "tool", "content": "of b", "tool_call_id": "call00003", "name": "b"}, turn("tool", "of a")]
    messages = to_prompt(chat, "here")
    assert [message.get("tool_call_id") for message in messages if message["role"] == "tool"] == [
        "mine", "call00001", "call00003", "mine"
    ]  # fmt: skip
    assert messages[6]["name"] == "b" and "name" not in messages[7]
    assert messages[5]["tool_calls"][1] == call("b", "{}", "call00003")


def test_an_assistant_s_last_words_go_and_a_system_turn_before_them_too() -> None:
    assert to_prompt([*CHAT, turn("assistant", "so"), turn("system", "be brief")], "here") == CHAT
    assert to_prompt([turn("assistant", "welcome"), *CHAT], "here") == [turn("assistant", "welcome"), *CHAT]


LATE = [turn("system", "Answer in French."), turn("system", "Be brief.")]


@pytest.mark.parametrize(
    "write", [lambda turns: turns, lambda turns: said(*((x["role"], x["content"]) for x in turns))]
)
@pytest.mark.parametrize("before", [[turn("user", "q")], WITH_TOOLS], ids=["user", "tool"])
@pytest.mark.parametrize("after", [[], [turn("assistant", "so")], [turn("assistant", "so"), turn("system", "x")]])
def test_a_system_turn_before_the_last_answer_stays(write: Any, before: Any, after: Any) -> None:
    late = write([turn("developer", "Answer in French."), LATE[1], *after])
    assert to_prompt([*before, *late], "here") == [*before, *LATE]


@pytest.mark.parametrize("before", [[], [turn("assistant", "so")], [LATE[0], turn("assistant", "so")]])
@pytest.mark.parametrize("name", ["critic", "Judge"])
def test_a_turn_of_unknown_role_after_the_last_answer_goes_with_it(before: Any, name: str) -> None:
    chat = [turn("user", "q"), *before]
    assert parse_chat([*chat, turn(name, None)], None, "here") == parse_chat(chat, None, "here")


@pytest.mark.parametrize("after", [[turn("assistant", "so")], [turn("user", "why?")]])
def test_a_turn_of_unknown_role_before_an_answer_is_refused(after: Any) -> None:
    with pytest.raises(DataError, match="turn 2 has an unknown role 'critic'"):
        to_prompt([turn("user", "q"), turn("critic", "bad"), *after], "here")


def test_ids_that_are_numbers_are_ids() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"id": n, "function": {"name": "w"}} for n in (0, 1)]}
    results = [{"role": "tool", "content": str(n), "tool_call_id": n} for n in (1, 0)]
    messages = to_prompt([turn("user", "go"), calls, *results], "here")
    assert [each["id"] for each in messages[1]["tool_calls"]] == ["0", "1"]
    assert [(each["content"], each["tool_call_id"]) for each in messages[2:]] == [("1", "1"), ("0", "0")]


@pytest.mark.parametrize(
    ("value", "response"),
    [
        ("just a question", None),
        ([{"role": "user", "content": "q"}], None),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "a"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "a"),
        ([{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2], None),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], None),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "a"}], None),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": {"name": "look"}}], None),
        *(
            (
                [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: said}],
                None if said else "a",
            )
            for key in ("reasoning_content", "thinking", "reasoning_details")
            for said in ("so", None)
        ),
    ],
)
def test_the_response_is_the_text_of_the_one_assistant_turn_at_the_end(value, response) -> None:
    assert parse_chat(value, None, "here").response == response
