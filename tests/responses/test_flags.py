"""Flags of an answer: cut, empty, and running in a circle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.responses.flags import MAX_PERIOD, flags_of, repeats

STOP = 0
IDS = st.integers(1, 3)


def by_definition(ids: list[int]) -> bool:
    """Look at every tail and every period."""
    for period in range(1, MAX_PERIOD + 1):
        tail = period
        while tail < len(ids) and ids[-tail - 1] == ids[-tail - 1 + period]:
            tail += 1
        if tail <= len(ids) and tail >= max(4 * period, 32):
            return True
    return False


@given(st.lists(IDS, max_size=12), st.lists(IDS, min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 12))
def test_it_agrees_with_the_definition(head: list[int], loop: list[int], times: int, rest: int) -> None:
    ids = head + loop * times + loop[:rest]
    assert repeats(ids) == by_definition(ids)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=MAX_PERIOD), st.lists(IDS, max_size=20))
def test_a_loop_that_runs_long_enough_is_seen_whatever_comes_before(loop: list[int], head: list[int]) -> None:
    assert repeats(head + loop * max(4, -(-32 // len(loop))))


@given(st.integers(0, 2000))
def test_what_counts_upwards_does_not_repeat(length: int) -> None:
    assert not repeats(range(length))


def test_a_loop_counts_from_its_length_on() -> None:
    assert repeats([7] * 32) and not repeats([7] * 31)
    long = list(range(64))
    assert repeats(long * 4) and not repeats(long * 4 + [99]) and not repeats((long * 4)[1:])
    assert not repeats(list(range(65)) * 8)


def test_only_the_end_counts() -> None:
    assert not repeats([7] * 500 + list(range(100, 140)))
    assert repeats([*range(1000), *([7] * 32)])


CALL = [{"function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("ids", "reason", "text", "calls", "flags"),
    [
        ([5, 6, STOP], "stop", "five six", (), []),
        ([5, 6], "length", "five six", (), ["length"]),
        ([STOP], "stop", "", (), ["empty"]),
        ([9, STOP], "stop", " \n", (), ["empty"]),
        ([9, STOP], "tool_calls", "", CALL, []),
        ([5] * 40 + [STOP], "stop", "five " * 40, (), ["repetition"]),
        ([5] * 40, "length", "", (), ["length", "empty", "repetition"]),
        ([], "length", "", (), ["length", "empty"]),
    ],
)
def test_an_answer_has_all_flags_that_hold(ids: list[int], reason: str, text: str, calls: Any, flags: Any) -> None:
    assert flags_of(ids, reason, text, calls) == flags
