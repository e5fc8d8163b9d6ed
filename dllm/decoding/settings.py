"""Sampler settings and their validation.

A field is stated once: type, default, bounds and help text. The command line derives its flags from it
(`dllm.cli.options`), lm-eval its generation arguments, and `__post_init__` its checks. Imports neither torch nor
pydantic, so that `--help` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from typing_extensions import override

from dllm.errors import ConfigError

Remasking = Literal["low_confidence", "random", "entropy", "margin"]
Schedule = Literal["even", "cosine"]
CacheKind = Literal["none", "prefix", "dual", "block"]


def setting(
    default: Any,
    help: str | None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: bool = False,
    show_default: bool = True,
) -> Any:
    """Describe a field.

    Args:
        help: for the command line; None gives the field no flag.
        low: the least allowed value.
        high: the largest allowed value.
        above: exclude `low` itself.
        show_default: name the default in `--help`; not where a sampler or a model usually replaces it.
    """
    bounds = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "bounds": bounds, "show_default": show_default})


@dataclass(frozen=True)
class LengthSettings:
    """Settings of a sampler that takes nothing but a length; every sampler's settings derive from these.

    Raises:
        ConfigError: a value is out of range, or two values contradict each other.
    """

    max_new_tokens: int = setting(256, "Most tokens to generate per prompt.", low=1, high=2**24)

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_range(each.name, getattr(self, each.name), **each.metadata["bounds"])
        for valid, message, hint in self.checks():
            if not valid:
                raise ConfigError(message, hint=hint)

    def checks(self) -> list[tuple[bool, str, str | None]]:
        """List what must hold between values, each with the message and the hint for where it does not."""
        return []


@dataclass(frozen=True)
class BlockSettings(LengthSettings):
    """Settings of a sampler that decodes in blocks."""

    block_size: int | None = setting(
        None, "Tokens per block; 0, the default, takes the checkpoint's.", low=0, high=2**16
    )
    """null and 0 take the model's, else everything at once."""


@dataclass(frozen=True)
class DrawSettings(LengthSettings):
    """Settings of a sampler that may draw random numbers."""

    temperature: float = setting(0.0, "Softmax temperature; 0 is greedy, 2 the highest.", low=0)
    seed: int = setting(0, "Random seed (temperature > 0, or --remasking random).", low=0, high=2**63 - 1)

    @override
    def checks(self) -> list[tuple[bool, str, str | None]]:
        fine = self.temperature == 0 or 1e-6 <= self.temperature <= 2
        return [*super().checks(), (fine, "temperature must be 0, or a number from 1e-6 to 2", None)]


@dataclass(frozen=True)
class NucleusSettings(DrawSettings):
    """Settings of a sampler that may leave out improbable tokens."""

    top_p: float = setting(
        1.0, "Sample from the smallest set of tokens with this probability.", low=0, high=1, above=True
    )


@dataclass(frozen=True)
class SeededSettings(DrawSettings):
    """Settings of decoding with a diffusion model."""

    early_stop: bool = setting(True, None)
    """Skip what follows an end token; the text is the same either way."""


@dataclass(frozen=True)
class CausalSettings(SeededSettings, NucleusSettings):
    """Settings of decoding one token at a time with a diffusion model."""


@dataclass(frozen=True)
class SampledSettings(NucleusSettings):
    """Settings of decoding with an ordinary causal model."""

    top_k: int = setting(0, "Sample from so many of the most probable tokens; 0: all.", low=0, high=2**24)

    @override
    def checks(self) -> list[tuple[bool, str, str | None]]:
        named = [name for name, cuts in (("top_p", self.top_p < 1), ("top_k", self.top_k > 0)) if cuts]
        return [
            *super().checks(),
            (
                self.temperature > 0 or not named,
                f"{' and '.join(named)} require{'s' * (len(named) == 1)} sampling, and temperature 0 is greedy",
                "give a temperature too",
            ),
        ]


@dataclass(frozen=True)
class DraftSettings(BlockSettings, SampledSettings):
    """Settings of speculative decoding with a draft."""


@dataclass(frozen=True)
class SelfSpeculationSettings(BlockSettings, SeededSettings):
    """Settings of self-speculation."""


