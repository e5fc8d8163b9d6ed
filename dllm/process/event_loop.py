"""An event loop that synchronous code runs step by step, and that signals end in order.

A signal handler that raises would raise inside whatever task runs at that moment; asyncio then reports a lost exception
of that task, and the others stay half done.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class EventLoop:
    """Run coroutines one after the other on one loop; tasks that they start go on in the next.

    SIGTERM or SIGINT during a step cancels the step. The signal is raised again, for the handler that was there before,
    once all tasks are cancelled and the loop is closed. Between steps signals act as they always do.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._received: int | None = None

    def run(self, step: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end.

        Raises:
            asyncio.CancelledError: a signal came; leave the `with` block.
        """
        loop = self._runner.get_loop()
        task = loop.create_task(step)

        def cancel(number: int, frame: FrameType | None) -> None:
            if self._received is None:
                loop.call_soon_threadsafe(task.cancel)
            self._note(number, frame)

        with _handled_by(cancel):
            result = loop.run_until_complete(task)
        if self._received is not None:
            raise asyncio.CancelledError
        return result

    def __enter__(self) -> EventLoop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _handled_by(self._note):
            self._runner.close()
        if self._received is not None:
            signal.raise_signal(self._received)
            raise SystemExit(128 + self._received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """Handle SIGTERM and SIGINT by a function, unless they are ignored or this is not the main thread."""
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
