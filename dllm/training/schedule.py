"""The learning rate at each optimizer step."""

from __future__ import annotations

import math


def lr_factor(step: int, total: int, *, schedule: str, warmup_ratio: float) -> float:
    """Return what the peak rate is multiplied by at optimizer step `step` (0-based) of `total`.

    Rises linearly over the first int(warmup_ratio * total) steps, reaching 1 at the last of them; then `cosine` falls
    towards 0 and `constant` stays.

    Source: DFlash, appendix A.1 (cosine, 4 % warm-up).
    """
    warmup = int(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
