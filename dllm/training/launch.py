"""Start the ranks of one machine, and end them together: `python -m dllm train` with `train.nproc` above 1.

torchrun is not used on one machine. Its agent opens two stores that listen on all interfaces without a password, and
unpickles what lies in the first; its signal handler raises wherever the agent happens to be. Here ranks meet by a file
in a folder that only this user can read (`Join` in dllm/training/distributed.py), and nothing listens beyond loopback.
Several machines need torchrun: `Join` takes its environment as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dllm.errors import StageError
from dllm.process.parent import PARENT
from dllm.process.signals import Interrupt

STORE = "DLLM_RANKS_STORE"
"""Environment variable: the file by which the ranks of one machine meet."""
GRACE_S = 15.0
"""From SIGTERM to SIGKILL: shorter than what the launcher itself is given by a flow."""
PEER_LOST = 99
"""Exit code of a rank that ends because another one has; only the launcher sees it."""
SETTLE_S = 5.0
"""For the rank that others miss to end: closing its connections comes before that."""
POLL_INTERVAL_S = 0.05


def is_rank() -> bool:
    """Return whether this process is a rank already, started by `run` or by torchrun."""
    return "WORLD_SIZE" in os.environ


def note_ranks(nproc: int) -> None:
    """Say that the environment, and not `train.nproc`, gives the number of ranks, where the two differ."""
    world = os.environ.get("WORLD_SIZE")
    if STORE not in os.environ and world != str(nproc) and os.environ.get("RANK", "0") == "0":
        line = f"WORLD_SIZE={world} in the environment gives the number of ranks; train.nproc={nproc} has no effect"
        print(f"warning: {line}", file=sys.stderr, flush=True)


def run(argv: Sequence[str], nproc: int, grace_s: float = GRACE_S, named_by: str = "train.nproc") -> int:
    """Run a command as `nproc` ranks; return the first failed rank's exit code, 128 + n after signal n, else 0.

    A rank that fails prints one line; the others are stopped. A signal is passed on to all ranks. Errors name the
    setting or flag `named_by`.

    Raises:
        StageError: so many processes cannot be started.
        SystemExit: 128 + n after signal n, when all ranks have ended.
    """
    with Interrupt() as interrupt, tempfile.TemporaryDirectory(prefix="dllm-ranks-") as folder:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(nproc):
                ranks.append(_start(argv, rank, nproc, Path(folder) / "store"))
            failed = _wait(ranks, interrupt)
        except OSError as error:
            message = f"rank {len(ranks)} of {nproc} cannot be started: {error.strerror}"
            raise StageError(message, where=named_by, hint="start fewer ranks") from None
        finally:
            _stop(ranks, interrupt.received, grace_s)
    return 0 if failed is None else _report(failed, ranks[failed].returncode)


def _start(argv: Sequence[str], rank: int, nproc: int, store: Path) -> subprocess.Popen[bytes]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    environment = {
        "OMP_NUM_THREADS": "1",  # as torchrun sets it; on CPUs the ranks divide the cores themselves
        **os.environ,
        **{name: str(value) for name, value in numbers.items()},
        STORE: str(store),
        PARENT: str(os.getpid()),
    }
    return subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], interrupt: Interrupt) -> int | None:
    """Wait until all ranks have ended, one has failed, or a signal has come; return the one that failed.

    One that only misses a peer is returned if none fails otherwise within `SETTLE_S`.
    """
    missing_since: float | None = None
    while interrupt.received is None:
        codes = [rank.poll() for rank in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code not in (None, 0, PEER_LOST)]:
            return failed[0]
        if PEER_LOST in codes:
            missing_since = missing_since or time.monotonic()
            if None not in codes or time.monotonic() - missing_since > SETTLE_S:
                return codes.index(PEER_LOST)
        elif None not in codes:
            break
        time.sleep(POLL_INTERVAL_S)
    return None


def _stop(ranks: Sequence[subprocess.Popen[bytes]], received: int | None, grace_s: float) -> None:
    """Stop the ranks that still run: the signal received, else SIGTERM; SIGKILL after the grace period."""
    for rank in ranks:
        rank.send_signal(received or signal.SIGTERM)
    end = time.monotonic() + grace_s
    for rank in ranks:
        try:
            rank.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _report(rank: int, code: int) -> int:
    """Return the exit code of a failed rank, and print the line that it could not print itself."""
    if code == PEER_LOST:
        line, code = "the connection between ranks was lost; start again", StageError.exit_code
    elif code < 0:
        line = f"rank {rank} was killed by signal {-code}; unless it was sent on purpose, memory may have run out"
        code = 128 - code
    else:
        return code
    print(f"dllm: {line}", file=sys.stderr, flush=True)
    return code
