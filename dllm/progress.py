"""Progress of a stage: a bar on a terminal, a line every few seconds elsewhere, with rate and time left."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dllm.process import signals

if TYPE_CHECKING:
    import rich.progress

LINE_EVERY_S = 5.0


class Progress:
    """Count work done out of a total.

    Args:
        name: what is under way, e.g. the stage.
        total: how much there is, or None where nobody knows.
        unit: plural noun for what is counted.
        initial: part of the total done by an earlier, killed call; left out of the rate.
        shown: False counts silently (ranks above 0).
        stream: where lines go; the error stream by default.
    """

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = "items",
        *,
        initial: float = 0,
        shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.initial, self.shown = name, total, unit, initial, shown
        self.stream = stream or sys.stderr
        self.done = float(initial)
        self._printed: float | None = None
        self._extra: dict[str, object] = {}
        self._left_s: float | None = None
        self._bar: rich.progress.Progress | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if self.shown and self.stream.isatty():
            self._open_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self.shown and self._printed != self.done:
            self._print_line()

    def update(self, n: float = 1, left_s: float | None = None, **extra: object) -> None:
        """Add `n` to the work done; 0 updates the time only. A point where stopping is safe.

        Args:
            left_s: time left, in seconds, where the caller knows better than the rate.
            extra: such as loss=1.23; shown from now on.

        Raises:
            SystemExit: a signal has come.
        """
        signals.check()
        self.done += n
        self._left_s = left_s
        self._extra.update(extra)
        if self._bar is not None:
            task = self._bar.task_ids[0]
            rate, left, others = self._rate_text(), self._left_text(), self._extra_text()
            self._bar.update(task, completed=self.done, rate=rate, left=left, extra=others)
        elif self.shown and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    @property
    def rate(self) -> float:
        """Work a second since this call began.

        Units: `unit` a second.
        """
        elapsed = time.monotonic() - self._start
        return (self.done - self.initial) / elapsed if elapsed > 0 else 0.0

    def _open_bar(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:g}" + ("/{task.total:g} " if self.total else " ") + self.unit),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TextColumn("{task.fields[extra]}"),
            progress.TextColumn("{task.fields[left]}"),
            console=Console(file=self.stream),
        )
        task = self._bar.add_task(self.name, total=self.total, rate="", left="", extra="")
        self._bar.update(task, completed=self.done)
        self._bar.start()

    def _rate_text(self) -> str:
        if 0 < self.initial == self.done == self.total:
            return "from earlier work"
        return f"{self.rate:.3g} {self.unit}/s" if self.rate < 1000 else f"{self.rate:,.0f} {self.unit}/s"

    def _left_text(self) -> str:
        left_s = self._left_s
        if left_s is None and self.total is not None and self.rate > 0:
            left_s = (self.total - self.done) / self.rate
        return "" if left_s is None else f"{clock(left_s)} left"

    def _extra_text(self) -> str:
        return "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in self._extra.items()
        )

    def _print_line(self) -> None:
        self._last_line, self._printed = time.monotonic(), self.done
        parts = [f"{self.name}: {self.done:g}"]
        if self.total is not None:
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            parts = [f"{self.name}: {self.done:g}/{self.total:g} {self.unit}{share}"]
        parts.append(self._rate_text())
        if left := self._left_text():
            parts.append(left)
        if self._extra:
            parts.append(self._extra_text())
        print("  ".join(parts), file=self.stream, flush=True)


class Lines:
    """Print the lines of another process; on a terminal a line of progress is drawn over the one before it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal, self._is_open = self._stream.isatty(), False

    def show(self, line: str, *, is_progress: bool) -> None:
        """Print a line, or draw it over the line of progress that is there."""
        if not self._is_terminal:
            print(line, file=self._stream, flush=True)
            return
        start = "\r\x1b[2K" if is_progress and self._is_open else "\n" if self._is_open else ""
        if is_progress:  # a folded line could not be drawn over
            line = line[: shutil.get_terminal_size().columns - 1]
        print(start + line, end="" if is_progress else "\n", file=self._stream, flush=True)
        self._is_open = is_progress

    def end(self) -> None:
        """End a line of progress that is there."""
        if self._is_open:
            print(file=self._stream, flush=True)
        self._is_open = False


def clock(seconds: float) -> str:
    """Format a duration as 42s, 3m05s or 2h07m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
