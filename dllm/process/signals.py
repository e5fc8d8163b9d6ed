"""SIGTERM and SIGINT: exit by an exception, finish a step first, or stop an event loop first.

Python runs signal handlers between two bytecodes of the main thread. An exception raised there unwinds `with` blocks
and `finally`, which is what a stage needs. In two places it does harm: amid an optimizer step, which is worth
finishing (`Interrupt`), and in a callback of an event loop, which prints the exception and drops it (`EventLoop`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import asyncio

SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


def leave(number: int, frame: FrameType | None = None) -> NoReturn:
    """Exit as a signal asks; a signal handler.

    Raises:
        SystemExit: 128 + number.
    """
    # Objects dropped half made, such as an event loop, complain from `__del__`, and nobody can act on that.
    sys.unraisablehook = lambda ignored: None
    raise SystemExit(128 + number)


def exit_on(*numbers: int) -> None:
    """Make each of these signals raise SystemExit in the main thread, each time it comes."""
    for number in numbers:
        signal.signal(number, leave)


@contextlib.contextmanager
def signals_exit() -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into SystemExit; ignore later ones until the block is left."""

    def once(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        leave(number)

    try:
        before = {number: signal.signal(number, once) for number in SIGNALS}
    except ValueError:  # Python handles signals in the main thread only
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """Record signals instead of exiting; `deliver` passes one to the handler that was there before.

    Leaving the block delivers the signal that was received, unless an exception leaves it.

    Args:
        numbers: the signals.
        on_signal: called in the handler.
    """

    def __init__(self, numbers: Sequence[int] = SIGNALS, on_signal: Callable[[], object] | None = None) -> None:
        self.received: int | None = None
        self._numbers, self._on_signal = numbers, on_signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()
        if self.received is not None and error is None:  # it came after the last step had looked
            self.deliver(self.received)

    def deliver(self, number: int) -> None:
        """Restore the previous handlers and raise the signal for them; exit if they do not.

        Raises:
            SystemExit: 143 for SIGTERM, 130 for SIGINT, where the previous handler let the process live.
        """
        self._restore()
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            signal.raise_signal(number)
        raise SystemExit(128 + number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._on_signal is not None:
            self._on_signal()


class EventLoop:
    """An asyncio event loop in which no signal raises; the previous handlers run once it stands still.

    A signal that comes during `run` cancels the coroutine, and is delivered when that has ended. Between runs signals
    have the handlers of the caller. Ignored ones stay ignored.
    """

    def __init__(self) -> None:
        import asyncio  # 25 ms, which a start of the command line need not take

        with _held():
            self._loop = asyncio.new_event_loop()

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function to its end and return its result."""
        task: asyncio.Task[T] | None = None

        def cancel() -> None:
            if task is not None:
                self._loop.call_soon_threadsafe(task.cancel)

        with _held(cancel) as held:
            task = self._loop.create_task(main())
            if held.received is not None:  # before there was a task to cancel
                task.cancel()
            try:
                return self._loop.run_until_complete(task)
            except BaseException:
                if held.received is None:
                    raise
        raise AssertionError("leaving the block has delivered the signal")

    def close(self, last: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        """Run a last coroutine function to its end, whatever signals come, and close the loop."""
        with _held():
            try:
                if last is not None:
                    self._loop.run_until_complete(last())
            finally:
                self._loop.close()


def _held(on_signal: Callable[[], object] | None = None) -> Interrupt:
    is_main = threading.current_thread() is threading.main_thread()  # Python handles signals there only
    return Interrupt([n for n in SIGNALS if is_main and signal.getsignal(n) is not signal.SIG_IGN], on_signal)
