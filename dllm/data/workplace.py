"""A folder that a process works in: nobody else's meanwhile, and a full disk there is one line."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dllm.errors import StageError

LOCK = ".lock"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it ends with the process, however that ends.

    Raises:
        StageError: another process holds it; its number is named.
    """
    with (folder / LOCK).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise StageError(
                f"another process works on this (pid {stream.read().strip() or 'unknown'})",
                where=str(folder),
                hint="wait for it, or stop it",
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


@contextmanager
def full_disk_is_one_line(where: Path) -> Iterator[None]:
    """Turn a full disk into one line that names the file, or else `where`.

    Raises:
        StageError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        hint = "free some space and run again; finished work is kept"
        raise StageError("disk is full", where=str(error.filename or where), hint=hint) from None
