"""Huge pages for tensors: malloc asks for them, if it is told to before the process starts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Start this command anew, as the same process, with huge pages; once, and only where malloc is glibc's.

    A step on a CPU allocates and frees gigabytes. In pages of 4 kB they cost faults and misses in the TLB: an eighth of
    a step of a small draft. To keep what is freed (mallopt) avoids the faults, but splits the heap into ever more
    pieces: after a hundred steps a seventh of the processor time searched them. The kernel may refuse huge pages; then
    nothing changes.
    """
    given = os.environ.get(TUNABLES, "")
    if HUGE in given or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    os.environ[TUNABLES] = ":".join(filter(None, [given, f"{HUGE}=1"]))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
