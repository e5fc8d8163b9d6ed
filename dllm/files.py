"""Files and folders: written atomically, and locked by one process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dllm.errors import StageError

AT_FDCWD = -100
RENAME_EXCHANGE = 2
LOCK = ".lock"


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it.

    A file of that name is replaced, not changed: what was published by hard link keeps its content.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)  # of a link, what it points to would be written
    with aside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end it is flushed to disk and renamed.

    For libraries that write to a path. Two processes may write the same file: the last one stays, whole.
    """
    aside = aside_of(path)
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def atomic_link(source: Path, path: Path) -> None:
    """Link a file to a second path in one step: a hard link, or a copy where links are impossible.

    Raises:
        FileNotFoundError: there is no such file.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    source = source.resolve(strict=True)
    try:
        os.link(source, aside)
    except OSError:  # another disk, one without links; what else may be wrong, the copy will say
        shutil.copyfile(source, aside)
        _sync(aside)
    aside.replace(path)
    aside.unlink(missing_ok=True)  # still there where both were links to one file: then replacing does nothing
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end it is flushed to disk and becomes `path` in one step.

    A reader, or a kill at any moment, sees the old folder or the new one. An exception inside leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in left_overs(path):
        if left_over.is_dir() and not left_over.is_symlink():
            with _held(left_over) as is_left:
                if is_left:
                    shutil.rmtree(left_over, ignore_errors=True)
    aside = aside_of(path)
    aside.mkdir()
    try:
        with _held(aside):  # so that no other process takes it for left over
            yield aside
            for each in [*aside.rglob("*"), aside]:
                _sync(each)
            _swap(aside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def left_overs(path: Path) -> list[Path]:
    """Return what is beside a path by a name of ours: a killed process's, or what a living one fills now.

    Whatever else begins with that name is the user's.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}(-journal|-wal|-shm)?")
    return [each for each in path.parent.iterdir() if ours.fullmatch(each.name)]


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it is released when the process ends, however it ends.

    Raises:
        StageError: another process holds it; its number is named. Or what stands there is no lock.
    """
    with open_lock(folder / LOCK) as stream:
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


def open_lock(path: Path) -> TextIO:
    """Open a file to lock, made where it is missing, and leave what it holds.

    Raises:
        StageError: a link stands there, or no file: it would be changed in place of a lock.
    """
    return os.fdopen(_open_unlinked(path, 0, "the lock", "remove it"), "r+")


def open_to_append(path: Path) -> int:
    """Open a file to read it and append to it, made where it is missing; return its descriptor.

    Raises:
        StageError: a link stands there, or no file: what it leads to, which is no file of ours, would be changed.
    """
    hint = "move it away, or put a copy of the file in its place"
    return _open_unlinked(path, os.O_APPEND, "a file that is appended to", hint)


def _open_unlinked(path: Path, flags: int, what: str, hint: str) -> int:
    # Not blocked by a pipe that stands there, which is no file either.
    flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    no_file = StageError(f"a link, or no file, stands in place of {what}", where=str(path), hint=hint)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise no_file from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise no_file
    return descriptor


def refuse_pipes() -> None:
    """Let this process open no named pipe in place of a file, from now on: reading one waits for ever.

    Pipes that a shell has made (`<(zcat rows.gz)`), and those opened without blocking, stay usable.
    """
    sys.addaudithook(_refuse_pipe)


def _refuse_pipe(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open":
        return
    path, _, flags = arguments
    if not isinstance(path, str | bytes) or (isinstance(flags, int) and flags & os.O_NONBLOCK):
        return
    name = os.fsdecode(path)
    try:
        is_pipe = stat.S_ISFIFO(Path(name).stat().st_mode) and not name.startswith(("/dev/", "/proc/"))
    except (OSError, ValueError):
        return
    if is_pipe:
        raise OSError(errno.EINVAL, "a pipe stands in place of a file", name)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder itself; yield whether that was possible: not where another holds it, or on a disk without."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        is_ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)


def aside_of(path: Path) -> Path:
    """Return a new name beside a path, for what is to become it: files of two processes never mix."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _swap(new: Path, old: Path) -> None:
    if not old.exists():
        new.rename(old)
    elif not _exchange(new, old):  # where the system has no exchange: two renames, the old folder is kept until the end
        retired = aside_of(old)
        old.rename(retired)
        new.rename(old)
        shutil.rmtree(retired)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
