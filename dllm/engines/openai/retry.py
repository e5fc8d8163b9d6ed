"""When to ask again, and when to stop asking.

Owns the kinds of fault, the pauses between tries of a request, what Retry-After means, and the share of refused
requests that a run bears.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from email.utils import parsedate_to_datetime
from typing import Literal

from dllm.errors import ServerError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
JITTER_S = 0.1
"""Spread over which requests come back that were sent away for the same time."""
WINDOW, FEWEST = 200, 20
"""Latest requests whose fate is watched, and how many it takes to judge."""

FaultKind = Literal["unreached", "outage", "slow", "busy", "odd", "absent", "lie"]
"""What a failed try says. `unreached`: nothing was sent; `outage`: the server broke down over it; `slow`: it took too
long; `busy`: it asks to come back; `odd`: it answered something of no use; `absent`: it does not know the path or the
model; `lie`: another model answered."""
BLAMED: tuple[FaultKind, ...] = ("unreached", "outage", "slow")
"""Kinds that count against the server."""
FREE: tuple[FaultKind, ...] = ("unreached", "absent", "lie")
"""Kinds that are never the request's doing, so that they cost it none of its tries."""
COSTLY: tuple[FaultKind, ...] = ("slow", "odd")
"""Kinds that may well be the request's doing: they cost it a try even where another server is left to ask."""


class Fault(Exception):
    """A failed try of a request that may go well another time or elsewhere.

    Args:
        reason: one line.
        kind: whose doing it is.
        retry_after_s: the pause the server asks for, in seconds.
    """

    def __init__(self, reason: str, kind: FaultKind, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.retry_after_s = reason, kind, retry_after_s


class Refused(Exception):
    """The server refuses this one request, and would do so again; its text is the reason, in one line."""


def pause_s(pauses: int, retry_after_s: float | None, longest_s: float) -> float:
    """Draw the pause before the next try of a request. Units: seconds.

    Without a word from the server it lies anywhere between nothing and a bound that doubles with every pause.

    Args:
        pauses: those the request has had.
        longest_s: the longest pause a server may ask for.
    """
    if retry_after_s is not None:
        return min(retry_after_s, longest_s) + random.uniform(0, JITTER_S)
    return random.uniform(0, min(FIRST_PAUSE_S * 2 ** min(pauses, 16), LONGEST_PAUSE_S))


def retry_after_s(header: str | None) -> float | None:
    """Read a Retry-After header: seconds or an HTTP date; None where it is absent or makes no sense. Units: seconds."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class Outcomes:
    """The fate of the latest requests.

    Args:
        max_failure_rate: the share of refused ones that is still borne.
    """

    def __init__(self, max_failure_rate: float) -> None:
        self._limit = max_failure_rate
        self._latest: deque[bool] = deque(maxlen=WINDOW)
        self._last_reason = ""

    def add(self, reason: str | None) -> None:
        """Note an answer (None) or a refusal (its reason)."""
        self._latest.append(reason is not None)
        self._last_reason = reason or self._last_reason

    def check(self) -> None:
        """Stop a run that goes wrong.

        Raises:
            ServerError: too large a share was refused; it says the share and the latest reason.
        """
        refused, seen = sum(self._latest), len(self._latest)
        if seen >= FEWEST and refused > self._limit * seen:
            raise ServerError(
                f"{refused} of the latest {seen} requests were refused, the last one because: {self._last_reason}",
                where=f"regenerate.max_failure_rate: {self._limit:g}",
                hint="finished answers are kept; mend the cause and run this again, or allow a larger share",
            )
