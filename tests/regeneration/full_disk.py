"""A disk that is full after some answers were written down."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def full_disk_after(answers: int) -> Iterator[None]:
    """Let every journal line after the first so many meet a full disk."""
    real, written = os.write, 0

    def full(file: int, data: bytes) -> int:
        nonlocal written
        if data.startswith(b'["'):
            written += 1
            if written > answers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        yield
