"""One call of `OpenAIEngine.answer`: its event loop, its workers, and each request's way to an answer or a refusal.

Owns who is asked next and how often. A request gives up its place only once its answer was handed over: what a kill can
cost is never more than what may be in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence

from dllm.config.params import Regenerate
from dllm.engines.engine import EngineStats, Refusal, Request, RequestSource, Response
from dllm.engines.openai.client import NO_PROTOCOL, Client
from dllm.engines.openai.completions import Completions, Reply
from dllm.engines.openai.pool import Pool
from dllm.engines.openai.retry import COSTLY, FREE, Fault, Outcomes, Refused, pause_s
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.process.signals import EventLoop

TICK_S = 1.0
AT_ONCE = 16
"""Requests started before those in flight get their turn."""


class Dispatch:
    """Answer a feed's requests.

    Args:
        meet: opens every server and tells how each was met; raises where none can be used.
        look: checks one server again.
        wire: writes requests and reads replies.
        settings: concurrency, patience (also with the absence of all servers) and what is borne.
        pace: kept up to date.
    """

    def __init__(
        self,
        meet: Callable[[Client], Awaitable[Sequence[Server]]],
        look: Callable[[Client, Server], Awaitable[object]],
        wire: Completions,
        settings: Regenerate,
        pace: EngineStats,
    ) -> None:
        self._meet, self._look, self._wire = meet, look, wire
        self._settings, self._pace = settings, pace
        self._outcomes = Outcomes(settings.max_failure_rate)
        self._workers: set[asyncio.Task[None]] = set()
        self._finished: deque[tuple[Request, Reply | Refusal]] = deque()
        self._failures: list[BaseException] = []
        self._open_things = contextlib.AsyncExitStack()

    def answers(self, feed: RequestSource) -> Iterator[Response | Refusal | None]:
        """Yield outcomes as they come, None after a second without one.

        Raises:
            ServerError: no server can be used, or too many requests are refused.
        """
        self._feed = feed
        loop = EventLoop()
        try:
            loop.run(self._open)
            while loop.run(self._turn):
                if not self._finished and not self._failures:
                    yield None
                while self._finished:
                    yield self._outcome(*self._finished.popleft())
                    self._outcomes.check()
                    loop.run(self._fill)  # its place is free: no server waits for the other answers
                # What did finish is handed over before a failure ends the run: it need not be asked again.
                if self._failures:
                    raise self._failures[0]
        finally:
            loop.close(self._close)

    async def _open(self) -> None:
        self._wake = asyncio.Event()
        self._client = await self._open_things.enter_async_context(Client(self._settings.timeout_s))
        servers = await self._meet(self._client)
        self._pool = Pool(servers, self._check, self._settings.timeout_s, self._pace)
        self._open_things.push_async_callback(self._pool.close)

    async def _check(self, server: Server) -> object:
        return await self._look(self._client, server)

    async def _fill(self) -> None:
        """Start requests as far as there is room beside those in flight and those whose answers wait to be read."""
        while len(self._workers) + len(self._finished) < self._settings.concurrency:
            if (request := self._feed.take()) is None:
                break
            worker = asyncio.get_running_loop().create_task(self._work(request))
            self._workers.add(worker)
            worker.add_done_callback(self._ended)
            if len(self._workers) % AT_ONCE == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _turn(self) -> bool:
        """Fill the free room and wait for something to happen; False when nothing is left to do."""
        await self._fill()
        self._wake.clear()
        if self._workers and not self._finished and not self._failures:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
        return bool(self._workers or self._finished or self._failures)

    async def _work(self, request: Request) -> None:
        found = await self._see_through(request)
        # In one step: an answer must not count as in flight and as unread, nor as neither.
        worker = asyncio.current_task()
        assert worker is not None
        self._workers.discard(worker)
        self._finished.append((request, found))
        self._wake.set()

    def _ended(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and (failure := worker.exception()) is not None:
            self._failures.append(failure)
        self._wake.set()

    async def _see_through(self, request: Request) -> Reply | Refusal:
        """Ask until a server answers, refuses the request, or its tries are used up.

        A fault of a server alone costs no try until every healthy server has had a part in it.
        """
        body = self._wire.body(request)
        tried: set[Server] = set()
        tries = pauses = 0
        while True:
            server = await self._pool.room(tried)
            try:
                return await self._ask(server, body)
            except Refused as refused:
                return Refusal(request.key, f"{refused} ({server.url})")
            except Fault as caught:
                fault = caught
            if fault.kind in ("absent", "lie"):
                await self._confirm(server, fault)
            self._pool.failed(server, fault)
            tried.add(server)
            is_round_over = not self._pool.has_other(tried)
            if fault.kind in COSTLY or (is_round_over and fault.kind not in FREE):
                tries += 1
                if tries > self._settings.max_retries:
                    return Refusal(
                        request.key, f"{fault.reason} ({server.url}), tried {_times(tries)}", is_passing=True
                    )
            if is_round_over:
                tried.clear()
                await asyncio.sleep(pause_s(pauses, fault.retry_after_s, self._settings.timeout_s))
                pauses += 1
            self._pace.retries += 1

    async def _ask(self, server: Server, body: bytes) -> Reply:
        server.in_flight += 1
        self._pace.in_flight += 1
        try:
            reply = await self._client.chat(server, body)
        finally:
            server.in_flight -= 1
            self._pace.in_flight -= 1
        read = self._wire.read(server, reply)
        self._pool.answered(server)
        return read

    async def _confirm(self, server: Server, fault: Fault) -> None:
        """Drop a server that has come to serve another model; one that claims to serve ours is beyond repair."""
        if server.state != "up":
            return
        try:
            await self._check(server)
        except (Fault, ServerError) as reason:
            self._pool.drop(server, str(reason))
        else:
            if fault.kind == "absent":
                raise ServerError(fault.reason, where=server.url, hint=NO_PROTOCOL)
            self._pool.exclude(server, fault.reason)

    def _outcome(self, request: Request, found: Reply | Refusal) -> Response | Refusal:
        outcome = found if isinstance(found, Refusal) else self._wire.answer(request, found)
        if isinstance(outcome, Response):
            self._pace.tokens += len(outcome.token_ids)
        self._outcomes.add(outcome.reason if isinstance(outcome, Refusal) else None)
        return outcome

    async def _close(self) -> None:
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await self._open_things.aclose()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
