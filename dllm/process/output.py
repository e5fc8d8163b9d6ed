"""Standard output and error whose reader may go away: a closed terminal, `| head`, a flow that was killed.

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

GONE = (errno.EPIPE, errno.EIO)
"""What a write fails with: a pipe without a reader, a terminal that has been closed."""


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
            if error.errno not in GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for children too
        os.close(nowhere)
        return len(data)
