"""What may be the matter with an answer, told from its ids.

Owns the names. A flagged row stays unless `regenerate.drop` names the flag; how often each occurs is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LENGTH, EMPTY, REPETITION, TOOL_MISMATCH = "length", "empty", "repetition", "tool_mismatch"
FLAGS = (LENGTH, EMPTY, REPETITION, TOOL_MISMATCH)
"""`length`: cut at max_new_tokens; `empty`: no text and no call; `repetition`: it ends in a loop; `tool_mismatch`: its
calls do not fit the results that follow."""

MAX_PERIOD = 64
"""Longest loop that counts as a repetition, in tokens."""
MIN_TURNS, MIN_TOKENS = 4, 32
"""How often and how long a loop must run."""


def flags_of(
    answer_ids: Sequence[int], finish_reason: str, text: str, tool_calls: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Name what can be told from the answer alone, which is all but `tool_mismatch`, in the order of FLAGS.

    Args:
        answer_ids: the answer, with the stop id at its end unless it was cut.
        text: the answer without the stop token and the calls.
    """
    said = answer_ids if finish_reason == LENGTH else answer_ids[:-1]
    found = {
        LENGTH: finish_reason == LENGTH,
        EMPTY: not text.strip() and not tool_calls,
        REPETITION: repeats(said),
    }
    return [name for name, holds in found.items() if holds]


def repeats(ids: Sequence[int]) -> bool:
    """Tell whether ids end in a loop: a tail of period p <= MAX_PERIOD that is max(4 p, 32) long or longer.

    One pass over the prefix function of the reversed ids: its value at n gives the smallest period of the last n ids.
    """
    # A tail of period p has it in its own tails too, so the shortest one that would count says all.
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
