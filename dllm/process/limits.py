"""Time and memory limits for code that comes with data, such as chat templates: it may never return."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

MEMORY_BYTES = 1 << 30
"""Memory that such code may take beyond what the process has."""
_STATM = Path("/proc/self/statm")


class OverLimit(BaseException):
    """The code took longer, or more memory, than it may; the message says which, to follow its name.

    No Exception: code that runs within limits must not catch it.
    """


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what runs inside after a time, or when it takes MEMORY_BYTES more.

    What runs inside must have no side effect, since it is stopped between any two bytecodes. The time holds in the main
    thread only, as Python runs signal handlers there; the memory where the system tells how much the process has.

    Raises:
        OverLimit: it was stopped.
    """
    is_running = True

    def stop(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise OverLimit(f"does not end within {seconds:g} s")

    is_main = threading.current_thread() is threading.main_thread()
    handler: Any = signal.signal(signal.SIGALRM, stop) if is_main else None
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0) if is_main else (0.0, 0.0)
    bounds = resource.getrlimit(resource.RLIMIT_AS)
    try:
        _bound_memory(bounds)
        yield
    except MemoryError:
        raise OverLimit(f"takes more than {MEMORY_BYTES >> 30} GiB of memory") from None
    finally:
        is_running = False
        resource.setrlimit(resource.RLIMIT_AS, bounds)
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)


def _bound_memory(bounds: tuple[int, int]) -> None:
    try:
        pages = int(_STATM.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    if bounds[0] == resource.RLIM_INFINITY or most < bounds[0]:
        resource.setrlimit(resource.RLIMIT_AS, (most, bounds[1]))
