"""An OpenAI-compatible server on loopback: real sockets, made-up answers, and the faults a test asks for.

A fault is a status with headers, or one of `FAULTS`: `drop` closes the connection without a word, `half` does so amid
the answer, `stall` says nothing for `STALL_S`, `garbage` is no JSON, `nonsense` is JSON without an answer, `babble` is
no HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.patience import LONGEST_S

FAULTS = ("drop", "half", "stall", "garbage", "nonsense", "babble")
STALL_S = 5.0
HOLD_S = LONGEST_S

Said = tuple[str | dict[str, Any], str]
"""The answer's text, or the message's fields, and its finish_reason."""


def echo(body: dict[str, Any]) -> Said:
    """Answer with words that depend on the question only."""
    question = body["messages"][-1]["content"]
    number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    return f"you said {question[:20]} and I say {number % 1000}", "stop" if number % 2 else "length"


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, reply: Callable[[dict[str, Any]], Said] = echo, model: str = "builtin:tiny", port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.model, self.delay_s = reply, model, 0.0
        self.look_delay_s = 0.0
        """Before it says what it is."""
        self.faults: deque[tuple[int, dict[str, str]] | str] = deque()
        """For the next chat requests, one each."""
        self.always: tuple[int, dict[str, str]] | str | None = None
        """A fault for every chat request."""
        self.complaint: Any = {"error": {"message": "made to fail"}}
        """What is said with a status; bytes as they are."""
        self.answers_as: str | None = None
        """The model that answers name, where it is not `model`."""
        self.reports: dict[str, Any] = {}
        """What is said of the server itself, by path."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.extra: dict[str, Any] = {}
        """Further fields of the answering message."""
        self.prompt_tokens: int | None = None
        self.in_flight = self.peak = 0
        self.hold_until = 0
        """Replies wait until so many requests have been in flight at once."""
        self.guard = threading.Lock()
        self.ended = threading.Event()
        self._connections: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def end(self) -> None:
        """Die: refuse new connections and cut those that are open."""
        self.ended.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def settle(self) -> None:
        """Wait until everything is read that clients have sent before they hung up."""
        end = time.monotonic() + LONGEST_S
        since, seen = time.monotonic(), len(self.bodies)
        while time.monotonic() < min(end, since + 0.3):
            time.sleep(0.02)
            if self._connections or len(self.bodies) != seen:
                since, seen = time.monotonic(), len(self.bodies)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackServer

    def do_GET(self) -> None:
        self.server.ended.wait(self.server.look_delay_s)
        if self.path in self.server.reports:
            self._send(200, self.server.reports[self.path])
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.peak = max(server.peak, server.in_flight)
            fault = server.faults.popleft() if server.faults else server.always
        server.ended.wait(server.delay_s)
        end = time.monotonic() + HOLD_S
        while server.peak < server.hold_until and time.monotonic() < end and not server.ended.is_set():
            server.ended.wait(0.01)
        with server.guard:
            server.in_flight -= 1
        if isinstance(fault, tuple):
            said = server.complaint
            self._send_bytes(fault[0], said if isinstance(said, bytes) else json.dumps(said).encode(), fault[1])
        elif fault:
            self._misbehave(fault)
        else:
            self._send(200, self._answer(body))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        server = self.server
        said, reason = server.reply(body)
        fields = {"content": said} if isinstance(said, str) else said
        message = {"role": "assistant", **fields, **server.extra}
        choice = {"index": 0, "finish_reason": reason, "message": message}
        usage = {"prompt_tokens": server.prompt_tokens, "completion_tokens": 0, "total_tokens": 0}
        name = server.answers_as or server.model
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": name, "choices": [choice]}
        return reply if server.prompt_tokens is None else {**reply, "usage": usage}

    def _misbehave(self, fault: str) -> None:
        assert fault in FAULTS, fault
        if fault == "garbage":
            self._send_bytes(200, b'{"choices": [')
            return
        if fault == "nonsense":
            self._send(200, {"choices": []})
            return
        if fault == "stall":
            self.server.ended.wait(STALL_S)
        elif fault == "half":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [{"message": ')
        elif fault == "babble":
            self.wfile.write(b"hello, who is there?\r\n\r\n")
        self.close_connection = True

    def _send(self, status: int, value: Any) -> None:
        self._send_bytes(status, json.dumps(value).encode())

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None, **options: Any) -> Iterator[LoopbackServer]:
    """Run the server in a thread; with `tls`, it speaks https."""
    server = LoopbackServer(**options)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        if not server.ended.is_set():
            server.end()
        thread.join()
