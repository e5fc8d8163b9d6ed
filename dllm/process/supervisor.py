"""The parent of a child: a small process that ensures that no process of the child's tree outlives the caller.

`dllm.process.children.run` starts this file by its path. A signal reaches one process group, and engines, servers and
torchrun's ranks have sessions of their own, so a caller that dies or kills a group leaves them behind. The supervisor
adopts orphans (a subreaper, on Linux), detects the death of its caller by a pipe that closes, and always stops the tree
in the same order: SIGTERM to the child's group, then to its remaining descendants, a grace period, SIGKILL to all that
are left.
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
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND_GRACE_S = 5.0
POLL_INTERVAL_S = 0.1
SCAN_INTERVAL_S = 5.0
"""Between scans of the process table while the child runs; each takes milliseconds of one core."""


def main(arguments: list[str]) -> int:
    """Run `argv` until it ends, the pipe closes, or SIGTERM arrives; return its exit code once its tree has ended.

    Args:
        arguments: descriptor of the pipe, grace period in seconds, then the child's argv.
    """
    pipe, grace_s, argv = int(arguments[0]), float(arguments[1]), arguments[2:]
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop = _Stop()
    try:
        child = subprocess.Popen(
            argv, start_new_session=True, stdin=subprocess.DEVNULL, preexec_fn=_end_with_supervisor
        )
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127
    tree = _Tree(child.pid)
    while child.poll() is None and not stop.requested:
        if select.select([pipe], [], [], POLL_INTERVAL_S)[0]:  # readable only when the caller's end is closed
            stop.requested = True
        tree.scan_if_due()
    if stop.requested:
        end = time.monotonic() + grace_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        tree.wait_ended(grace_s, child, or_child=True)
        # Processes in other sessions have no SIGTERM yet if the child did not forward it.
        _signal(tree.scan(), signal.SIGTERM)
        tree.wait_ended(end - time.monotonic(), child)
    elif tree.scan():
        _signal(tree.scan(), signal.SIGTERM)
        tree.wait_ended(LEFT_BEHIND_GRACE_S, child)
    while left := tree.scan():
        _signal(left, signal.SIGKILL)
        tree.wait_ended(1.0, child)
    code = child.wait()
    _reap_all()
    return 128 - code if code < 0 else code


def _end_with_supervisor() -> None:
    """Ask for SIGTERM if even this process is killed outright; run in the child, before its program."""
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class _Stop:
    requested = False

    def __init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True


class _Tree:
    """All descendants of the child, also those whose parents have died."""

    def __init__(self, child: int) -> None:
        self._child = child
        self._me = psutil.Process()
        self._seen: set[psutil.Process] = set()
        self._scanned = time.monotonic()

    def scan_if_due(self) -> None:
        """Record descendants, for systems where orphans cannot be adopted, and reap adopted ones, every few seconds."""
        if time.monotonic() - self._scanned > SCAN_INTERVAL_S:
            self.scan()

    def scan(self) -> list[psutil.Process]:
        """Scan the process table, reap adopted processes that have ended, and list those that still run."""
        self._scanned = time.monotonic()
        for root in [self._me] if IS_LINUX else [self._me, *self._seen]:
            with contextlib.suppress(psutil.Error):
                self._seen.update(root.children(recursive=True))
        for process in self._seen:
            # Also those that had ended before they were adopted. subprocess collects the child's exit code.
            if process.pid != self._child:
                with contextlib.suppress(ChildProcessError):  # its parent is still there
                    os.waitpid(process.pid, os.WNOHANG)
        self._seen = {process for process in self._seen if _runs(process)}
        return list(self._seen)

    def wait_ended(self, timeout_s: float, child: subprocess.Popen[bytes], *, or_child: bool = False) -> None:
        """Wait at most `timeout_s` until none is left, or with `or_child` until the child itself has ended."""
        end = time.monotonic() + timeout_s
        while self.scan() and time.monotonic() < end:
            if child.poll() is not None and or_child:
                return
            time.sleep(POLL_INTERVAL_S)


def _reap_all() -> None:
    """Reap what has ended since the last scan, so that no zombie is left to init."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


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
