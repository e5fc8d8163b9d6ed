"""SIGTERM and SIGINT, held back until the running optimizer step is done and saved."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Note signals instead of dying of them; `deliver` hands one on to whoever listened before."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()
        if self.received is not None and error is None:  # it came after the last step had looked
            self.deliver(self.received)

    def deliver(self, number: int) -> None:
        """Give the old handlers their place back and raise the signal for them; end as the signal asks if none act.

        Raises:
            SystemExit: 143 for SIGTERM, 130 for SIGINT, where the old handler let the process live.
        """
        self._restore()
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            signal.raise_signal(number)
        raise SystemExit(128 + number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
