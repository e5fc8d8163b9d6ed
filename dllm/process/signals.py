"""SIGTERM, SIGINT and SIGHUP: recorded when they come, obeyed at the next point where stopping is safe.

No handler raises. Python runs handlers between any two bytecodes, and an exception there may strike inside a library,
a destructor or a callback of an event loop, where it is lost or breaks what it meets. Instead:

* `check` exits if a signal has come. Progress bars call it, so that every loop of a stage is left within one item.
* `Interrupt` is a block that looks at `received` itself: an optimizer step is finished, a child is stopped first.
* `dllm.process.event_loop` cancels its coroutine.
* Where none of them is reached in time (a long computation, an import), a thread calls what `on_stop` names and ends
  the process. That is safe at any moment, as files are written so that a kill leaves them whole.

The first signal counts; later ones change nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_CODES = tuple(128 + number for number in SIGNALS)
GRACE_S = 2.0
"""From a signal to the end of a process that reaches no point where stopping is safe."""
CLOSING_S = 8.0
"""The most that the functions of `on_stop` may take."""
POLL_INTERVAL_S = 0.05

Handlers = dict[int, Any]


class _State:
    """What has come, and who waits for it: one for the process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.before: Handlers = {}
        """The handlers that ours have replaced."""
        self.wakeup: tuple[int, int] | None = None
        """The descriptor that the C handler writes to, and the one from before; None while signals are not handled."""
        self.mask: set[int] | None = None
        """The signals that were blocked before, during a fork."""
        self.received: int | None = None
        self.is_announced = False
        """Whether `listeners` have been called."""
        self.is_obeyed = False
        """Whether an exception unwinds the process already."""
        self.graces: list[float] = []
        """Of the open `Interrupt` blocks of the main thread, innermost last."""
        self.listeners: list[Callable[[], object]] = []
        self.closers: list[Callable[[], object]] = []


_state = _State()


def received() -> int | None:
    """Return the signal that has come, or None."""
    return _state.received


def check() -> None:
    """Exit if a signal has come: a point where stopping is safe.

    Does nothing beside the main thread, in a block of `Interrupt`, in an event loop, and once the exit is under way.

    Raises:
        SystemExit: 128 + the signal's number.
    """
    if (number := _pending()) is not None and not _state.graces and _in_main_thread() and not _in_event_loop():
        _obey(number)


def sleep(seconds: float) -> None:
    """Sleep, in any thread, until the time is over or a signal comes.

    Raises:
        SystemExit: 128 + the signal's number.
    """
    end = time.monotonic() + seconds
    with Interrupt() as interrupt:
        while (left := end - time.monotonic()) > 0 and interrupt.received is None:
            time.sleep(min(left, POLL_INTERVAL_S))


@contextlib.contextmanager
def handled(*although_ignored: int) -> Iterator[None]:
    """Record signals inside the block; inside another such block, and beside the main thread, do nothing.

    Leaving it restores the handlers from before. One that has come and was not obeyed is passed on to them, unless an
    exception leaves the block. Ignored signals stay ignored.

    Args:
        although_ignored: signals to record even so: shells ignore SIGINT for what they start in the background.
    """
    if _state.wakeup is not None or not _in_main_thread():
        yield
        return
    _install(although_ignored)
    try:
        yield
        if (number := _pending()) is not None:
            _obey(number)
    finally:
        _uninstall()


@contextlib.contextmanager
def on_stop(close: Callable[[], object]) -> Iterator[None]:
    """Name what is to be done, from a thread, where a signal ends the process before the block is left."""
    state = _state
    state.closers.append(close)
    try:
        yield
    finally:
        with state.lock:  # held for good once the process is being ended
            state.closers.remove(close)


@contextlib.contextmanager
def listening(listener: Callable[[], object]) -> Iterator[None]:
    """Call a function from a thread when a signal comes; at once if one has come."""
    state = _state
    with state.lock:
        state.listeners.append(listener)
        if state.is_announced and not state.is_obeyed:
            listener()
    try:
        yield
    finally:
        with state.lock:
            state.listeners.remove(listener)


