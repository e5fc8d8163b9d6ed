"""Chats in their two spellings become prompts, or say why not."""

from __future__ import annotations

from typing import Any

import pytest

from dllm.data.turns import Unusable, to_prompt
from dllm.errors import DataError


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


CHAT = [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "hello"), turn("user", "why?")]


@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
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
        ([turn("user", "a"), turn("tool", "b"), turn("user", "c")], "tool turns"),
        (
            [turn("user", "a"), {"role": "assistant", "tool_calls": [{}]}, turn("user", "c")],
            "tool turns",
        ),
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
        ([turn("user", "\ud83d")], "half a surrogate"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(chat: Any, line: str) -> None:
    with pytest.raises(DataError, match=f"{line}.*file:3"):
        to_prompt(chat, "file:3")
