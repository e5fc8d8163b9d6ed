"""What every engine is asked and answers: one request, one answer, in any order.

Owns the seam between regeneration and whatever generates: a model in this process, or servers.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dllm.prompts.turns import Message


@dataclass(frozen=True)
class Request:
    """One context to answer once."""

    key: str
    """Names the request among all others: prompt id, sample and turn."""
    prompt_ids: tuple[int, ...]
    messages: list[Message]
    """The same context as `prompt_ids`, before the chat template."""
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    """From `request_seed`: a request draws the same random numbers whatever it is batched with."""
    tools: list[dict[str, Any]] | None = None
    """Tool schemas the target may call, in OpenAI's form."""
    response: str | None = None
    """The dataset's own response, where it has one; for engine `given`."""


@dataclass(frozen=True)
class Response:
    """What the target said to one request."""

    key: str
    token_ids: tuple[int, ...]
    """The answer's ids, with the stop id at the end where `finish_reason` is `stop` or `tool_calls`."""
    text: str
    """The answer without the stop token; thinking included, as the target wrote it."""
    finish_reason: str
    """`stop`: the target ended its turn; `length`: it was cut at `max_new_tokens`; `tool_calls`: it called tools."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls as the server took them out of the text, in OpenAI's form; then `text` is what was said beside them."""


@dataclass(frozen=True)
class Refusal:
    """A request the engine cannot answer, however often it is asked."""

    key: str
    reason: str
    """One line."""
    is_passing: bool = False
    """Whether a later call may fare better: the servers failed, not the request."""


@dataclass
class EngineStats:
    """How an engine is doing; it keeps this up to date while it answers."""

    tokens: int = 0
    """Tokens generated so far, those of unfinished answers too where the engine can tell."""
    in_flight: int = 0
    retries: int = 0
    servers_up: int = 0
    """0 where there are no servers."""


class RequestSource(Protocol):
    """Where an engine takes requests from, as it has room for them."""

    def take(self) -> Request | None:
        """Return the next request, or None where none is ready now: taking answers may make more ready."""
        ...


class ListFeed:
    """A feed of requests that are all there from the start."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._waiting = deque(requests)

    def take(self) -> Request | None:
        return self._waiting.popleft() if self._waiting else None


class Engine(Protocol):
    """Something that answers requests with the target."""

    pace: EngineStats

    def describe(self) -> dict[str, Any]:
        """Say what answers, for the manifest: at least `engine`, and model and version as servers report them."""
        ...

    def answer(self, feed: RequestSource) -> Iterator[Response | Refusal | None]:
        """Answer every request of the feed once, each answer as it finishes, in any order.

        Yields None about once a second while nothing finishes, so that the caller can show progress. Ends when the
        feed has nothing ready and nothing is in flight. Leaving the generator early leaves nothing running.
        """
        ...


def request_key(prompt_id: str, sample: int, turn: int = 0) -> str:
    """Name the request for one turn of one sample of one prompt."""
    return f"{prompt_id}:{sample}:{turn}"


def request_origin(key: str) -> tuple[str, int, int]:
    """Take a request's name apart again: prompt id, sample and turn."""
    prompt_id, sample, turn = key.rsplit(":", 2)
    return prompt_id, int(sample), int(turn)


def request_seed(seed: int, prompt_id: str, sample: int, turn: int = 0) -> int:
    """Derive a request's own seed, 31 bits, from the stage's seed."""
    text = f"{seed} {request_key(prompt_id, sample, turn)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
