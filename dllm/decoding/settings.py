"""What a person may ask of a sampler, and which wishes do not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dllm.errors import ConfigError
from dllm.models.diffusion.bidirectional import Context

Remasking = Literal["low_confidence", "random", "entropy", "margin"]
Schedule = Literal["even", "cosine"]
CacheKind = Literal["none", "prefix", "dual", "block"]


@dataclass(frozen=True)
class Settings:
    """How an answer is written.

    Raises:
        ConfigError: a value is out of range, or two of them do not go together.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    """Forward passes over all blocks together, at least one a block; null takes one a token. A threshold may need
    fewer."""
    schedule: Schedule = "even"
    """How the plan spreads a block's tokens over its steps: evenly, or with few first and many later (`cosine`)."""
    block_size: int | None = None
    """Columns written before the next ones are begun; null takes all at once."""
    temperature: float = 0.0
    top_p: float = 1.0
    remasking: Remasking = "low_confidence"
    """Which proposals are kept: the most probable, a random choice, those of least entropy, or of largest margin."""
    threshold: float | None = None
    """Commit every proposal whose probability (margin) is above this, and at least one."""
    factor: float | None = None
    """Commit by Fast-dLLM's factor rule instead."""
    entropy_bound: float | None = None
    """Commit the places of least entropy, all but the last with no more nats than this together."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: logits z + w (z - z without the prompt). It doubles the forward passes."""
    cache: CacheKind = "none"
    """`prefix` and `dual` are approximate, for full attention; `block` is exact, for block-causal models."""
    early_stop: bool = True
    """Leave out work after an end token; the text is the same either way."""
    seed: int = 0
    editing_threshold: float | None = None
    """Also rewrite tokens of the current block for which another one's probability is above this (LLaDA2.1)."""
    max_post_steps: int = 16
    """Most passes that only edit a block, once it has no mask."""

    def __post_init__(self) -> None:
        checks = [
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1", None),
            (self.steps is None or self.steps >= 1, "steps must be at least 1", None),
            (self.block_size is None or self.block_size >= 1, "block_size must be at least 1", None),
            (
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
                "temperature must be 0, or a number from 1e-6 on",
                None,
            ),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1", None),
            (0 <= self.cfg_scale < math.inf, "cfg_scale must be a number from 0 on", None),
            *(
                (value is None or not math.isnan(value), f"{name} must be a number", None)
                for name, value in (("threshold", self.threshold), ("editing_threshold", self.editing_threshold))
            ),
            (self.max_post_steps >= 0, "max_post_steps must not be negative", None),
            (self.factor is None or self.factor > 0, "factor must be above 0", None),
            (self.entropy_bound is None or self.entropy_bound >= 0, "entropy_bound must not be negative", None),
            (
                [self.threshold, self.factor, self.entropy_bound].count(None) >= 2,
                "threshold, factor and entropy_bound exclude each other",
                "name one",
            ),
            (
                (self.threshold is None and self.factor is None) or self.remasking in ("low_confidence", "margin"),
                f"threshold and factor compare probabilities, which remasking {self.remasking} has none of",
                "take low_confidence or margin",
            ),
            (
                self.entropy_bound is None or self.remasking == "entropy",
                f"entropy_bound adds up entropies, and remasking {self.remasking} has none of them",
                "take remasking entropy",
            ),
            (
                self.steps is None or self.follows_plan,
                "steps make a plan, and factor and entropy_bound decide without one",
                "leave steps out",
            ),
            (
                self.max_post_steps == 16 or self.editing_threshold is not None,
                "max_post_steps limits edits, and there are none",
                "name an editing_threshold too",
            ),
            (
                self.schedule == "even" or self.follows_plan,
                f"schedule {self.schedule} shapes a plan, and there is none to follow",
                "name steps, and neither factor nor entropy_bound",
            ),
        ]
        for fine, message, hint in checks:
            if not fine:
                raise ConfigError(message, hint=hint)

    @property
    def follows_plan(self) -> bool:
        """Tell whether a plan of steps has a say in how many tokens are committed."""
        ruled = self.factor is not None or self.entropy_bound is not None
        return not ruled and (self.threshold is None or self.steps is not None)

    def check_cache(self, context: Context) -> None:
        """Refuse a cache that the model's attention has no use for.

        Raises:
            ConfigError: it is one for another kind of attention.
        """
        if self.cache == "block" and context == "full":
            raise ConfigError(
                "cache block is for block-causal models, and this one sees all of its canvas",
                hint="take prefix or dual",
            )
        if self.cache in ("prefix", "dual") and context != "full":
            raise ConfigError(
                f"cache {self.cache} is for full attention, and this model is block-causal", hint="take block"
            )
