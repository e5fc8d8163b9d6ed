"""Which of a run's servers is asked next, and which are left out for now.

Owns every change of a server's state. A server that fails several times in a row is dropped; it is taken back as soon
as it answers with the right model again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Literal

from dllm.engines.engine import EngineStats
from dllm.engines.openai.retry import BLAMED, Fault
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError

DROP_AFTER = 3
"""Faults in a row, of whatever requests, that drop a server."""
PROBE_EVERY_S = 3.0

_log = logging.getLogger(__name__)


class Pool:
    """The servers of one run, inside its event loop.

    Args:
        servers: each with the state it was met in.
        look: asks a server whether it serves the right model; raises Fault or ServerError where it does not.
        patience_s: how long a run waits while no server is left.
        pace: told how many are up.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        look: Callable[[Server], Awaitable[object]],
        patience_s: float,
        pace: EngineStats,
    ) -> None:
        self.servers = servers
        self._look, self._patience_s, self._pace = look, patience_s, pace
        self._probes: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._none_since: float | None = None
        self._note_change()
        for server in servers:
            if server.state != "up":
                self._start_probe(server, PROBE_EVERY_S)

    async def room(self, tried: Collection[Server]) -> Server:
        """Choose the healthy server with the fewest requests, rather one that was not tried; wait while there is none.

        Raises:
            ServerError: none came back in time.
        """
        while True:
            if up := [server for server in self.servers if server.state == "up"]:
                return min(up, key=lambda server: (server in tried, server.in_flight))
            self._changed.clear()
            if all(server.state == "wrong_model" for server in self.servers):
                raise self._none_left("no server has the right model")
            deadline = None if self._none_since is None else self._none_since + self._patience_s
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._none_left(f"no server left for {self._patience_s:g} s") from None

    def has_other(self, tried: Collection[Server]) -> bool:
        """Tell whether a healthy server was not tried yet."""
        return any(server.state == "up" and server not in tried for server in self.servers)

    def answered(self, server: Server) -> None:
        """Note that a server answered as it should."""
        server.failures = server.drops = 0

    def failed(self, server: Server, fault: Fault) -> None:
        """Note a failed try, which may be the one that drops the server."""
        if fault.kind in BLAMED:
            server.failures += 1
            if server.failures >= DROP_AFTER:
                self.drop(server, fault.reason)

    def exclude(self, server: Server, reason: str) -> None:
        """Send a server no more requests at all: it says it has the model, and answers as another."""
        if server.state != "wrong_model":
            self._set(server, "wrong_model", reason)
            _log.warning("%s is left out for good: %s", server.url, reason)

    def drop(self, server: Server, reason: str) -> None:
        """Send a server no more requests until it answers a probe."""
        if server.state != "up":
            return
        server.failures, server.drops = 0, server.drops + 1
        self._set(server, "held", reason)
        _log.warning("%s is left out until it answers again: %s", server.url, reason)
        # One that answers probes but nothing else is held longer each time.
        self._start_probe(server, 0.0 if server.drops == 1 else min(PROBE_EVERY_S, 0.1 * 2 ** min(server.drops, 16)))

    async def close(self) -> None:
        """End all probes."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

    def _start_probe(self, server: Server, pause_s: float) -> None:
        probe = asyncio.get_running_loop().create_task(self._bring_back(server, pause_s))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _bring_back(self, server: Server, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        while server.state in ("held", "gone"):
            try:
                await self._look(server)
            except (Fault, ServerError) as error:
                self._set(server, "gone", str(error))
                _hurry(server.waits)
                await asyncio.sleep(PROBE_EVERY_S)
            else:
                self._set(server, "up", "")
                _log.warning("%s answers again", server.url)

    def _set(self, server: Server, state: Literal["up", "held", "gone", "wrong_model"], reason: str) -> None:
        server.state, server.reason = state, reason
        self._note_change()

    def _note_change(self) -> None:
        self._pace.servers_up = sum(server.state == "up" for server in self.servers)
        if any(server.state in ("up", "held") for server in self.servers):
            self._none_since = None
        elif self._none_since is None:
            self._none_since = asyncio.get_running_loop().time()
        self._changed.set()

    def _none_left(self, what: str) -> ServerError:
        reasons = "; ".join(dict.fromkeys(server.reason for server in self.servers))
        return ServerError(
            f"{what}: {reasons}",
            where=", ".join(server.url for server in self.servers),
            hint="finished answers are kept; start a server and run this again",
        )


def _hurry(waits: Iterable[asyncio.Timeout]) -> None:
    """Let requests to a server that is gone fail now, so that they go elsewhere."""
    now = asyncio.get_running_loop().time()
    for wait in waits:
        if not wait.expired():
            wait.reschedule(now)
