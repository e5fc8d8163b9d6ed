"""An event loop in which no signal raises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from dllm.process import signals

GRACE_S = 10.0
"""From a signal to the end of a process whose coroutine does not end when it is cancelled."""

T = TypeVar("T")


class EventLoop:
    """An asyncio event loop in which no signal raises: one cancels the coroutine that runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function to its end and return its result.

        Raises:
            SystemExit: a signal has come; what the coroutine has returned or raised since is dropped.
        """
        with signals.Interrupt(GRACE_S) as interrupt:
            task = self._loop.create_task(main())
            with signals.listening(lambda: self._loop.call_soon_threadsafe(task.cancel)):
                try:
                    return self._loop.run_until_complete(task)
                except BaseException:
                    if (number := interrupt.received) is None:
                        raise
            interrupt.deliver(number)

    def close(self, last: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        """Run a last coroutine function to its end, whatever signals come, and close the loop."""
        with signals.handled(), signals.uninterrupted(GRACE_S):
            try:
                if last is not None:
                    self._loop.run_until_complete(last())
            finally:
                self._loop.close()
