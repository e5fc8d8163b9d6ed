"""HTTP to OpenAI-compatible servers: one session, and every way a try can fail as one of our own kinds.

Owns connections and their patience. What is sent and what an answer means is the business of `completions`; where a
request goes, of `dispatch` and `pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import aiohttp

from dllm.engines.openai.retry import Fault, FaultKind, Refused, retry_after_s
from dllm.engines.openai.servers import KEY_VARIABLE, Server
from dllm.errors import ServerError

CONNECT_TIMEOUT_S = 10.0
INFO_TIMEOUT_S = 5.0
KEEPALIVE_S = 4.0
"""Idle connections are closed after so long: below the 5 s after which the common servers close them, since a request
that meets a closing connection is lost."""
LARGEST_REPLY = 64 << 20
"""In bytes."""
BUSY = (408, 409, 425, 429)
NO_PROTOCOL = "give the address of an OpenAI-compatible server, which ends in /v1"
FACTS = ("version", "model_path", "revision", "weight_version", "dtype", "quantization")
"""What is kept of what servers say of themselves; some of the rest is secret."""


class Client:
    """Connections to all servers of a run, opened inside its event loop.

    Units: `timeout_s` is the patience with one request, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        connect = min(CONNECT_TIMEOUT_S, timeout_s)
        self._session = aiohttp.ClientSession(
            # No limit here: who calls keeps to the concurrency, and a probe must get through beside it.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()
        await asyncio.sleep(0)  # the sockets close in the loop's next round

    async def chat(self, server: Server, body: bytes) -> Any:
        """Post one chat completion; return the reply's JSON.

        Raises:
            Fault: no whole answer came.
            Refused: the server refuses this request.
            ServerError: it lets nobody in.
        """
        status, headers, data = await self._exchange(server, f"{server.url}/chat/completions", body, self._timeout_s)
        _check_status(server, status, headers.get("Retry-After"), data)
        return _json(data)

    async def models(self, server: Server) -> list[dict[str, Any]]:
        """List what a server serves.

        Raises:
            Fault: it does not answer.
            ServerError: it lets nobody in, or speaks another protocol.
        """
        status, _, data = await self._exchange(server, f"{server.url}/models", None, CONNECT_TIMEOUT_S)
        try:
            _check_status(server, status, None, data)
            models = _json(data)["data"]
            return [{**model, "id": str(model["id"])} for model in models or []]
        except Fault as fault:
            if fault.kind != "absent" and status != 200:
                raise
        except (Refused, TypeError, KeyError):
            pass
        message = f"the reply to the list of models ({status}) is not the OpenAI protocol"
        raise ServerError(message, where=server.url, hint=NO_PROTOCOL)

    async def facts(self, server: Server) -> dict[str, Any]:
        """Ask a server what it runs, as far as it says: SGLang and vLLM do, each at paths of its own."""
        found: dict[str, Any] = {}
        for path in ("/model_info", "/server_info", "/get_server_info", "/version"):
            if path != "/model_info" and "version" in found:
                break
            with contextlib.suppress(Fault):
                status, _, data = await self._exchange(
                    server, server.url.removesuffix("/v1") + path, None, INFO_TIMEOUT_S
                )
                said = _json(data) if status == 200 else None
                if isinstance(said, dict):
                    found |= {name: said[name] for name in FACTS if isinstance(said.get(name), str | int | float)}
        return found

    async def _exchange(self, server: Server, url: str, body: bytes | None, timeout_s: float) -> tuple[int, Any, bytes]:
        method = "GET" if body is None else "POST"
        with _faults(server, timeout_s):
            async with asyncio.timeout(timeout_s) as wait:
                server.waits.add(wait)
                try:
                    async with self._session.request(
                        method, url, data=body, headers=server.headers, proxy=server.proxy, allow_redirects=False
                    ) as reply:
                        return reply.status, reply.headers, await _read(reply)
                finally:
                    server.waits.discard(wait)


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    chunks, size = [], 0
    async for chunk in reply.content.iter_any():
        size += len(chunk)
        if size > LARGEST_REPLY:
            raise Fault(f"the reply is longer than {LARGEST_REPLY >> 20} MiB", "outage")
        chunks.append(chunk)
    return b"".join(chunks)


@contextlib.contextmanager
def _faults(server: Server, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Fault("no connection in time", "unreached") from None
    except aiohttp.ClientConnectorError as error:
        raise Fault(f"cannot connect: {error.os_error.strerror or error.os_error}", "unreached") from None
    except aiohttp.ClientError as error:
        raise Fault(f"the connection broke: {_line(str(error)) or type(error).__name__}", "outage") from None
    except TimeoutError:
        if server.state == "gone":
            raise Fault("the server went away", "outage") from None
        raise Fault(f"no answer within {timeout_s:g} s", "slow") from None


def _check_status(server: Server, status: int, retry_after: str | None, data: bytes) -> None:
    if status == 200:
        return
    what = f"the server answered {status}: {_detail(data)}"
    if status in (401, 403):
        raise ServerError(what, where=server.url, hint=f"set {KEY_VARIABLE}")
    if status in (404, 405) or status < 400:
        raise Fault(what, "absent")
    if status in BUSY or status >= 500:
        # A server that names a time is alive and has its reasons.
        kind: FaultKind = "busy" if status in BUSY or (status == 503 and retry_after) else "outage"
        raise Fault(what, kind, retry_after_s(retry_after))
    raise Refused(what)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Fault(f"the reply is no JSON: {_line(data[:80].decode(errors='replace'))!r}", "outage") from None


def _detail(data: bytes) -> str:
    """Find the words of an error in any of the forms servers put them in."""
    text: Any = data[:2000].decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(data)
        while isinstance(said, dict):
            said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), None)
        text = said or text
    return _line(str(text))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
