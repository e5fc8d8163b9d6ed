"""Standard output and error that may be closed, and whose reader may go away: a closed terminal, `| head`, a flow.

Without this, Python raises BrokenPipeError at the next line and the stage fails, possibly just before it writes the
checkpoint that a signal of the same event has asked for.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

STDERR = 2
STREAMS = {1: "standard output", STDERR: "standard error"}
GONE = (errno.EPIPE, errno.EIO)
"""What a write fails with: a pipe without a reader, a terminal that has been closed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The same of a file that cannot grow: progress that is lost on standard error fails no stage."""


def open_closed() -> None:
    """Open standard streams that a caller has closed (`>&-`) to nowhere; call it before anything else is opened.

    The next file, a database or a pipe, would take the free number, and get what a library or a child prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, so this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def outlive_readers() -> None:
    """Let lines to standard output and error go nowhere once nobody reads them, and replace what they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper or isinstance(getattr(stream.buffer, "raw", None), _Stream):
            continue  # a test runner's, or ours already
        with contextlib.suppress(OSError):
            stream.flush()
        buffer: Any = io.BufferedWriter(_Stream(stream.fileno(), "wb", closefd=False))
        at_once = stream.line_buffering or stream.write_through
        # A terminal without Greek letters must not fail either.
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors="replace", line_buffering=at_once))


class _Stream(io.FileIO):
    """A file that swallows everything once its reader is gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in FULL and self.fileno() == STDERR:
                return len(data)
            if error.errno not in GONE:  # named: the disk of the file it goes to may be another than the work's
                raise OSError(error.errno, error.strerror, STREAMS.get(self.fileno())) from None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for children too
        os.close(nowhere)
        return len(data)
