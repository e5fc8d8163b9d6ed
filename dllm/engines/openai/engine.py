"""The target behind OpenAI-compatible servers: many requests in flight, retried until each is answered or refused.

Owns how often a request is tried and when too many are refused. A request keeps its slot until the caller has taken its
outcome, so a kill never costs more requests than may be in flight.
"""

from __future__ import annotations

import asyncio
import resource
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params, Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import EngineStats, Refusal, Request, RequestSource, Response, fit
from dllm.engines.openai.client import Client
from dllm.engines.openai.completions import Completions, Reply
from dllm.engines.openai.faults import FAULTS, Fault, Refused
from dllm.engines.openai.pool import FIRST_TRIES, MAX_RETRY_AFTER_S, Pool, pause_s
from dllm.engines.openai.servers import Server, server_url, server_urls, without_credentials
from dllm.errors import ConfigError, ServerError
from dllm.process.event_loop import EventLoop

TICK_S = 1.0
START_TOGETHER = 16
"""Requests that are started before those in flight get the event loop."""
WINDOW, MIN_OUTCOMES = 200, 20
"""Latest requests of which the failure rate is taken, and the number that it takes to judge."""
SPARE_FILES = 256
"""Open files left to everything but connections."""


class OpenAIEngine:
    """Generate with OpenAI-compatible servers that serve one and the same target.

    Args:
        urls: their addresses, as `server_urls` finds them.
        settings: concurrency, timeout, retries and the failure rate that is tolerated.
        target: the model that they serve.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: an address is not an http address, or the concurrency needs more open files than allowed.
    """

    affects = frozenset({"served_model"})
    ignores = frozenset({"batch_size"})
    is_external = True
    generates = True

    def __init__(
        self, urls: Sequence[str], settings: Regenerate, target: Target, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.urls = list(dict.fromkeys(map(server_url, urls)))
        self.stats = EngineStats()
        self._settings, self._model = settings, settings.served_model or target.model
        self._completions = Completions(self._model, target, tokenizer)
        self._facts: dict[str, Any] = {}
        _allow_files(settings.concurrency + SPARE_FILES)

    @classmethod
    def check(cls, settings: Regenerate) -> None:
        pass

    @classmethod
    def check_target(cls, target: Target) -> None:
        pass

    @classmethod
    def num_slots(cls, settings: Regenerate) -> int:
        return settings.concurrency

    @classmethod
    @contextmanager
    def open(
        cls, params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
    ) -> Iterator[OpenAIEngine]:
        urls = server_urls(params.regenerate.servers) if servers is None else servers
        yield cls(urls, params.regenerate, params.target, tokenizer)

    def describe(self) -> dict[str, Any]:
        """Describe the servers by what they report; they are asked once.

        Raises:
            ServerError: none can be reached, or one serves something else.
        """
        if not self._facts:
            loop = EventLoop()
            try:
                loop.run(self._connect)
            finally:
                loop.close()
        servers = [without_credentials(url) for url in self.urls]
        return {"engine": "openai", "servers": servers, **dict(sorted(self._facts.items()))}

    def answer(self, requests: RequestSource) -> Iterator[Response | Refusal | None]:
        """Respond to requests, at most `concurrency` at a time over all servers, after checking each server.

        Raises:
            ServerError: no server is up, one serves another model or denies access, or too large a share of the
                requests is refused.
        """
        outcomes = self._outcomes(requests)

        async def step() -> tuple[Response | Refusal | None] | None:
            try:
                return (await anext(outcomes),)
            except StopAsyncIteration:
                return None

        loop = EventLoop()
        try:
            while (outcome := loop.run(step)) is not None:
                yield outcome[0]
        finally:
            loop.close(outcomes.aclose)

    async def _outcomes(self, requests: RequestSource) -> AsyncGenerator[Response | Refusal | None]:
        async with self._servers() as (client, pool):
            run = _Run(client, pool, self._completions, self._settings, self.stats)
            async with aclosing(run.outcomes(requests)) as outcomes:
                async for outcome in outcomes:
                    yield outcome

    async def _connect(self) -> None:
        async with self._servers():
            pass

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[tuple[Client, Pool]]:
        servers = [Server.at(url) for url in self.urls]
        timeout_s = self._settings.timeout_s
        async with (
            Client(timeout_s) as client,
            Pool(client, servers, self._model, timeout_s, self.stats, self._facts) as pool,
        ):
            await pool.connect(1 + min(FIRST_TRIES - 1, self._settings.max_retries))
            yield client, pool


class _Run:
    """The requests of one call of `answer`."""

    def __init__(
        self, client: Client, pool: Pool, completions: Completions, settings: Regenerate, stats: EngineStats
    ) -> None:
        self._client, self._pool, self._completions = client, pool, completions
        self._settings, self._stats = settings, stats
        self._failure_rate = FailureRate(settings.max_failure_rate)
        self._finished: asyncio.Queue[tuple[Request, Reply | Refusal | Exception]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_open = 0
        """Requests that are in flight, or whose outcome the caller has not taken."""

    async def outcomes(self, requests: RequestSource) -> AsyncGenerator[Response | Refusal | None]:
        """Yield outcomes as they come, None after each second without one."""
        try:
            while await self._fill(requests):
                try:
                    async with asyncio.timeout(TICK_S):
                        request, found = await self._finished.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(found, Exception):
                    # What has finished is handed over before a failure ends the run: it need not be generated again.
                    while not self._finished.empty():
                        request, other = self._finished.get_nowait()
                        if not isinstance(other, Exception):
                            yield self._outcome(request, other)
                    raise found
                yield self._outcome(request, found)
                self._num_open -= 1
                self._failure_rate.check()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fill(self, requests: RequestSource) -> bool:
        """Start requests in the free slots; return whether any request is open."""
        while self._num_open < self._settings.concurrency and (request := requests.take()) is not None:
            self._num_open += 1
            task = asyncio.get_running_loop().create_task(self._work(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if len(self._tasks) % START_TOGETHER == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self._num_open > 0

    async def _work(self, request: Request) -> None:
        found: Reply | Refusal | Exception
        try:
            found = await self._generate(request)
        except Exception as failure:  # of the whole run: `outcomes` raises it
            found = failure
        self._finished.put_nowait((request, found))

    async def _generate(self, request: Request) -> Reply | Refusal:
        """Try until a server responds, refuses the request, or its tries are used up.

        A fault that only the server can have caused costs no try until every healthy server has been tried.
        """
        fitted = fit(request, self._pool.positions)
        if isinstance(fitted, Refusal):
            return fitted
        body = self._completions.body(fitted)
        tried: set[Server] = set()
        tries = pauses = 0
        while True:
            server = await self._pool.choose(tried)
            try:
                return await self._send(server, body, request.max_new_tokens)
            except Refused as refused:
                return Refusal(request.key, f"{refused} ({server.url})", refused.is_transient)
            except Fault as caught:
                fault = caught
            await self._pool.failed(server, fault)
            tried.add(server)
            are_all_tried = not self._pool.has_other(tried)
            cost = FAULTS[fault.kind].costs_try
            if cost == "always" or (cost == "shared" and are_all_tried):
                tries += 1
                if tries > self._settings.max_retries:
                    times = "once" if tries == 1 else f"{tries} times"
                    return Refusal(request.key, f"{fault.reason} ({server.url}), tried {times}", is_transient=True)
            if are_all_tried:
                tried.clear()
                longest_s = min(self._settings.timeout_s, MAX_RETRY_AFTER_S)
                await asyncio.sleep(pause_s(pauses, fault.retry_after_s, longest_s))
                pauses += 1
            self._stats.retries += 1

    async def _send(self, server: Server, body: bytes, max_new_tokens: int) -> Reply:
        server.in_flight += 1
        self._stats.in_flight += 1
        try:
            reply = await self._client.chat(server, body, max_new_tokens)
        finally:
            server.in_flight -= 1
            self._stats.in_flight -= 1
        read = self._completions.read(server, reply)
        self._pool.succeeded(server)
        return read

    def _outcome(self, request: Request, found: Reply | Refusal) -> Response | Refusal:
        outcome = found if isinstance(found, Refusal) else self._completions.response(request, found)
        if isinstance(outcome, Response):
            self._stats.tokens += len(outcome.token_ids)
        self._failure_rate.add(outcome.reason if isinstance(outcome, Refusal) else None)
        return outcome


class FailureRate:
    """The share of the latest requests that were refused.

    Args:
        max_rate: the largest share that is tolerated.
    """

    def __init__(self, max_rate: float) -> None:
        self._max_rate = max_rate
        self._latest: deque[bool] = deque(maxlen=WINDOW)
        self._last_reason = ""

    def add(self, reason: str | None) -> None:
        """Add a response (None) or a refusal (its reason)."""
        self._latest.append(reason is not None)
        self._last_reason = reason or self._last_reason

    def check(self) -> None:
        """Compare the share with the largest one tolerated.

        Raises:
            ServerError: it is larger; the message has the share and the latest reason.
        """
        refused, total = sum(self._latest), len(self._latest)
        if total >= MIN_OUTCOMES and refused > self._max_rate * total:
            raise ServerError(
                f"{refused} of the latest {total} requests were refused, the last one because: {self._last_reason}",
                where=f"regenerate.max_failure_rate: {self._max_rate:g}",
                hint="finished responses are kept; fix the cause and run this again, or allow a larger share",
            )


def _allow_files(needed: int) -> None:
    """Raise the limit of open files to the number of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (-1, resource.RLIM_INFINITY) or soft >= needed:
        return
    if hard not in (-1, resource.RLIM_INFINITY) and hard < needed:
        raise ConfigError(
            f"so many requests in flight need {needed} open files, and this machine allows {hard}",
            where="regenerate.concurrency",
            hint="lower it, or raise `ulimit -n`",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
