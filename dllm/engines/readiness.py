"""When a server that was just started is ready: it is healthy, serves the model, and has generated a token.

A server listens on its port long before it can generate, and some report that they are healthy and never generate
anything. So only a token counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from dllm.engines.openai.client import Client
from dllm.engines.openai.faults import Fault, Refused
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.outside import one_line
from dllm.process.children import Background
from dllm.process.event_loop import EventLoop

LOOK_EVERY_S = 0.5
REPORT_EVERY_S = 15.0


def wait_until_ready(url: str, model: str, child: Background, *, name: str, path: str | None, timeout_s: float) -> None:
    """Wait until a server that was just started has generated a token with the right model.

    Args:
        url: its address, with /v1.
        model: the name under which it must serve the model.
        child: its process; waiting ends when that has ended.
        name: what messages call it.
        path: the model directory that it must report at /model_info, where it has that path; None does not ask.
        timeout_s: of all this, in seconds.

    Raises:
        ServerError: it serves something else, refuses the first request, or generates no token in time. None is raised
            when the process has ended: the caller knows why it did.
    """
    loop = EventLoop()
    try:
        loop.run(lambda: _Wait(Server.at(url), model, child, name, timeout_s).run(path))
    finally:
        loop.close()


class _Wait:
    def __init__(self, server: Server, model: str, child: Background, name: str, timeout_s: float) -> None:
        self._server, self._model, self._child, self._name = server, model, child, name
        self._timeout_s = timeout_s
        self._began = self._reported = time.monotonic()
        self._missing = "never became healthy"

    async def run(self, path: str | None) -> None:
        try:
            async with asyncio.timeout(self._timeout_s), Client(self._timeout_s) as client:
                while not self._child.ended and not await client.is_healthy(self._server):
                    await self._pause()
                if self._child.ended:
                    return
                await self._check_model(client, path)
                self._missing = "is healthy but generated no token"
                while not self._child.ended and not await self._generates(client):
                    await self._pause()
        except TimeoutError:
            raise self._error(
                f"{self._missing} within {self._timeout_s:g} s",
                hint="look into its log, or raise regenerate.sglang.start_timeout_s",
            ) from None

    async def _check_model(self, client: Client, path: str | None) -> None:
        try:
            served = [model["id"] for model in await client.models(self._server)]
        except Fault as fault:
            raise self._error(f"does not list its models: {fault}") from None
        if self._model not in served:
            raise self._error(f"serves {', '.join(served) or 'nothing'}, not {self._model}")
        reported = (await client.facts(self._server)).get("model_path")
        if path and reported and reported != path:
            raise self._error(f"has loaded {reported}, not {path}")

    async def _generates(self, client: Client) -> bool:
        """Request one token; False where another try may succeed."""
        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": self._model, "messages": messages, "max_tokens": 1, "temperature": 0}
        try:
            reply = await client.chat(self._server, json.dumps(body).encode())
            usage, choices = reply.get("usage") or {}, reply["choices"]
            return bool(usage.get("completion_tokens") or choices[0]["message"].get("content"))
        except Refused as refused:
            raise self._error(f"refuses its first request: {refused}") from None
        except Fault as fault:
            if fault.status is None or fault.kind == "busy" or fault.status == 503:
                return False
            raise self._error(f"fails at its first request: {fault}") from None
        except (LookupError, TypeError, AttributeError):
            raise self._error("does not reply in the OpenAI protocol") from None

    async def _pause(self) -> None:
        now = time.monotonic()
        if now - self._reported > REPORT_EVERY_S:
            self._reported = now
            last = next((line for line in reversed(self._child.tail) if line.strip()), "none").strip()
            waited = f"{self._name}: not ready after {now - self._began:.0f} s"
            print(f"{waited}; its last line: {one_line(last, 200)}", file=sys.stderr, flush=True)
        await asyncio.sleep(LOOK_EVERY_S)

    def _error(self, what: str, hint: str | None = None) -> ServerError:
        return ServerError(f"{self._name} {what}", where=self._server.url, hint=hint)
