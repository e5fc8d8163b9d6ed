"""HTTP to OpenAI-compatible servers: one pool of connections, bounded replies, and every failure as a `Fault`.

What is sent, and how a completion is read, belongs to `completions`; which server a request goes to, to `pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import aiohttp

from dllm.engines.openai.faults import MAX_REASON, Fault, Refused, one_line, read_reply
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError

CONNECT_TIMEOUT_S = 10.0
INFO_TIMEOUT_S = 5.0
KEEPALIVE_S = 4.0
"""Idle connections are closed after this time, before the 5 s after which common servers close theirs: a request sent
on a connection that is being closed is lost."""
MAX_REPLY_BYTES, MAX_INFO_BYTES = 64 << 20, 4 << 20
FREE_BYTES, TOKEN_BYTES = 64 << 10, 128
"""A reply may have so many bytes, and so many more for each token asked for: blanks are the longest tokens."""
MAX_HELD_BYTES = 256 << 20
"""Bytes of all replies in flight; a reply that has no more than its share of them is always read."""
NO_PROTOCOL = "give the address of an OpenAI-compatible server, which ends in /v1"
FACTS = ("version", "model_path", "revision", "weight_version", "dtype", "quantization")
"""What is kept of a server's description of itself; other parts may be secret."""


class Client:
    """Connections to all servers of a run, opened inside its event loop.

    Args:
        timeout_s: of one request, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._held_bytes = self._num_reading = 0
        self._session = aiohttp.ClientSession(
            # No limit here: the engine keeps to its concurrency, and probes must get through beside it.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # a small reply may unpack to gigabytes: `_read` bounds what it unpacks
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()
        await asyncio.sleep(0)  # sockets close in the loop's next iteration

    async def chat(self, server: Server, body: bytes, max_new_tokens: int | None = None) -> Any:
        """Post one chat completion; return the reply's JSON.

        Args:
            max_new_tokens: what the request asks for; a reply far beyond it is not read to its end.

        Raises:
            Fault: no complete reply came.
            Refused: the server refuses this request, or replies far beyond it.
            ServerError: it denies access.
        """
        max_bytes = MAX_REPLY_BYTES
        if max_new_tokens is not None:
            max_bytes = min(max_bytes, FREE_BYTES + TOKEN_BYTES * max_new_tokens)
        url = f"{server.url}/chat/completions"
        return read_reply(server, *await self._exchange(server, url, self._timeout_s, max_bytes, body))

    async def models(self, server: Server) -> list[dict[str, Any]]:
        """List what a server serves.

        Raises:
            Fault: it does not reply.
            ServerError: it denies access, or speaks another protocol.
        """
        status, headers, data = await self._exchange(server, f"{server.url}/models", CONNECT_TIMEOUT_S)
        try:
            models = read_reply(server, status, headers, data)["data"] or []
            return [{**model, "id": str(model["id"])} for model in models if isinstance(model, dict)]
        except Fault as fault:
            if fault.kind in ("busy", "outage") and fault.status != 200:
                raise
            reason = fault.reason
        except Refused as refused:
            reason = str(refused)
        except (TypeError, KeyError):
            reason = one_line(data[:400].decode(errors="replace"), 200)
        message = f"the reply to the list of models ({status}) is not the OpenAI protocol: {reason}"
        raise ServerError(message, where=server.url, hint=NO_PROTOCOL)

    async def facts(self, server: Server) -> dict[str, Any]:
        """Ask a server what it runs; SGLang and vLLM tell, each at its own paths."""
        found: dict[str, Any] = {}
        for path in ("/model_info", "/server_info", "/get_server_info", "/version"):
            if path != "/model_info" and "version" in found:
                break
            with contextlib.suppress(Fault, Refused, ServerError):
                url = server.url.removesuffix("/v1") + path
                said = read_reply(server, *await self._exchange(server, url, INFO_TIMEOUT_S))
                if isinstance(said, dict):
                    found |= {name: plain(said[name]) for name in FACTS if isinstance(said.get(name), str | int)}
        return found

    async def is_healthy(self, server: Server) -> bool:
        """Return whether a server says at /health that it is."""
        with contextlib.suppress(Fault, Refused):
            url = server.url.removesuffix("/v1") + "/health"
            return (await self._exchange(server, url, INFO_TIMEOUT_S))[0] == 200
        return False

    async def _exchange(
        self, server: Server, url: str, timeout_s: float, max_bytes: int = MAX_INFO_BYTES, body: bytes | None = None
    ) -> tuple[int, Any, bytes]:
        method = "GET" if body is None else "POST"
        with _faults(server, timeout_s):
            async with asyncio.timeout(timeout_s) as deadline:
                server.deadlines.add(deadline)
                try:
                    async with self._session.request(
                        method, url, data=body, headers=server.headers, proxy=server.proxy, allow_redirects=False
                    ) as reply:
                        return reply.status, reply.headers, await self._read(reply, max_bytes)
                finally:
                    server.deadlines.discard(deadline)

    async def _read(self, reply: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        """Read and unpack a reply, within its own bounds and those of all replies in flight."""
        packed = reply.headers.get("Content-Encoding", "").strip().lower() or "identity"
        if packed not in ("identity", "gzip", "x-gzip", "deflate"):
            raise Fault(f"the reply is packed as {one_line(packed, 40)}, which was not asked for", "unusable")
        unpacker = None if packed == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
        data = bytearray()
        self._num_reading += 1
        try:
            async for chunk in reply.content.iter_any():
                # One byte more than allowed, to see that there is more.
                piece = unpacker.decompress(chunk, max_bytes + 1 - len(data)) if unpacker else chunk
                data += piece
                self._held_bytes += len(piece)
                if len(data) > max_bytes:
                    raise Refused(f"the reply is longer than {_size(max_bytes)}, which nobody asked for", True)
                if self._held_bytes > MAX_HELD_BYTES and len(data) > MAX_HELD_BYTES // self._num_reading:
                    raise Fault(f"the replies in flight are together longer than {_size(MAX_HELD_BYTES)}", "busy")
            return bytes(data)
        finally:
            self._num_reading -= 1
            self._held_bytes -= len(data)


def plain(value: Any) -> Any:
    """Return a server's word about itself as one that can be printed and stored."""
    return one_line(value, 200) if isinstance(value, str) else value


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


@contextlib.contextmanager
def _faults(server: Server, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Fault("no connection in time", "unreachable") from None
    except aiohttp.ClientConnectorError as error:
        raise Fault(f"cannot connect: {error.os_error.strerror or error.os_error}", "unreachable") from None
    except (aiohttp.ClientError, zlib.error, ValueError) as error:
        # ValueError: of an address, or a proxy's, that no host can have.
        reason = one_line(str(error), MAX_REASON) or type(error).__name__
        raise Fault(f"the connection broke: {reason}", "outage") from None
    except TimeoutError:
        if server.state == "down":
            raise Fault("the server went down", "outage") from None
        raise Fault(f"no response within {timeout_s:g} s", "timeout") from None
