"""The addresses at which a process and its descendants listen."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from pathlib import Path

import psutil

LISTENS = "0A"
LOOK_EVERY_S = 0.3


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """List the addresses at which any of these processes listens: /proc/net/tcp and tcp6, by the sockets they hold."""
    held = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in held:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address)[i : i + 4][::-1] for i in range(0, len(address) // 2, 4)]
                found.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return found


class Watch:
    """Looks at the sockets of a process and its descendants, again and again."""

    def __init__(self, pid: int) -> None:
        self.found: set[tuple[str, int]] = set()
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def beyond_loopback(self) -> set[tuple[str, int]]:
        """Where something listened that other machines can reach."""
        return {(host, port) for host, port in self.found if not ipaddress.ip_address(host).is_loopback}

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            with contextlib.suppress(psutil.Error):
                tree = {each.pid for each in psutil.Process(self._pid).children(recursive=True)}
                self.found |= listening({self._pid, *tree})
