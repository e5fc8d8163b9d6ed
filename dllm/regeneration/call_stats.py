"""Figures of one call that generates responses: what has finished, how fast, and the time left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dllm.engines.engine import Refusal, Response


@dataclass
class CallStats:
    """What has been generated since this call began.

    Args:
        limit: the most tokens that a response may have.
    """

    limit: int
    asked: int = 0
    responses: int = 0
    tokens: int = 0
    """Of finished responses."""
    all_tokens: int = 0
    """Those of unfinished responses, too."""
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_s(self) -> float:
        """Return the mean rate since the call began."""
        return self.all_tokens / max(self.seconds, 1e-3)

    def add(self, outcome: Response | Refusal | None, engine_tokens: int) -> None:
        """Count an outcome, or only the time and the tokens where there is none.

        Args:
            engine_tokens: tokens that the engine has generated in this call; 0 where it only knows whole responses.
        """
        if outcome is not None:
            self.asked += 1
            if isinstance(outcome, Response):
                self.responses += 1
                self.tokens += len(outcome.token_ids)
        self.all_tokens = max(engine_tokens, self.tokens)
        self.seconds = time.monotonic() - self._began

    def left_s(self, responses_left: float) -> float | None:
        """Estimate the time left from tokens, in seconds; None before the first response has finished.

        Short responses finish first, so the mean of those that have finished is too low at first. All tokens over the
        finished responses is the maximum-likelihood mean of exponential lengths of which some are censored.
        """
        if not self.responses or not self.tokens:
            return None
        mean = max(self.tokens / self.responses, min(self.limit, self.all_tokens / self.responses))
        return max(0.0, (responses_left * mean - (self.all_tokens - self.tokens)) / self.tokens_per_s)
