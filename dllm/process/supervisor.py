"""The parent of a child: a small process that sees to it that nothing of the child's tree outlives its caller.

`dllm.process.children.run` starts this file by its path. Signals reach one process group, and torchrun puts every rank
in a session of its own, so a caller that dies or kills a group leaves ranks behind. The supervisor adopts orphans
(where the system lets it), notices that its caller is gone because a pipe closes, and climbs one ladder in every case:
SIGTERM to the child's group and then to what it leaves behind, a grace period, SIGKILL to whatever is left, wherever
it sits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import psutil

IS_LINUX = sys.platform == "linux"
PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND_GRACE_S = 5.0
LOOK_EVERY_S = 0.1
SCAN_EVERY_S = 5.0
"""Between scans of the process table while all is well; each costs milliseconds of a core."""


def main(arguments: list[str]) -> int:
    """Run `argv` until it ends, the pipe closes, or SIGTERM comes; return its exit code once all of its tree is gone.

    Args:
        arguments: descriptor of the pipe, grace period in seconds, then the child's argv.
    """
    pipe, grace_s, argv = int(arguments[0]), float(arguments[1]), arguments[2:]
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop = _Stop()
    try:
        child = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127
    tree = _Tree(child.pid)
    while child.poll() is None and not stop.asked:
        if select.select([pipe], [], [], LOOK_EVERY_S)[0]:  # only ever readable when the caller's end has closed
            stop.asked = True
        tree.look_now_and_then()
    if stop.asked:
        end = time.monotonic() + grace_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        tree.wait_gone(grace_s, child, or_child=True)
        # What sits in sessions of its own has heard nothing if the child did not hand the word on.
        _signal(tree.look(), signal.SIGTERM)
        tree.wait_gone(end - time.monotonic(), child)
    elif tree.look():
        _signal(tree.look(), signal.SIGTERM)
        tree.wait_gone(LEFT_BEHIND_GRACE_S, child)
    while left := tree.look():
        _signal(left, signal.SIGKILL)
        tree.wait_gone(1.0, child)
    code = child.wait()
    return 128 - code if code < 0 else code


class _Stop:
    asked = False

    def __init__(self) -> None:
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


class _Tree:
    """All processes that came from the child, also those whose own parents have died."""

    def __init__(self, child: int) -> None:
        self._child = child
        self._me = psutil.Process()
        self._seen: set[psutil.Process] = set()
        self._looked = time.monotonic()

    def look_now_and_then(self) -> None:
        """Take note of what runs, for systems where orphans cannot be adopted, and collect the adopted dead."""
        if time.monotonic() - self._looked > SCAN_EVERY_S:
            self.look()

    def look(self) -> list[psutil.Process]:
        """List those that still run."""
        self._looked = time.monotonic()
        self._reap_adopted()
        for root in [self._me] if IS_LINUX else [self._me, *self._seen]:
            with contextlib.suppress(psutil.Error):
                self._seen.update(root.children(recursive=True))
        self._seen = {process for process in self._seen if _runs(process)}
        return list(self._seen)

    def wait_gone(self, timeout_s: float, child: subprocess.Popen[bytes], *, or_child: bool = False) -> None:
        """Wait until none is left, or with `or_child` until the child itself is gone; at most so long."""
        end = time.monotonic() + timeout_s
        while self.look() and time.monotonic() < end:
            if child.poll() is not None and or_child:
                return
            time.sleep(LOOK_EVERY_S)

    def _reap_adopted(self) -> None:
        for process in self._seen:
            if process.pid != self._child:  # the child's own exit code is subprocess's to collect
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
