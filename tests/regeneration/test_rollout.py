"""Which turns are answered anew, in what context, and what becomes of tool calls."""

from __future__ import annotations

from typing import Any

import pytest

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import Response, request_seed
from dllm.models.targets import load_tokenizer
from dllm.prompts.chats.turns import parse_chat
from dllm.prompts.table import Prompt
from dllm.regeneration.rollout import Rollout, RolloutConfig, split_turns

TARGET = Target(model="builtin:tiny")
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TARGET)


def said(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content or role, **more}


def call(id: str, name: str = "add") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def play(messages: Messages, answers: list[Response], tokenizer: Any, **settings: Any) -> tuple[Rollout, list[Any]]:
    """Give the answers in order; return the rollout and the requests that were made."""
    prompt = Prompt("ab" * 8, "mine", "train", messages, None)
    rollout = Rollout(prompt, 1, RolloutConfig(Regenerate(**settings), TARGET, tokenizer))
    requests = []
    for answer in answers:
        request = rollout.next_request()
        assert request is not None
        requests.append(request)
        rollout.accept(request, answer)
    return rollout, requests


def text(number: int, *calls: dict[str, Any]) -> Response:
    key = f"{'ab' * 8}:1:{number}"
    return Response(key, (7, 8, number), f"new {number}", "tool_calls" if calls else "stop", calls)


CHAT = [
    said("system"),
    said("user", "one"),
    said("assistant", "old 0"),
    said("assistant", "old 0, more"),
    said("user", "two"),
    said("user", "and"),
    said("assistant", "old 1"),
    said("user", "three"),
]


def test_a_chat_is_cut_at_the_assistant_and_neighbours_are_one_turn() -> None:
    turns = split_turns(CHAT, "all")
    assert [[m["content"] for m in turn.context] for turn in turns] == [["system", "one"], ["two", "and"], ["three"]]
    assert [(turn.number, turn.old_calls) for turn in turns] == [(0, []), (1, []), (2, None)]


def test_the_last_turn_alone_keeps_the_earlier_ones_and_its_number() -> None:
    (turn,) = split_turns(CHAT, "last")
    assert (turn.number, turn.context, turn.old_calls) == (2, CHAT, None)


def test_a_greeting_before_anyone_has_spoken_is_context() -> None:
    chat = [said("system"), said("assistant", "Hello!"), said("user"), said("assistant"), said("user")]
    assert [len(turn.context) for turn in split_turns(chat, "all")] == [3, 1]


def test_each_turn_is_asked_in_the_context_of_the_new_ones(tokenizer: Any) -> None:
    answers = [text(0), text(1), text(2)]
    rollout, requests = play(CHAT, answers, tokenizer, seed=3)
    assert rollout.next_request() is None and rollout.rejection is None
    assert [m["content"] for m in requests[2].messages] == ["system", "one", "new 0", "two", "and", "new 1", "three"]
    assert [r.key.rsplit(":", 1)[1] for r in requests] == ["0", "1", "2"]
    assert [r.seed for r in requests] == [request_seed(3, "ab" * 8, 1, turn) for turn in range(3)]
    rows = rollout.rows()
    assert [(row.turn, row.sample, len(row.messages), row.answer_ids) for row in rows] == [
        (0, 1, 3, [7, 8, 0]),
        (1, 1, 6, [7, 8, 1]),
        (2, 1, 8, [7, 8, 2]),
    ]
    for row, request in zip(rows, requests, strict=True):
        assert row.messages[:-1] == request.messages and row.prompt_ids == list(request.prompt_ids)
        assert row.messages[-1] == {"role": "assistant", "content": f"new {row.turn}"} and row.flags == []


TOOLS = [
    said("user"),
    said("assistant", tool_calls=[call("a"), call("b")]),
    said("tool", "1", tool_call_id="a"),
    said("tool", "2", tool_call_id="b"),
]


def test_new_calls_take_over_the_ids_that_the_results_name(tokenizer: Any) -> None:
    answers = [text(0, call("random1", "mul"), call("random2")), text(1, call("random3"))]
    rollout, requests = play(TOOLS, answers, tokenizer)
    assert [c["id"] for c in requests[1].messages[1]["tool_calls"]] == ["a", "b"]
    assert requests[1].messages[1]["tool_calls"][0]["function"]["name"] == "mul"
    assert [m.get("tool_call_id") for m in requests[1].messages] == [None, None, "a", "b"]
    rows = rollout.rows()
    # The last turn's calls have no results yet: their ids are ours, the same in every run.
    assert rows[1].messages[-1]["tool_calls"] == [call("turn01000")] and rows[1].flags == []


@pytest.mark.parametrize("calls", [(), (call("x"),), (call("x"), call("y"), call("z"))])
def test_calls_that_do_not_fit_the_results_end_the_chat(tokenizer: Any, calls: tuple[dict[str, Any], ...]) -> None:
    answer = text(0, *calls)
    rollout, _ = play(TOOLS, [answer], tokenizer)
    assert rollout.next_request() is None and rollout.rejection is None
    (row,) = rollout.rows()
    assert row.flags == ["tool_mismatch"]


def test_calls_where_none_were_end_it_too_but_not_at_the_end(tokenizer: Any) -> None:
    rollout, _ = play(CHAT, [text(0, call("x"))], tokenizer)
    assert rollout.turns_left == 0 and rollout.rows()[0].flags == ["tool_mismatch"]
    rollout, _ = play([said("user")], [text(0, call("x"))], tokenizer)
    assert rollout.rows()[0].flags == []


def test_a_refused_turn_keeps_the_turns_before_it(tokenizer: Any) -> None:
    rollout, _ = play(CHAT, [text(0)], tokenizer)
    request = rollout.next_request()
    assert request is not None
    rollout.reject(request.key, "too long")
    assert rollout.next_request() is None and rollout.rejection is not None
    assert len(rollout.rows()) == 1


SPELT = [
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|>",
    '<|channel|>commentary to=functions.add<|message|>{"a": 1, "b": 2}<|call|>',
    "add<<1, 2>>",  # known by the result that follows
]


@pytest.mark.parametrize("spelt", SPELT, ids=range(len(SPELT)))
def test_calls_that_old_responses_spell_as_text_are_generated_again_as_calls(tokenizer: Any, spelt: str) -> None:
    turns = [("system", "<tools>[]</tools>"), ("human", "Add 1 and 2."), ("gpt", spelt), ("tool", "3")]
    turns += [("gpt", "The sum is 3."), ("human", "And 4 and 5?"), ("gpt", spelt)]
    chat = parse_chat([{"from": role, "value": content} for role, content in turns], None, "here").messages
    rollout, requests = play(chat, [text(0, call("new")), text(1), text(2, call("more"))], tokenizer)
    assert rollout.rejection is None and rollout.next_request() is None
    roles = [[message["role"] for message in request.messages] for request in requests]
    assert roles[1] == ["system", "user", "assistant", "tool"] and len(roles[2]) == 6
    called, result = requests[1].messages[2:]
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]
