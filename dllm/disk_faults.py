"""What an error of the disk or the operating system means: whether it is full, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dllm.errors import DllmError, StageError

NO_ROOM = {
    errno.ENOSPC: "disk is full",
    errno.EDQUOT: "disk is full",
    errno.EFBIG: "file is larger than this process may write (ulimit -f)",
}
_MODES = "check owner and mode of it and of the folder it is in, and that the disk is not mounted read-only"
_SWAPPED = "remove it or move it away, or name another path"
HINTS = {
    errno.EACCES: _MODES,
    errno.EPERM: _MODES,
    errno.EROFS: _MODES,
    errno.EISDIR: f"a folder stands in place of a file: {_SWAPPED}",
    errno.EEXIST: f"a file stands in place of a folder: {_SWAPPED}",
    errno.ENOTDIR: f"a file stands in place of a folder: {_SWAPPED}",
    errno.ELOOP: f"links that lead round in a circle, or one where none is followed: {_SWAPPED}",
    errno.EMFILE: "raise the number of files a process may open: `ulimit -n 1024`",
    errno.ENFILE: "close other programs, or raise the number of open files of the machine",
    errno.ENAMETOOLONG: "move the project to a shorter path, or shorten the name",
    errno.EIO: "the disk or its connection fails: see the system's log",
    errno.ESTALE: "the network disk was mounted anew: run the same command again",
    errno.EAGAIN: "raise the number of processes a user may have: `ulimit -u`",
}
"""What to do about an error of the operating system, by its number."""
UNREADABLE = HINTS.keys() - {errno.EISDIR, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG} | {errno.ENOMEM}
"""Numbers of errors that pass with time, or with what the hint says."""


@contextmanager
def full_disk_in_one_line(
    where: Path, hint: str = "free some space and run again; finished work is kept"
) -> Iterator[None]:
    """Raise one line for a full disk that names the file, or else `where`.

    Raises:
        StageError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        copied_to = getattr(error, "filename2", None)  # else the file named is the one that was copied
        named = copied_to or getattr(error, "filename", None) or where
        raise StageError(no_room(error) or "disk is full", where=str(named), hint=hint) from None


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk or the quota is full, or a file too large for a limit."""
    return no_room(error) is not None


def no_room(error: BaseException) -> str | None:
    """Say why a file could not grow; None for any other error.

    Writers in Rust, such as those of safetensors and tokenizers, raise exceptions of their own that only quote it.
    """
    if isinstance(error, DllmError):
        return None
    if isinstance(error, OSError):
        return NO_ROOM.get(error.errno or 0)
    told = str(error)
    found = (number for number in NO_ROOM if f"(os error {number})" in told or os.strerror(number) in told)
    return NO_ROOM.get(next(found, 0))


def is_unreadable(error: BaseException) -> bool:
    """Return whether a file cannot be read now: that says nothing about what it holds, and is no reason to remake it.

    What is not there, or no file, counts as damaged instead.
    """
    return isinstance(error, OSError) and error.errno in UNREADABLE


def what_helps(error: OSError) -> str:
    """Return a hint for an error of the operating system."""
    return HINTS.get(error.errno or 0, "--debug shows the code that asked for it")
