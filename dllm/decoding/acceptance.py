"""How many tokens a round brings, and how acceptance falls with the offset.

Owns the sums behind every acceptance figure. They add up over answers, shards and machines, and are divided last.
Offset k is the k-th draft of a round, k = 1 .. block size - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dllm.decoding.speculative import Round


@dataclass
class Acceptance:
    """Sums over rounds of speculative decoding.

    Args:
        block_size: slots a round.
    """

    block_size: int
    rounds: int = 0
    accepted: int = 0
    """Tokens that held, over all rounds."""
    responses: int = 0
    """Answers that had a round at all."""
    response_means: float = 0.0
    """Sum over answers of their mean tokens a round."""
    histogram: list[int] = field(default_factory=list)
    """Rounds by tokens that held, 0 .. block_size."""
    offered: list[int] = field(default_factory=list)
    """Rounds that offered a draft at an offset."""
    reached: list[int] = field(default_factory=list)
    """Rounds in which all earlier drafts held and none of them ended the answer."""
    held: list[int] = field(default_factory=list)
    """Rounds in which the draft at an offset, and all before it, held."""

    def __post_init__(self) -> None:
        self.histogram = self.histogram or [0] * (self.block_size + 1)
        for name in ("offered", "reached", "held"):
            setattr(self, name, getattr(self, name) or [0] * (self.block_size - 1))

    def add(self, answer: Sequence[Round]) -> None:
        """Count the rounds of one answer, its prompt's aside."""
        rounds = [r for r in answer if r.accepted > 0]
        for r in rounds:
            self._add_round(r)
        if rounds:
            self.responses += 1
            self.response_means += sum(r.accepted for r in rounds) / len(rounds)

    def merge(self, other: Acceptance) -> None:
        """Add another's sums."""
        assert self.block_size == other.block_size, "acceptance of different block sizes does not add up"
        self.rounds += other.rounds
        self.accepted += other.accepted
        self.responses += other.responses
        self.response_means += other.response_means
        for name in ("histogram", "offered", "reached", "held"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])

    @property
    def tau_micro(self) -> float | None:
        """Mean tokens a round over all rounds, the target's own token included."""
        return self.accepted / self.rounds if self.rounds else None

    @property
    def tau_macro(self) -> float | None:
        """Mean over answers of their mean tokens a round (the figure in the DFlash paper)."""
        return self.response_means / self.responses if self.responses else None

    @property
    def unconditional(self) -> list[float | None]:
        """Share of rounds in which the drafts up to each offset all held."""
        return _shares(self.held, self.offered)

    @property
    def conditional(self) -> list[float | None]:
        """Share of drafts at each offset that held, where all before them did."""
        return _shares(self.held, self.reached)

    def figures(self) -> dict[str, Any]:
        """Return everything worth reporting, ready for JSON."""
        return {
            "tau_micro": self.tau_micro,
            "tau_macro": self.tau_macro,
            "rounds": self.rounds,
            "acceptance_by_offset": self.unconditional,
            "conditional_acceptance_by_offset": self.conditional,
            "drafts_offered_by_offset": self.offered,
            "accepted_histogram": self.histogram,
        }

    def _add_round(self, r: Round) -> None:
        self.rounds += 1
        self.accepted += r.accepted
        self.histogram[r.accepted] += 1
        # A round that a stop id ended inside its drafts says nothing of the next draft: it neither held nor failed.
        open_ended = r.accepted > r.run
        for offset in range(r.drafted):
            self.offered[offset] += 1
            self.reached[offset] += offset < r.run + open_ended
            self.held[offset] += offset < r.run


def _shares(part: Sequence[int], whole: Sequence[int]) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part, whole, strict=True)]
