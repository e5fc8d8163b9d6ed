"""Acceptance length of speculative decoding, and acceptance by offset in the block.

Owns the sums behind every acceptance figure. They add up over responses, and are divided last. Offset k is the k-th
draft token of a round, k = 1 .. block size - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RoundCounts(NamedTuple):
    """Tokens of one round of speculative decoding."""

    num_emitted: int
    """The accepted draft tokens and the target's own next one, the bonus token: num_accepted + 1. A stop id among the
    draft tokens ends the round without a bonus token: num_accepted."""
    num_accepted: int
    """Draft tokens accepted."""
    num_drafted: int
    """Draft tokens proposed."""


@dataclass
class Acceptance:
    """Sums over rounds of speculative decoding.

    Args:
        block_size: slots per round.
    """

    block_size: int
    rounds: int = 0
    num_emitted: int = 0
    """Tokens over all rounds, bonus tokens included."""
    responses: int = 0
    """Responses that had a round."""
    response_means: float = 0.0
    """Sum over responses of their mean tokens per round."""
    second_moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums over responses of their tokens squared, tokens times rounds, and rounds squared."""
    histogram: list[int] = field(default_factory=list)
    """Rounds by tokens emitted, 0 .. block_size."""
    drafted: list[int] = field(default_factory=list)
    """Rounds with a draft token at an offset."""
    reached: list[int] = field(default_factory=list)
    """Rounds in which all earlier draft tokens were accepted and none of them ended the response."""
    accepted: list[int] = field(default_factory=list)
    """Rounds in which the draft tokens up to and at an offset were accepted."""
    chances: list[float] = field(default_factory=list)
    """When sampling: the probability that a draft token is accepted, summed over the rounds that reached its offset."""

    def __post_init__(self) -> None:
        self.histogram = self.histogram or [0] * (self.block_size + 1)
        self.chances = self.chances or [0.0] * (self.block_size - 1)
        for name in ("drafted", "reached", "accepted"):
            setattr(self, name, getattr(self, name) or [0] * (self.block_size - 1))

    def add(self, response: Iterable[RoundCounts], chances: Iterable[Sequence[float]] = ()) -> None:
        """Count the rounds of one response, its prefill left out.

        Args:
            chances: per round of a sampled response, as in `dllm.decoding.sampling.Verified`.
        """
        rounds = list(response)
        for each in rounds:
            self._add_round(each)
        for by_offset in chances:
            for offset, chance in enumerate(by_offset):
                self.chances[offset] += chance
        if rounds:
            self.responses += 1
            tokens, count = sum(each.num_emitted for each in rounds), len(rounds)
            self.response_means += tokens / count
            squares, products, rounds_squared = self.second_moments
            self.second_moments = (
                squares + tokens * tokens,
                products + tokens * count,
                rounds_squared + count * count,
            )

    @property
    def tau_micro(self) -> float | None:
        """Mean tokens emitted per round over all rounds."""
        return self.num_emitted / self.rounds if self.rounds else None

    @property
    def tau_macro(self) -> float | None:
        """Mean over responses of their mean tokens emitted per round (the figure in the DFlash paper)."""
        return self.response_means / self.responses if self.responses else None

    @property
    def tau_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of tau_micro over prompts like these; None of fewer than two responses.

        tau_micro is a ratio of two sums over responses, whose rounds depend on each other: the delta method on
        responses, with the quantile of Student's distribution. Within 1 and the block size, as every round is.
        """
        if self.responses < 2:
            return None
        tau, free = self.num_emitted / self.rounds, self.responses - 1
        squares, products, rounds = self.second_moments
        spread = max(0.0, squares - 2 * tau * products + tau * tau * rounds) * self.responses / free
        z = 1.959964  # and the expansion of Student's quantile around it
        quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        margin = quantile * math.sqrt(spread) / self.rounds
        return max(1.0, tau - margin), min(float(self.block_size), tau + margin)

    @property
    def unconditional(self) -> list[float | None]:
        """Share of rounds in which the draft tokens up to each offset were all accepted."""
        return _shares(self.accepted, self.drafted)

    @property
    def conditional(self) -> list[float | None]:
        """Share of draft tokens at each offset that were accepted, given that all before them were."""
        return _shares(self.accepted, self.reached)

    @property
    def expected(self) -> list[float | None]:
        """When sampling: `unconditional`, with the probability that the token at the offset is accepted for whether it
        was; the mean is the same, the variance smaller."""
        return _shares(self.chances, self.drafted)

    @property
    def expected_conditional(self) -> list[float | None]:
        """When sampling: `conditional` in the same way."""
        return _shares(self.chances, self.reached)

    def figures(self) -> dict[str, Any]:
        """Return everything worth reporting, ready for JSON."""
        return {
            "tau_micro": self.tau_micro,
            "tau_interval": self.tau_interval and list(self.tau_interval),
            "tau_macro": self.tau_macro,
            "rounds": self.rounds,
            "acceptance_by_offset": self.unconditional,
            "conditional_acceptance_by_offset": self.conditional,
            "drafts_offered_by_offset": self.drafted,
            "accepted_histogram": self.histogram,
        }

    def _add_round(self, counts: RoundCounts) -> None:
        self.rounds += 1
        self.num_emitted += counts.num_emitted
        self.histogram[counts.num_emitted] += 1
        # After a stop id among the draft tokens, the next one was neither accepted nor rejected.
        has_bonus = counts.num_emitted > counts.num_accepted
        for offset in range(counts.num_drafted):
            self.drafted[offset] += 1
            self.reached[offset] += offset < counts.num_accepted + has_bonus
            self.accepted[offset] += offset < counts.num_accepted


def _shares(part: Sequence[float], whole: Sequence[int]) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part, whole, strict=True)]
