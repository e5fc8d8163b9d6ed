"""The seam between regeneration and whatever generates: requests in, one response or refusal for each, in any order.

A member of `ENGINES` is an `EngineFactory`: it says how an engine is configured, and opens one. An engine class is
usually its own factory, by class attributes and class methods.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params, Target
from dllm.config.regenerate import Regenerate
from dllm.errors import ConfigError
from dllm.prompts.chats.turns import Message
from dllm.registry import ENGINES


@dataclass(frozen=True)
class Request:
    """One context, for which one response is to be generated."""

    key: str
    """Unique: prompt id, sample and turn, as `request_key` joins them."""
    prompt_ids: tuple[int, ...]
    messages: list[Message]
    """The same context as `prompt_ids`, before the chat template."""
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    """From `request_seed`: a request draws the same random numbers in any batch."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of the tools that the target may call, in OpenAI's form."""
    response: str | None = None
    """The dataset's own response to this context; None where it has none."""


@dataclass(frozen=True)
class Response:
    """What the target generated for one request."""

    key: str
    token_ids: tuple[int, ...]
    """Generated ids; the stop id is the last one where `finish_reason` is `stop` or `tool_calls`."""
    text: str
    """The text without the stop token; thinking included."""
    finish_reason: str
    """`stop`: the target ended its turn; `length`: cut at `max_new_tokens`; `tool_calls`: it called tools."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls that the server parsed out of the text, in OpenAI's form; `text` is then what stood beside them."""


@dataclass(frozen=True)
class Refusal:
    """A request for which there is no response."""

    key: str
    reason: str
    """One line."""
    is_transient: bool = False
    """Whether a later run may succeed: the servers failed, not the request."""


@dataclass
class EngineStats:
    """Counters that an engine updates while it generates."""

    tokens: int = 0
    """Tokens generated so far, including those of unfinished responses where the engine sees them."""
    in_flight: int = 0
    retries: int = 0
    servers_up: int = 0
    """0 where there are no servers."""


class RequestSource(Protocol):
    """Where an engine takes requests from, as it has room for them."""

    def take(self) -> Request | None:
        """Return the next request; None where none is ready now. A response may make further requests ready."""
        ...


class RequestList:
    """Requests that are all ready from the start."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._waiting = deque(requests)

    def take(self) -> Request | None:
        return self._waiting.popleft() if self._waiting else None


class Engine(Protocol):
    """Something that generates the target's responses."""

    stats: EngineStats

    def describe(self) -> dict[str, Any]:
        """Describe the engine for the manifest: at least `engine`; model and version as servers report them."""
        ...

    def answer(self, requests: RequestSource) -> Iterator[Response | Refusal | None]:
        """Yield one response or refusal per request, as they finish, in any order.

        Yields None about once per second while nothing finishes, so that the caller can report progress. Ends when no
        request is ready and none is in flight. Closing the iterator early leaves nothing running.
        """
        ...


class EngineFactory(Protocol):
    """A member of `ENGINES`: how an engine is configured and opened."""

    affects: frozenset[str]
    """Which of the settings `batch_size`, `served_model` and `sglang` affect this engine's responses. Work is not
    resumed after such a setting has changed; the other settings of `regenerate` mean the same for every engine."""
    ignores: frozenset[str]
    """Which settings of `regenerate` have no effect with this engine, such as `concurrency` where no server is asked:
    their flags are refused."""
    is_external: bool
    """Whether servers that run already generate the responses, at addresses in `regenerate.servers`: the target's
    weights need not be on this machine, and a dry run asks the servers what they serve."""
    generates: bool
    """Whether a model generates the responses, so that one to the same request can be taken from earlier work; False
    where they come with the requests."""

    def check(self, settings: Regenerate) -> None:
        """Check the settings that this engine depends on, before anything is opened.

        Raises:
            ConfigError: one is impossible with this engine.
        """
        ...

    def check_target(self, target: Target) -> None:
        """Check by its config that this engine can generate with the target, before anything is paid for.

        Raises:
            ModelError: it cannot.
        """
        ...

    def num_slots(self, settings: Regenerate) -> int:
        """Return how many requests are in flight at most."""
        ...

    def open(
        self, params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
    ) -> AbstractContextManager[Engine]:
        """Open the engine for as long as the `with` block lasts.

        Args:
            params: `target` and `regenerate` are read.
            tokenizer: the target's.
            root: the project's folder, where relative paths start and logs go.
            servers: addresses that take precedence over the environment's and those of params; None has none. Only
                external engines read them.

        Raises:
            ConfigError: a setting, a server's address or an environment is missing.
            ModelError: the target cannot be loaded.
            ServerError: a server does not start.
        """
        ...


def fit(request: Request, positions: int | None) -> Request | Refusal:
    """Keep a request within the positions that a model has for prompt and response together.

    The response may then be shorter than `max_new_tokens`; a prompt that leaves no room for one is refused.
    """
    if positions is None:
        return request
    length, room = len(request.prompt_ids), positions - len(request.prompt_ids)
    if room < 1:
        reason = f"the prompt has {length} tokens, and the model {positions} positions for prompt and response"
        return Refusal(request.key, reason)
    return request if request.max_new_tokens <= room else replace(request, max_new_tokens=room)


def refuse_servers(settings: Regenerate) -> None:
    """Refuse what only servers read, for an engine that asks none.

    Raises:
        ConfigError: servers, or the name that they know the target by, are set.
    """
    for name in ("servers", "served_model"):
        if getattr(settings, name):
            what = f"engine {settings.engine} uses no server"
            raise ConfigError(what, where=f"regenerate.{name}", hint="leave it out, or use engine: openai")


def open_engine(
    params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
) -> AbstractContextManager[Engine]:
    """Open `regenerate.engine`, as `EngineFactory.open` describes, after checking its settings.

    Raises:
        ConfigError: a setting is impossible with this engine, or a server or environment is missing.
        ModelError: the target cannot be loaded.
        ServerError: a server does not start.
    """
    factory: EngineFactory = ENGINES[params.regenerate.engine]
    factory.check(params.regenerate)
    return factory.open(params, tokenizer, root, servers)


def request_key(prompt_id: str, sample: int, turn: int = 0) -> str:
    """Name the request for one turn of one sample of one prompt."""
    return f"{prompt_id}:{sample}:{turn}"


def request_origin(key: str) -> tuple[str, int, int]:
    """Split a request's key into prompt id, sample and turn."""
    prompt_id, sample, turn = key.rsplit(":", 2)
    return prompt_id, int(sample), int(turn)


def request_seed(seed: int, prompt_id: str, sample: int, turn: int = 0) -> int:
    """Derive a request's own seed, 31 bits, from the stage's seed."""
    text = f"{seed} {request_key(prompt_id, sample, turn)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
