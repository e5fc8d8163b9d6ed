"""How long OpenMP's threads spin at a barrier before they sleep."""

from __future__ import annotations

import os

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
COUNT = "10000"
"""Some tens of microseconds, as long as the serial part between two products."""


def spin_briefly() -> None:
    """Have GNU OpenMP, torch's on Linux, spin for tens of microseconds rather than milliseconds; before torch loads.

    Where another process takes one of the cores, a thread that has no core keeps all others spinning, and they keep it
    from getting one: a token of SmolLM2-135M then took 0.3 to 0.5 s. With short spins it takes 0.1 s; on an idle
    machine up to a sixteenth more than before. The user's own settings are left.
    """
    if POLICY not in os.environ:
        os.environ.setdefault(SPINS, COUNT)