@contextlib.contextmanager
def uninterrupted(grace_s: float = math.inf) -> Iterator[None]:
    """Let signals wait until the block is left, and the next `check` comes. Beside the main thread it does nothing.

    Args:
        grace_s: from a signal to the end of a process that is still in this block.
    """
    graces = _state.graces if _in_main_thread() else []
    graces.append(grace_s)
    try:
        yield
    finally:
        graces.pop()


class Interrupt:
    """A block in which signals wait until it looks at `received`; it may take as long as it needs.

    Leaving it exits if a signal has come, unless an exception leaves it. Entering it exits if one had come before.

    Args:
        grace_s: from a signal to the end of a process that is still in this block.
    """

    def __init__(self, grace_s: float = math.inf) -> None:
        self._grace_s = grace_s
        self._stack = contextlib.ExitStack()

    @property
    def received(self) -> int | None:
        """The signal that has come, or None."""
        return _pending()

    def __enter__(self) -> Interrupt:
        with contextlib.ExitStack() as stack:
            stack.enter_context(handled())
            self._obey_if_outermost()
            stack.enter_context(uninterrupted(self._grace_s))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        if error is None:
            self._obey_if_outermost()

    def deliver(self, number: int) -> NoReturn:
        """Exit as if this signal had come.

        Raises:
            SystemExit: 128 + number.
        """
        _obey(number)

    def _obey_if_outermost(self) -> None:
        if (number := _pending()) is not None and not (_state.graces and _in_main_thread()):
            _obey(number)


def _pending() -> int | None:
    return None if _state.is_obeyed else _state.received


def _obey(number: int) -> NoReturn:
    """Unwind the process, by way of the handlers from before where they are not Python's own."""
    _state.is_obeyed = True
    handler = _state.before.get(number)
    if callable(handler) and handler is not signal.default_int_handler and _in_main_thread():
        _restore(_state.before)
        signal.raise_signal(number)
    # Objects dropped half made complain from `__del__`, and nobody can act on that.
    sys.unraisablehook = lambda ignored: None
    raise SystemExit(128 + number)


def _install(although_ignored: tuple[int, ...]) -> None:
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN or number in although_ignored:
            _state.before[number] = signal.SIG_DFL if handler is None else handler
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # Written by the C handler, so the thread learns of a signal while the main thread computes in C.
    _state.wakeup = (write_end, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
    for recorded in _state.before:
        signal.signal(recorded, _record)
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def _uninstall() -> None:
    global _state
    left, _state = _state, _State()
    assert left.wakeup is not None
    write_end, wakeup_before = left.wakeup
    _restore(left.before)
    signal.set_wakeup_fd(wakeup_before)
    os.close(write_end)


def _restore(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _record(number: int, frame: FrameType | None = None) -> None:
    if _state.received is None:
        _state.received = number


def _watch(read_end: int) -> None:
    """Announce the first signal, and see to it that the process ends; a thread."""
    state = _state
    with open(read_end, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in filter(state.before.__contains__, numbers):
                state.received = state.received or number
            if state.received is not None and not state.is_announced:
                with state.lock:
                    state.is_announced = True
                    for listener in state.listeners:
                        listener()
                _end_in_time(state, state.received)


def _end_in_time(state: _State, number: int) -> None:
    """End the process unless the main thread does so by itself."""
    came = time.monotonic()
    while not state.is_obeyed and state is _state:
        if time.monotonic() - came > [GRACE_S, *state.graces][-1]:
            with state.lock:
                closing = threading.Thread(target=_close, args=(state,), daemon=True)
                closing.start()
                closing.join(CLOSING_S)
                os._exit(128 + number)
        time.sleep(POLL_INTERVAL_S)


def _close(state: _State) -> None:
    for close in reversed(state.closers):
        with contextlib.suppress(Exception):
            close()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python handles signals there only


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _hold() -> None:
    if _state.wakeup is not None:
        _state.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    if _state.mask is not None:
        mask, _state.mask = _state.mask, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forget() -> None:
    """Give a forked child the handlers from before: it shares the pipe, and is no stage of its own."""
    if _state.wakeup is not None:
        mask, _state.wakeup = _state.mask, (_state.wakeup[0], -1)
        _uninstall()
        _state.mask = mask
    _let_go()


# A signal for a child that has just been forked waits until that has its handlers.
os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
