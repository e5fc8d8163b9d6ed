"""HTTP to OpenAI-compatible servers: one pool of connections, and every failure as a `Fault`.

What is sent and how a reply is read belongs to `completions`; which server a request goes to, to `pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal

import aiohttp

from dllm.engines.openai.servers import KEY_VARIABLE, Server
from dllm.errors import ServerError
from dllm.secrets import hide

CONNECT_TIMEOUT_S = 10.0
INFO_TIMEOUT_S = 5.0
KEEPALIVE_S = 4.0
"""Idle connections are closed after this time, before the 5 s after which common servers close theirs: a request sent
on a connection that is being closed is lost."""
MAX_REPLY_BYTES = 64 << 20
BUSY = (408, 409, 425, 429)
NO_PROTOCOL = "give the address of an OpenAI-compatible server, which ends in /v1"
FACTS = ("version", "model_path", "revision", "weight_version", "dtype", "quantization")
"""What is kept of a server's description of itself; other parts may be secret."""

FaultKind = Literal["unreachable", "outage", "timeout", "busy", "unusable", "not_found", "wrong_model"]
"""`unreachable`: nothing was sent; `outage`: the server broke down; `timeout`: it took too long; `busy`: it asks to
retry later; `unusable`: the reply cannot be used; `not_found`: it does not know the path or the model; `wrong_model`:
another model replied."""


class Fault(Exception):
    """A failed try of a request; another try, or another server, may succeed.

    Args:
        reason: one line.
        kind: see `FaultKind`.
        retry_after_s: the pause that the server asks for, in seconds.
        status: the HTTP status of the reply; None where there was no reply.
    """

    def __init__(
        self, reason: str, kind: FaultKind, retry_after_s: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.retry_after_s, self.status = reason, kind, retry_after_s, status


class Refused(Exception):
    """The server refuses this request, and would refuse it again; the text is the reason, in one line."""


class Client:
    """Connections to all servers of a run, opened inside its event loop.

    Args:
        timeout_s: of one request, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            # No limit here: the engine keeps to its concurrency, and probes must get through beside it.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()
        await asyncio.sleep(0)  # sockets close in the loop's next iteration

    async def chat(self, server: Server, body: bytes) -> Any:
        """Post one chat completion; return the reply's JSON.

        Raises:
            Fault: no complete reply came.
            Refused: the server refuses this request.
            ServerError: it denies access.
        """
        status, headers, data = await self._exchange(server, f"{server.url}/chat/completions", self._timeout_s, body)
        _check_status(server, status, headers.get("Retry-After"), data)
        return _json(data)

    async def models(self, server: Server) -> list[dict[str, Any]]:
        """List what a server serves.

        Raises:
            Fault: it does not reply.
            ServerError: it denies access, or speaks another protocol.
        """
        status, _, data = await self._exchange(server, f"{server.url}/models", CONNECT_TIMEOUT_S)
        try:
            _check_status(server, status, None, data)
            models = _json(data)["data"] or []
            return [{**model, "id": str(model["id"])} for model in models if isinstance(model, dict)]
        except Fault as fault:
            if fault.kind != "not_found" and status != 200:
                raise
        except (Refused, TypeError, KeyError):
            pass
        message = f"the reply to the list of models ({status}) is not the OpenAI protocol"
        raise ServerError(message, where=server.url, hint=NO_PROTOCOL)

    async def facts(self, server: Server) -> dict[str, Any]:
        """Ask a server what it runs; SGLang and vLLM tell, each at its own paths."""
        found: dict[str, Any] = {}
        for path in ("/model_info", "/server_info", "/get_server_info", "/version"):
            if path != "/model_info" and "version" in found:
                break
            data = await self.get(server, path)
            with contextlib.suppress(Fault):
                said = None if data is None else _json(data)
                if isinstance(said, dict):
                    found |= {name: said[name] for name in FACTS if isinstance(said.get(name), str | int | float)}
        return found

    async def get(self, server: Server, path: str) -> bytes | None:
        """Fetch a path outside the API; None where there is no reply with status 200."""
        with contextlib.suppress(Fault):
            status, _, data = await self._exchange(server, server.url.removesuffix("/v1") + path, INFO_TIMEOUT_S)
            return data if status == 200 else None
        return None

    async def _exchange(
        self, server: Server, url: str, timeout_s: float, body: bytes | None = None
    ) -> tuple[int, Any, bytes]:
        method = "GET" if body is None else "POST"
        with _faults(server, timeout_s):
            async with asyncio.timeout(timeout_s) as deadline:
                server.deadlines.add(deadline)
                try:
                    async with self._session.request(
                        method, url, data=body, headers=server.headers, proxy=server.proxy, allow_redirects=False
                    ) as reply:
                        return reply.status, reply.headers, await _read(reply)
                finally:
                    server.deadlines.discard(deadline)


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    chunks, size = [], 0
    async for chunk in reply.content.iter_any():
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            raise Fault(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB", "outage")
        chunks.append(chunk)
    return b"".join(chunks)


@contextlib.contextmanager
def _faults(server: Server, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Fault("no connection in time", "unreachable") from None
    except aiohttp.ClientConnectorError as error:
        raise Fault(f"cannot connect: {error.os_error.strerror or error.os_error}", "unreachable") from None
    except aiohttp.ClientError as error:
        raise Fault(f"the connection broke: {_line(str(error)) or type(error).__name__}", "outage") from None
    except TimeoutError:
        if server.state == "down":
            raise Fault("the server went down", "outage") from None
        raise Fault(f"no response within {timeout_s:g} s", "timeout") from None


def _check_status(server: Server, status: int, retry_after: str | None, data: bytes) -> None:
    if status == 200:
        return
    what = f"the server answered {status}: {_detail(data)}"
    if status in (401, 403):
        raise ServerError(what, where=server.url, hint=f"set {KEY_VARIABLE}")
    if status in (404, 405) or status < 400:
        raise Fault(what, "not_found", status=status)
    if status in BUSY or status >= 500:
        # A server that names a time works, and is only overloaded.
        kind: FaultKind = "busy" if status in BUSY or (status == 503 and retry_after) else "outage"
        raise Fault(what, kind, retry_after_s(retry_after), status)
    raise Refused(what)


def retry_after_s(header: str | None) -> float | None:
    """Parse a Retry-After header, seconds or an HTTP date; None where it is absent or invalid. Units: seconds."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        reason = f"the reply is not JSON: {_line(data[:80].decode(errors='replace'))!r}"
        raise Fault(reason, "outage", status=200) from None


def _detail(data: bytes) -> str:
    """Extract an error message from any of the forms that servers use."""
    text: Any = data[:2000].decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(data)
        while isinstance(said, dict):
            said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), None)
        text = said or text
    return _line(str(text))


def _line(text: str) -> str:
    return hide(" ".join(text.split()))[:300]  # some servers repeat a wrong key
