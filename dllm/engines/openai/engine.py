"""The target behind OpenAI-compatible servers: many requests in flight, each answered or refused with a reason.

Owns the engine's face: its settings, how servers are met, and what they say of themselves. The traffic itself is in
`dispatch`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dllm.config.params import Regenerate, Target
from dllm.engines.engine import EngineStats, Refusal, RequestSource, Response
from dllm.engines.openai.client import Client
from dllm.engines.openai.completions import Completions
from dllm.engines.openai.dispatch import Dispatch
from dllm.engines.openai.retry import Fault, pause_s
from dllm.engines.openai.servers import URL_VARIABLE, Server, server_url, shown
from dllm.errors import ConfigError, ServerError
from dllm.process.signals import EventLoop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_LOOKS = 3
"""Tries to reach a server at the start."""
SPARE_FILES = 256
"""Open files left to everything but connections."""

_log = logging.getLogger(__name__)


class OpenAIEngine:
    """Ask OpenAI-compatible servers that serve one and the same target.

    Args:
        urls: their addresses; `server_urls` finds them.
        settings: concurrency, patience and how many refusals are borne.
        target: the model behind them.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: an address is no http address, or the concurrency is beyond this machine.
    """

    def __init__(
        self, urls: Sequence[str], settings: Regenerate, target: Target, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.urls = list(dict.fromkeys(map(server_url, urls)))
        self.served_model = settings.served_model or target.model
        self.pace = EngineStats()
        self._settings = settings
        self._wire = Completions(self.served_model, target, tokenizer)
        self._facts: dict[str, Any] | None = None
        _allow_files(settings.concurrency + SPARE_FILES)

    def describe(self) -> dict[str, Any]:
        """Say which servers answer, and model and versions as they report them; asks them once.

        Raises:
            ServerError: none is in reach, or one serves something else.
        """
        if self._facts is None:
            loop = EventLoop()
            try:
                loop.run(self._only_meet)
            finally:
                loop.close()
        return {"engine": "openai", "servers": [shown(url) for url in self.urls], **(self._facts or {})}

    def answer(self, feed: RequestSource) -> Iterator[Response | Refusal | None]:
        """Answer a feed, at most `concurrency` requests at a time over all servers, after checking each server.

        Raises:
            ServerError: no server is in reach or left, one serves another model or refuses everybody, or too large a
                share of the requests is refused.
        """
        dispatch = Dispatch(self._meet, self._look, self._wire, self._settings, self.pace)
        yield from dispatch.answers(feed)

    async def _only_meet(self) -> None:
        async with Client(self._settings.timeout_s) as client:
            await self._meet(client)

    async def _meet(self, client: Client) -> list[Server]:
        """Look at every server; those out of reach are left out for now, unless all are."""
        servers = [Server.at(url) for url in self.urls]
        met = await asyncio.gather(*(self._reach(client, server) for server in servers))
        out = [server for server, is_there in zip(servers, met, strict=True) if not is_there]
        if len(out) == len(servers):
            raise ServerError(
                f"cannot reach the server: {'; '.join(dict.fromkeys(server.reason for server in out))}",
                where=", ".join(server.url for server in out),
                hint=f"start it, or set regenerate.servers or {URL_VARIABLE}; finished answers are kept",
            )
        for server in out:
            _log.warning("%s is left out until it answers: %s", server.url, server.reason)
        return servers

    async def _reach(self, client: Client, server: Server) -> bool:
        for turn in range(1 + min(FIRST_LOOKS - 1, self._settings.max_retries)):
            if turn:
                await asyncio.sleep(pause_s(turn, None, 0.0))
            try:
                await self._look(client, server)
            except Fault as fault:
                server.state, server.reason = "gone", fault.reason
            else:
                server.state, server.reason = "up", ""
                return True
        return False

    async def _look(self, client: Client, server: Server) -> None:
        """Check that a server serves the target, and the same one as the others.

        Raises:
            Fault: it is out of reach.
            ServerError: it serves something else.
        """
        models = await client.models(server)
        entry = next((model for model in models if model["id"] == self.served_model), None)
        if entry is None:
            served = ", ".join(model["id"] for model in models) or "no model"
            raise ServerError(
                f"the server serves {served}, not {self.served_model}",
                where=server.url,
                hint="set regenerate.served_model to the name it serves the target by",
            )
        said = {"software": entry.get("owned_by"), "model_path": entry.get("root"), **await client.facts(server)}
        facts = {name: value for name, value in said.items() if value is not None}
        known = self._facts or {}
        for name in known.keys() & facts.keys():
            if facts[name] != known[name]:
                raise ServerError(
                    f"the servers differ: {name} is {facts[name]!r} here and {known[name]!r} elsewhere",
                    where=server.url,
                    hint="serve the same target with the same version everywhere",
                )
        # What any of them says holds for all: who answers first has no say in it.
        self._facts = {"model": self.served_model, **dict(sorted((facts | known).items()))}


def _allow_files(needed: int) -> None:
    """Let this process open as many files as it will have connections."""
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
