"""The pool of servers: checks what each serves, chooses one per request, drops those that fail, and probes them.

Owns every change of a server's state; which faults count is `faults.FAULTS`:

| state | requests go there | becomes |
|---|---|---|
| up | yes | held after `DROP_AFTER` faults in a row, or when asked again it serves another model |
| held | no | up or down, as its first probe says: at once, later where it was dropped before |
| down | no; those in flight fail | up when a probe finds the right model |
| wrong_model | no | nothing: it lists the right model and replies as another |
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from dllm.engines.engine import EngineStats
from dllm.engines.openai.client import NO_PROTOCOL, Client, plain
from dllm.engines.openai.faults import FAULTS, Fault, one_line
from dllm.engines.openai.servers import URL_VARIABLE, Server
from dllm.errors import ServerError
from dllm.outside import tls_hint

FIRST_TRIES = 3
"""Tries to reach each server at the start."""
DROP_AFTER = 3
"""Faults in a row, of any requests, that drop a server."""
PROBE_EVERY_S = 3.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
JITTER_S = 0.1
"""Spreads the retries of requests that were sent away for the same time."""
LISTED = "it lists this model, and does not serve it: see its log, or give another name (regenerate.served_model)"
"""The hint where a server does not know the model that it lists."""
MAX_RETRY_AFTER_S = 60.0
"""A server that asks for a longer pause is asked again after this one."""

_log = logging.getLogger(__name__)


def pause_s(pauses: int, retry_after_s: float | None, max_s: float) -> float:
    """Draw the pause before the next try of a request: exponential backoff with full jitter, or what the server asks.

    Units: seconds.

    Args:
        pauses: number of pauses that the request has had.
        max_s: the longest pause that a server may ask for.
    """
    if retry_after_s is not None:
        return min(retry_after_s, max_s) + random.uniform(0, JITTER_S)
    return random.uniform(0, min(FIRST_PAUSE_S * 2 ** min(pauses, 16), MAX_PAUSE_S))


class Pool:
    """The servers of one run, inside its event loop.

    Args:
        client: sends the probes.
        servers: all of them; `connect` finds out which are up.
        model: the name that each must serve.
        timeout_s: how long a run waits while no server is up.
        stats: `servers_up` is kept up to date.
        facts: what is known of the servers' model and software; updated in place, equal on all servers.
    """

    def __init__(
        self,
        client: Client,
        servers: Sequence[Server],
        model: str,
        timeout_s: float,
        stats: EngineStats,
        facts: dict[str, Any],
    ) -> None:
        self.servers, self.facts = servers, facts
        self.positions: int | None = None
        """The fewest that a server reports, for prompt and response."""
        self._client, self._model, self._timeout_s, self._stats = client, model, timeout_s, stats
        self._probes: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._none_since: float | None = None
        self._note_change()

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *_: object) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

    async def connect(self, tries: int = FIRST_TRIES) -> None:
        """Check every server; those that cannot be reached are left out for now, unless that is all of them.

        Raises:
            ServerError: none can be reached, or one serves another model or denies access.
        """
        await asyncio.gather(*(self._reach(server, tries) for server in self.servers))
        down = [server for server in self.servers if server.state != "up"]
        self._note_change()
        if len(down) == len(self.servers):
            reasons = _reasons(down)
            start = f"start it, or set regenerate.servers or {URL_VARIABLE}"
            raise ServerError(
                f"cannot reach the server: {reasons}",
                where=", ".join(server.url for server in down),
                hint=f"{tls_hint(reasons, 'SSL_CERT_FILE') or start}; finished responses are kept",
            )
        for server in down:
            _log.warning("%s is left out until it responds: %s", server.url, server.reason)
            self._start_probe(server, PROBE_EVERY_S)

    async def check(self, server: Server) -> None:
        """Check that a server serves the model, with the same facts as the others.

        Raises:
            Fault: it cannot be reached.
            ServerError: it serves something else.
        """
        models = await self._client.models(server)
        entry = next((model for model in models if model["id"] == self._model), None)
        if entry is None:
            served = one_line(", ".join(model["id"] for model in models), 200) or "no model"
            raise ServerError(
                f"the server serves {served}, not {self._model}",
                where=server.url,
                hint="set regenerate.served_model to the name that it serves the target under",
            )
        root = entry.get("root")
        # One model under several names: servers reply under the first of them, whichever was asked for.
        server.names = frozenset(model["id"] for model in models if root is not None and model.get("root") == root)
        if type(limit := entry.get("max_model_len")) is int and limit > 0:  # else it means that there is none
            # One fewer: some servers refuse a request that takes all positions.
            self.positions = min(limit - 1, self.positions or limit)
        reported = {"software": plain(entry.get("owned_by")), "model_path": plain(root)}
        reported |= await self._client.facts(server)
        for name, value in reported.items():
            if value is not None and self.facts.get(name, value) != value:
                raise ServerError(
                    f"the servers differ: {name} is {value!r} here and {self.facts[name]!r} elsewhere",
                    where=server.url,
                    hint="serve the same target with the same version everywhere",
                )
        self.facts.update({name: value for name, value in reported.items() if value is not None}, model=self._model)

    async def choose(self, tried: Collection[Server]) -> Server:
        """Return the server with the fewest requests in flight, preferably one not tried yet; wait while none is up.

        Raises:
            ServerError: none is up within `timeout_s`, or none has the right model.
        """
        while True:
            if up := [server for server in self.servers if server.state == "up"]:
                return min(up, key=lambda server: (server in tried, server.in_flight))
            self._changed.clear()
            if all(server.state == "wrong_model" for server in self.servers):
                raise self._none_left("no server has the right model")
            deadline = None if self._none_since is None else self._none_since + self._timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._none_left(f"no server left for {self._timeout_s:g} s") from None

    def has_other(self, tried: Collection[Server]) -> bool:
        """Return whether a server is up that was not tried yet."""
        return any(server.state == "up" and server not in tried for server in self.servers)

    def succeeded(self, server: Server) -> None:
        """Record a usable reply of a server."""
        server.failures = server.drops = 0

    async def failed(self, server: Server, fault: Fault) -> None:
        """Record a failed try, which may drop the server.

        Raises:
            ServerError: a server that lists the right model does not know the path of chat completions.
        """
        rule = FAULTS[fault.kind]
        if rule.rechecks and server.state == "up":
            await self._recheck(server, fault)
        elif rule.counts:
            server.failures += 1
            if server.failures >= DROP_AFTER:
                self.drop(server, fault.reason)

    def exclude(self, server: Server, reason: str) -> None:
        """Never use a server again: it lists the right model, and replies as another."""
        if server.state != "wrong_model":
            self._set(server, "wrong_model", reason)
            _log.warning("%s is left out for good: %s", server.url, reason)

    def drop(self, server: Server, reason: str) -> None:
        """Do not use a server until it replies to a probe."""
        if server.state != "up":
            return
        server.failures, server.drops = 0, server.drops + 1
        self._set(server, "held", reason)
        _log.warning("%s is left out until it responds again: %s", server.url, reason)
        # One that replies to probes and to nothing else is held longer each time.
        self._start_probe(server, 0.0 if server.drops == 1 else min(PROBE_EVERY_S, 0.1 * 2 ** min(server.drops, 16)))

    async def _reach(self, server: Server, tries: int) -> None:
        for turn in range(tries):
            if turn:
                await asyncio.sleep(pause_s(turn, None, 0.0))
            try:
                await self.check(server)
            except Fault as fault:
                server.state, server.reason = "down", fault.reason
            else:
                server.state, server.reason = "up", ""
                return

    async def _recheck(self, server: Server, fault: Fault) -> None:
        try:
            await self.check(server)
        except (Fault, ServerError) as reason:
            self.drop(server, str(reason))
        else:
            if fault.kind == "not_found":
                names_model = re.search(rf"(?<!\w){re.escape(self._model)}(?!\w)", fault.reason)
                raise ServerError(fault.reason, where=server.url, hint=LISTED if names_model else NO_PROTOCOL)
            self.exclude(server, fault.reason)

    def _start_probe(self, server: Server, pause_s: float) -> None:
        probe = asyncio.get_running_loop().create_task(self._probe(server, pause_s))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, server: Server, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        while server.state in ("held", "down"):
            try:
                await self.check(server)
            except (Fault, ServerError) as error:
                self._set(server, "down", str(error))
                _expire(server)
                await asyncio.sleep(PROBE_EVERY_S)
            else:
                self._set(server, "up", "")
                _log.warning("%s responds again", server.url)

    def _set(self, server: Server, state: Literal["up", "held", "down", "wrong_model"], reason: str) -> None:
        server.state, server.reason = state, reason
        self._note_change()

    def _note_change(self) -> None:
        self._stats.servers_up = sum(server.state == "up" for server in self.servers)
        if any(server.state in ("up", "held") for server in self.servers):
            self._none_since = None
        elif self._none_since is None:
            self._none_since = asyncio.get_running_loop().time()
        self._changed.set()

    def _none_left(self, what: str) -> ServerError:
        return ServerError(
            f"{what}: {_reasons(self.servers)}",
            where=", ".join(server.url for server in self.servers),
            hint="finished responses are kept; start a server and run this again",
        )


def _reasons(servers: Sequence[Server]) -> str:
    return "; ".join(dict.fromkeys(server.reason for server in servers))


def _expire(server: Server) -> None:
    """Let the requests in flight to a server that is down fail now, so that they go to another."""
    now = asyncio.get_running_loop().time()
    for deadline in server.deadlines:
        if not deadline.expired():
            deadline.reschedule(now)
