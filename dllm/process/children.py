"""Run a child process in its own session, with its output line by line, a deadline, and no orphans.

`dllm/process/supervisor.py` is its parent and stops it. `run` waits for the child; `background` runs it concurrently.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from dllm.errors import StageError
from dllm.process.signals import Interrupt
from dllm.secrets import hide

GRACE_S = 20.0
"""From SIGTERM to SIGKILL: longer than the launcher of ranks gives them (15 s), shorter than Prefect's own (30 s)."""
SUPERVISOR_MARGIN_S = 8.0
POLL_INTERVAL_S = 0.2
TAIL_LINES = 50
SUPERVISOR = Path(__file__).with_name("supervisor.py")
LINE_END = re.compile(r"\r\n|\n|\r(?!$)")


@dataclass(frozen=True)
class Result:
    """How a child ended."""

    code: int
    """Exit code; 128 + n where signal n ended it."""
    seconds: float
    tail: tuple[str, ...]
    """The last lines of its output."""


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    deadline_s: float | None = None,
    log: Callable[[str], object] | None = None,
    log_file: Path | None = None,
    grace_s: float = GRACE_S,
) -> Result:
    """Run a program to its end and pass on its lines, both streams merged, as they are written.

    A signal stops the whole process tree before it takes effect here, and any exception before it propagates. So does
    the death of the caller.

    Args:
        argv: the program and its arguments; no shell.
        env: variables added to this process's environment.
        deadline_s: seconds after which the tree is stopped.
        log: called with every line; secrets in it are hidden.
        log_file: every line is appended to it.
        grace_s: from SIGTERM to SIGKILL.

    Raises:
        StageError: the program cannot be found, or the deadline has passed.
        SystemExit: a signal has come, and the handlers from before have raised nothing else.
    """
    with Interrupt() as interrupt, _running, contextlib.ExitStack() as stack:
        child = _start(stack, argv, env, cwd, log, log_file, grace_s)
        child.read_lines(deadline_s, lambda: interrupt.received is not None)
        if not child.ended and interrupt.received is None:
            raise StageError(f"stopped after its deadline of {deadline_s:g} s", where=" ".join(argv))
    return child.result()


def is_running() -> bool:
    """Return whether `run` is under way in some thread."""
    return _running.count > 0


class _Count:
    """How many threads are in a block."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1


_running = _Count()


class Background(Protocol):
    """A child that runs concurrently with its caller."""

    @property
    def ended(self) -> bool:
        """Whether it has ended."""

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines of its output so far."""

    def result(self) -> Result:
        """Wait for its end and its last line.

        Raises:
            OSError: a line could not be passed on (the disk is full, say), so the child was stopped.
        """


@contextlib.contextmanager
def background(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Callable[[str], object] | None = None,
    log_file: Path | None = None,
    grace_s: float = GRACE_S,
) -> Iterator[Background]:
    """Run a program for as long as the `with` block lasts; a thread passes on its lines.

    The program's process tree is stopped when the block is left and when the caller dies. Arguments as for `run`.

    Raises:
        StageError: the program cannot be found.
    """
    with contextlib.ExitStack() as stack:
        child = _start(stack, argv, env, cwd, log, log_file, grace_s)
        child.start_reader()
        yield child


def _start(
    stack: contextlib.ExitStack,
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    cwd: Path | None,
    log: Callable[[str], object] | None,
    log_file: Path | None,
    grace_s: float,
) -> _Child:
    """Start a program that is stopped when the stack is closed."""
    environment = {**os.environ, **(env or {})}
    if shutil.which(argv[0], path=environment.get("PATH")) is None:
        raise StageError(f"program {argv[0]!r} not found", where="PATH", hint="run `make setup`")
    sinks: list[Callable[[str], object]] = [] if log is None else [log]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(log_file.open("a", buffering=1))
        sinks.append(lambda line: stream.write(line + "\n"))
    return stack.enter_context(_Child(argv, environment, cwd, grace_s, sinks))


class _Child:
    """The supervisor's process and its merged output."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None,
        grace_s: float,
        sinks: Sequence[Callable[[str], object]],
    ) -> None:
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._grace_s = grace_s
        self._sinks: list[Callable[[str], object]] = [self._tail.append, *sinks]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""
        self._reader: threading.Thread | None = None
        self._failure: OSError | None = None
        self._began = time.monotonic()
        # never written to: the supervisor sees it close when this process has died
        read_end, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(SUPERVISOR), str(read_end), str(grace_s), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                pass_fds=[read_end],
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read_end)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def tail(self) -> tuple[str, ...]:
        return tuple(self._tail)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def result(self) -> Result:
        code = self._process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._failure is not None:
            raise self._failure
        return Result(128 - code if code < 0 else code, self.seconds, self.tail)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if error is not None:  # of a sink, it may be, which would raise again before the child has ended
            self._sinks = [self._tail.append, *map(_without_errors, self._sinks[1:])]
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            timeout_s = self._grace_s + SUPERVISOR_MARGIN_S
            if self._reader is None:
                self.read_lines(self.seconds + timeout_s)
            else:
                self._reader.join(timeout_s)
        if not self.ended:  # the supervisor hangs, and nothing else can be done from here
            self._process.kill()
        self._process.wait()
        os.close(self._lifeline)
        if self._reader is not None:
            self._reader.join(SUPERVISOR_MARGIN_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start_reader(self) -> None:
        """Pass lines to the sinks from a thread until the child has ended."""
        self._reader = threading.Thread(target=self._read_or_stop, name="child's lines", daemon=True)
        self._reader.start()

    def _read_or_stop(self) -> None:
        try:
            self.read_lines(None)
        except OSError as error:  # a child whose output nobody reads would block once the pipe is full
            self._failure = error
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            self._sinks = self._sinks[:1]
            self.read_lines(None)

    def read_lines(self, until_s: float | None, is_cut: Callable[[], bool] = lambda: False) -> None:
        """Pass lines to the sinks until the supervisor has ended, `is_cut`, or `until_s` seconds since the start."""
        while True:
            over = self.ended  # before reading: what was written before the end is still read
            while select.select([self._output], [], [], 0 if over else POLL_INTERVAL_S)[0]:
                block = os.read(self._output, 65536)
                if not block:
                    over = self._process.wait() is not None
                    break
                self._split(self._decoder.decode(block))
                if is_cut() or (until_s is not None and self.seconds > until_s):
                    break
            if over:
                break
            if is_cut() or (until_s is not None and self.seconds > until_s):
                return
        self._split(self._decoder.decode(b"", final=True) + "\n" if self._partial else "")

    def _split(self, text: str) -> None:
        *lines, self._partial = LINE_END.split(self._partial + text)
        for line in map(hide, lines):
            for sink in self._sinks:
                sink(line)


def _without_errors(sink: Callable[[str], object]) -> Callable[[str], None]:
    """Return a sink that passes over what another raises; that may be Prefect's signals, which are no Exception."""

    def pass_on(line: str) -> None:
        with contextlib.suppress(BaseException):
            sink(line)

    return pass_on


def children() -> set[psutil.Process]:
    """List the descendants of this process."""
    return set(psutil.Process().children(recursive=True))


def stop_children(spare: Collection[psutil.Process] = (), grace_s: float = 5.0) -> None:
    """Stop the descendants of this process except `spare`: SIGTERM, a grace period, SIGKILL."""
    ours = children() - set(spare)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for each in ours:
            with contextlib.suppress(psutil.Error):
                each.send_signal(number)
        ours = set(psutil.wait_procs(ours, timeout=grace_s)[1])
