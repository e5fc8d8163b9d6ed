"""A chat is the same from every text that spells it out; other texts are questions, damaged chats are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dllm.errors import DataError
from dllm.prompts.chats.turns import parse_chat

LONG = "def f(): return {'a': [1]}  # " + "x" * 300
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": LONG},
    {"role": "assistant", "content": '{"ok": 1}'},
    {"role": "user", "content": "why?"},
]


def sorted_keys(chat: Any) -> str:
    return json.dumps(chat, sort_keys=True)


def share_gpt(chat: Any) -> str:
    return json.dumps([{"value": turn["content"], "from": turn["role"]} for turn in chat])


WRITERS: dict[str, Callable[[Any], Any]] = {
    "content first": sorted_keys,
    "value first": share_gpt,
    "a mapping first": lambda chat: json.dumps([{"meta": {"n": 1}, **turn} for turn in chat]),
    "indented": lambda chat: json.dumps(chat, indent=2, sort_keys=True),
    "a mark before it": lambda chat: "\ufeff\n" + sorted_keys(chat) + "\r\n",
    "a turn a line": lambda chat: "\r\n".join(map(sorted_keys, chat)) + "\n",
    "a list in a list": lambda chat: json.dumps([chat]),
    "lists in a list": lambda chat: [chat],
    "a wrapper": lambda chat: json.dumps({"id": None, "messages": chat}),
    "another wrapper": lambda chat: {"conversations": chat, "tools": []},
    "dumped twice": lambda chat: json.dumps(sorted_keys(chat)),
    "turns dumped, then the chat": lambda chat: json.dumps(list(map(sorted_keys, chat))),
    "turns dumped twice": lambda chat: [json.dumps(sorted_keys(turn)) for turn in chat],
    "a text by key": lambda chat: json.dumps({key: [turn[key] for turn in chat] for key in ("content", "role")}),
    "a chat in a list of texts": lambda chat: [sorted_keys(chat)],
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:2]], ids=["chat", "one turn"])
def test_every_text_of_a_chat_gives_its_turns(write: Callable[[Any], Any], chat: Any) -> None:
    assert parse_chat(write(chat), None, "here").messages == chat


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": []}',
        '{"messages": ["a"], "n": 1}',
        '[[{"a": 1}]]',
        '[["role", "user"]]',
        '"a [b] c"',
        '"role": what does it mean?',
        "[Task] Mend {'role': 'user'}",
        '[INST] {"from": "Bern"} is a trip. [/INST]',
        '{"a": 1}\n{"b": 2}\nJoin them.',
        '{"a": 1}\n{"b": 2}',
        '{"role": "user", "content": "hi"} is what?',
        '{name} is no mapping, "role": neither',
        "[" * 200,
        "\ufeff[1]",
        json.dumps(json.dumps(json.dumps(CHAT))),
    ],
)
def test_a_question_stays_as_it_is(text: str) -> None:
    assert parse_chat(text, None, "here").messages == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (sorted_keys(CHAT)[:-20], "begins like JSON, and is not"),
        (str([{"content": LONG, "role": "user"}]), "begins like JSON, and is not"),
        (json.dumps(sorted_keys(CHAT))[:-20], "begins like JSON, and is not"),
        ("\n".join(map(sorted_keys, CHAT))[:-20], "begins like JSON, and is not"),
        ('[{"content": "' + LONG + '", "n": NaN, "role": "user"}]', "NaN is no number"),
        ([*CHAT, sorted_keys(CHAT[1])[:-3]], "turn 5 is a text that begins like JSON"),
        (json.dumps([*CHAT, {"content": "a"}]), "turn 5 names no `role`"),
        (json.dumps({"messages": CHAT, "tools": [{"name": "look"}]}), "in a mapping beside tools, which are not read"),
        ({"messages": CHAT, "system": "Be brief."}, "in a mapping beside system"),
        (json.dumps([{"role": "wizard", "content": "a"}]), "unknown role 'wizard'"),
    ],
)
def test_a_damaged_chat_is_no_question(text: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_chat(text, None, "here")
