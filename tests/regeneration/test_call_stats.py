"""The time left, while the lengths of the responses under way are not known."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dllm.engines.engine import Response
from dllm.regeneration import call_stats
from dllm.regeneration.call_stats import CallStats


class _Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def _response(tokens: int) -> Response:
    return Response("request", (0,) * tokens, "", "stop")


@pytest.mark.parametrize("limit", [128, 4096])
def test_time_left_does_not_believe_that_all_responses_are_as_short_as_the_first(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Slots decode a token per second each. From the first hundredth on the estimate is within 40 % of the truth."""
    clock, draw = _Clock(), random.Random(0)
    monkeypatch.setattr(call_stats, "time", clock)
    lengths = [min(limit, 1 + int(draw.expovariate(1 / 300))) for _ in range(2000)]
    stats: Any = CallStats(limit, _began=clock.now)
    waiting, slots, tokens, done, estimates = list(lengths), [], 0, 0, []
    while waiting or slots:
        while waiting and len(slots) < 64:
            length = waiting.pop()
            slots.append([length, length])
        clock.now += 1.0
        tokens += len(slots)
        slots = [[total, left - 1] for total, left in slots]
        ended = [total for total, left in slots if left == 0]
        slots = [slot for slot in slots if slot[1]]
        done += len(ended)
        for total in ended:
            stats.add(_response(total), tokens)
        if done in range(20, 1000):
            estimates.append((clock.now, stats.left_s(len(lengths) - done)))
    errors = [abs(left / (clock.now - at) - 1) for at, left in estimates]
    assert len(errors) > 100 and max(errors) < 0.4


def test_nothing_is_estimated_before_a_response_has_finished() -> None:
    stats = CallStats(16)
    stats.add(None, 100)
    assert stats.left_s(10) is None and stats.tokens_per_s > 0
