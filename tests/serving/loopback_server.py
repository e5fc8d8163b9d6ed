"""An OpenAI-compatible server on loopback: real sockets, made-up answers, and the faults a test asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def echo(body: dict[str, Any]) -> tuple[str, str]:
    """Answer with words that depend on the question only."""
    question = body["messages"][-1]["content"]
    number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    return f"you said {question[:20]} and I say {number % 1000}", "stop" if number % 2 else "length"


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[str, str]] = echo, model: str = "builtin:tiny") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.model, self.delay_s = reply, model, 0.0
        self.faults: deque[tuple[int, dict[str, str]]] = deque()
        """Status and headers for the next chat requests, one each."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.extra: dict[str, Any] = {}
        """Further fields of the answering message."""
        self.prompt_tokens: int | None = None
        self.in_flight = self.peak = 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackServer

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.peak = max(server.peak, server.in_flight)
            fault = server.faults.popleft() if server.faults else None
        time.sleep(server.delay_s)
        with server.guard:
            server.in_flight -= 1
        if fault:
            self._send(fault[0], {"error": {"message": "made to fail"}}, fault[1])
            return
        text, reason = server.reply(body)
        message = {"role": "assistant", "content": text, **server.extra}
        choice = {"index": 0, "finish_reason": reason, "message": message}
        usage = {"prompt_tokens": server.prompt_tokens, "completion_tokens": 0, "total_tokens": 0}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice]}
        self._send(200, reply if server.prompt_tokens is None else {**reply, "usage": usage})

    def _send(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[LoopbackServer]:
    """Run the server in a thread."""
    server = LoopbackServer(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
