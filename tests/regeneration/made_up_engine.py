"""An engine whose answers depend on the request alone, in an order that a seed chooses; it can stop half way."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from dllm.engines.engine import EngineStats, Refusal, Request, RequestSource, Response


class Stopped(Exception):
    """The engine was stopped half way."""


def echo(request: Request) -> Response | Refusal:
    """Answer with a few ids and words made of the key."""
    number = int(hashlib.sha256(request.key.encode()).hexdigest()[:8], 16)
    ids = tuple(10 + (number >> shift) % 50 for shift in range(1 + number % 7))
    return Response(request.key, ids, f"answer {number}", "stop" if number % 3 else "length")


class MadeUpEngine:
    """Keep up to `slots` requests and answer them in random order."""

    def __init__(
        self,
        reply: Callable[[Request], Response | Refusal] = echo,
        *,
        seed: int = 0,
        slots: int = 8,
        stop_after: int | None = None,
        model: str = "made up",
    ) -> None:
        self.stats = EngineStats()
        self.asked: list[str] = []
        self.peak = 0
        self._reply, self._slots, self._stop_after, self._model = reply, slots, stop_after, model
        self._chance = random.Random(seed)

    def describe(self) -> dict[str, Any]:
        return {"engine": "made up", "model": self._model}

    def answer(self, feed: RequestSource) -> Iterator[Response | Refusal | None]:
        flying: list[Request] = []
        while True:
            while len(flying) < self._slots and (request := feed.take()) is not None:
                flying.append(request)
            self.peak = max(self.peak, len(flying))
            if not flying:
                return
            if self._stop_after is not None and len(self.asked) >= self._stop_after:
                raise Stopped
            request = flying.pop(self._chance.randrange(len(flying)))
            self.asked.append(request.key)
            self.stats.in_flight = len(flying)
            if self._chance.random() < 0.1:
                yield None
            outcome = self._reply(request)
            self.stats.tokens += len(outcome.token_ids) if isinstance(outcome, Response) else 0
            yield outcome
