"""Not outliving a parent that is killed outright: Linux sends SIGTERM when it dies; elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PARENT = "DLLM_PARENT"
"""Environment variable: process number of the parent that this process must not outlive."""
FORGETFUL = {"DVC_STAGE", "TORCHELASTIC_RUN_ID"}
"""Environment variables of parents that leave their children behind when they are killed outright: dvc and torchrun."""


def follow_parent() -> None:
    """End with the parent where it leaves its children behind: dvc, torchrun, or one that says so by `PARENT`.

    Call it from the main thread once signals are handled.
    """
    parent = os.environ.pop(PARENT, None)  # not for children of this process
    if sys.platform != "linux" or not (parent or FORGETFUL & os.environ.keys()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent and parent != str(os.getppid()):  # it has died before
        with contextlib.suppress(OSError):
            print(f"dllm: stopped: {PARENT} names no parent that lives: {parent[:20]!r}", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)
