"""Requests for loopback servers, and what comes back when an engine is asked them."""

from __future__ import annotations

from typing import Any

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import Refusal, Request, RequestList, Response
from dllm.engines.openai.engine import OpenAIEngine

TARGET = Target(model="builtin:tiny")


def requests(count: int, first: int = 0) -> list[Request]:
    return [
        Request(f"{n:016x}:0:0", (1, 2), [{"role": "user", "content": f"question {n}"}], 8, 0.0, 1.0, seed=n)
        for n in range(first, first + count)
    ]


def engine(urls: str | list[str], tokenizer: Any, target: Target = TARGET, **settings: Any) -> OpenAIEngine:
    settings = {"timeout_s": 20.0, "max_retries": 3, "concurrency": 8, **settings}
    urls = [urls] if isinstance(urls, str) else urls
    return OpenAIEngine(urls, Regenerate(engine="openai", **settings), target, tokenizer)


def outcomes(asked: OpenAIEngine, count: int = 1) -> list[Response | Refusal]:
    return [outcome for outcome in asked.answer(RequestList(requests(count))) if outcome is not None]


def answers(asked: OpenAIEngine, count: int = 1) -> list[Response]:
    """Ask, and see that every request is answered once."""
    found = outcomes(asked, count)
    assert sorted(outcome.key for outcome in found) == [request.key for request in requests(count)]
    assert all(isinstance(outcome, Response) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, Response)]


def refusal(asked: OpenAIEngine) -> Refusal:
    """Ask once, and see that it is refused."""
    (found,) = outcomes(asked)
    assert isinstance(found, Refusal) and "\n" not in found.reason
    return found
