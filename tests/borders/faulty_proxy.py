"""A TCP proxy before a real server: it can be away, hang, answer by itself, or lose replies of what was carried out."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

Mode = Literal["up", "away", "hang", "lose replies", "answer"]


class FaultyProxy:
    """Forwards connections to a port on loopback; `mode` says how."""

    def __init__(self, port: int) -> None:
        self.mode: Mode = "up"
        self.reply = b""
        """What it says in mode `answer`."""
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mode == "away":
                return
            if self.mode == "answer":
                self._answer(client)
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                self._pump(server, client, True)

    def _answer(self, client: socket.socket) -> None:
        """Read one request whole, so that the client is not cut off amid it, and reply."""
        with client.makefile("rb") as request:
            lines = list(iter(request.readline, b"\r\n"))
            length = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
            request.read(length)
        client.sendall(self.reply)

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.mode in ("away", "answer") or (is_reply and self.mode == "lose replies"):
                    break
                if self.mode == "hang":
                    continue
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
