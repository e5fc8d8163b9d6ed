"""An event loop that synchronous code runs step by step, in which no signal raises.

A signal handler that raises would raise inside whatever task runs at that moment; asyncio then reports a lost exception
of that task, and the others stay half done.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")


class EventLoop:
    """Run coroutine functions one after the other on one loop; tasks that they start go on in the next.

    A signal during `run` cancels the coroutine, and acts when that has ended. Between runs signals act as always.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine function to its end and return its result."""
        with _held(lambda: self._loop.call_soon_threadsafe(task.cancel)):
            task = self._loop.create_task(main())
            return self._loop.run_until_complete(task)

    def close(self, last: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        """Run a last coroutine function to its end, whatever signals come, and close the loop."""
        with _held(lambda: None):
            try:
                if last is not None:
                    self._loop.run_until_complete(last())
            finally:
                self._loop.close()


@contextmanager
def _held(on_signal: Callable[[], object]) -> Iterator[None]:
    """Hold SIGTERM and SIGINT back, and raise the first of them again for the handler that was there before."""
    before: dict[int, Any] = {}
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            on_signal()

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, note)
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
        if received:
            signal.raise_signal(received[0])
            raise SystemExit(128 + received[0])