@dataclass(frozen=True)
class UnmaskingSettings(BlockSettings, CausalSettings):
    """Settings of unmasking a block: how many tokens per pass, and which of them first."""

    steps: int | None = setting(
        None, "Forward passes over all blocks, at least one per block; by default one per token.", low=1, high=2**24
    )
    """A threshold may need fewer."""
    schedule: Schedule = setting("even", "How tokens are spread over --steps; cosine: few first.")  # noqa: RUF009
    remasking: Remasking = setting("low_confidence", "Which proposals are committed first.")  # noqa: RUF009
    """The most probable, those in random order, those of least entropy, or of largest margin."""
    threshold: float | None = setting(None, "Commit all proposals with a probability above this.", low=0, high=1)
    """At least one per pass; with remasking margin it compares margins."""
    factor: float | None = setting(None, "Commit by Fast-dLLM's factor rule.", low=0, above=True)
    entropy_bound: float | None = setting(
        None, "Commit the positions of least entropy, up to this sum in nats; needs --remasking entropy.", low=0
    )
    """The last of them is not counted in the sum."""

    @property
    def follows_plan(self) -> bool:
        """Tell whether a plan of steps affects how many tokens are committed."""
        ruled = self.factor is not None or self.entropy_bound is not None
        return not ruled and (self.threshold is None or self.steps is not None)

    @override
    def checks(self) -> list[tuple[bool, str, str | None]]:
        return [
            *super().checks(),
            (
                [self.threshold, self.factor, self.entropy_bound].count(None) >= 2,
                "threshold, factor and entropy_bound exclude each other",
                "give one of them",
            ),
            (
                (self.threshold is None and self.factor is None) or self.remasking in ("low_confidence", "margin"),
                f"threshold and factor compare probabilities, and remasking {self.remasking} has none",
                "take low_confidence or margin",
            ),
            (
                self.entropy_bound is None or self.remasking == "entropy",
                f"entropy_bound sums entropies, and remasking {self.remasking} has none",
                "take remasking entropy",
            ),
            (
                self.steps is None or self.follows_plan,
                "steps make a plan, and factor and entropy_bound decide without one",
                "leave steps out",
            ),
            (
                self.schedule == "even" or self.follows_plan,
                f"schedule {self.schedule} shapes a plan, and there is none",
                "give steps, and neither factor nor entropy_bound",
            ),
        ]


@dataclass(frozen=True)
class Settings(UnmaskingSettings):
    """Settings of unmasking a whole canvas: all that any sampler here takes."""

    cfg_scale: float = setting(0.0, "Classifier-free guidance scale; above 0 it doubles the forward passes.", low=0)
    """Logits z + w (z - z without the prompt)."""
    cache: CacheKind = setting(  # noqa: RUF009
        "none",
        "Keys and values kept between passes; default: block for block-causal models (exact), else none.",
        show_default=False,
    )
    """`prefix` and `dual` are approximate, for full attention; `block` is exact, for block-causal models."""
    editing_threshold: float | None = setting(
        None, "Replace a block's tokens where another one's probability is above this.", low=0, high=1
    )
    """Source: LLaDA2.1."""
    max_post_steps: int = setting(16, "Most passes per block that only edit.", low=0, high=2**24)

    @override
    def checks(self) -> list[tuple[bool, str, str | None]]:
        return [
            *super().checks(),
            (self.cfg_scale < math.inf, "cfg_scale must be a number from 0 on", None),
            (
                self.max_post_steps == 16 or self.editing_threshold is not None,
                "max_post_steps limits edits, and there are none",
                "give an editing_threshold too",
            ),
        ]


def _check_range(name: str, value: Any, *, low: float | None, high: float | None, above: bool) -> None:
    """Refuse a value outside a field's bounds.

    Raises:
        ConfigError: it is.
    """
    if isinstance(value, str | bool | None):
        return
    wrong = ""
    if math.isnan(value):
        wrong = "must be a number" if name != "temperature" else "must be 0, or a number from 1e-6 to 2"
    elif low is not None and (value < low or (above and value == low)):
        wrong = f"must be {'above' if above else 'at least'} {low:g}"
    elif high is not None and value > high:
        wrong = f"must be at most {high:g}"
    if wrong:
        raise ConfigError(f"{name} {wrong}")
