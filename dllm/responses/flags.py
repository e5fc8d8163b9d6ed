"""Flags: defects of a response that can be detected from its ids.

A flagged row is kept unless `regenerate.drop` names the flag; each flag is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LENGTH, EMPTY, REPETITION, TOOL_MISMATCH = "length", "empty", "repetition", "tool_mismatch"
OVERLONG = "overlong"
FLAGS = (LENGTH, EMPTY, REPETITION, TOOL_MISMATCH, OVERLONG)
GIVEN = (TOOL_MISMATCH, OVERLONG)
"""`length`: cut at max_new_tokens; `empty`: no text and no call; `repetition`: it ends in a loop; `tool_mismatch`: the
results that follow do not match its calls; `overlong`: more tokens than max_new_tokens. Those of `GIVEN` cannot be
detected from the row alone."""

MAX_PERIOD = 64
"""Longest loop that counts as a repetition, in tokens."""
MIN_TURNS, MIN_TOKENS = 4, 32
"""Least repetitions and least tokens of a loop."""


def flags_of(
    answer_ids: Sequence[int], finish_reason: str, text: str, tool_calls: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Return the flags of a response, all but those of `GIVEN`, in the order of FLAGS.

    Args:
        answer_ids: the response, with the stop id at its end unless it was cut.
        text: the response without the stop token and the calls.
    """
    ids = answer_ids if finish_reason == LENGTH else answer_ids[:-1]
    found = {
        LENGTH: finish_reason == LENGTH,
        EMPTY: not text.strip() and not tool_calls,
        REPETITION: repeats(ids),
    }
    return [name for name, holds in found.items() if holds]


def repeats(ids: Sequence[int]) -> bool:
    """Return whether ids end in a loop: a tail of period p <= MAX_PERIOD that is max(4 p, 32) long or longer.

    One pass over the prefix function of the reversed ids: its value at n gives the smallest period of the last n ids.
    """
    # A tail of a periodic tail has the same period, so the shortest one that counts is enough.
    backwards = ids[-max(MIN_TURNS * MAX_PERIOD, MIN_TOKENS) :][::-1]
    border = [0] * len(backwards)
    for index in range(1, len(backwards)):
        length = border[index - 1]
        while length and backwards[index] != backwards[length]:
            length = border[length - 1]
        border[index] = length + (backwards[index] == backwards[length])
        period = index + 1 - border[index]
        if period <= MAX_PERIOD and index + 1 >= max(MIN_TURNS * period, MIN_TOKENS):
            return True
    return False
