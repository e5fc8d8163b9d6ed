"""The samplers, one class each.

Imports torch only to decode, since the command line derives its flags from the settings of every member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from dllm.decoding.sampler import Decodable, Sampler
from dllm.decoding.settings import (
    CausalSettings,
    DraftSettings,
    SampledSettings,
    SelfSpeculationSettings,
    Settings,
    UnmaskingSettings,
)
from dllm.errors import ConfigError

if TYPE_CHECKING:  # these import torch
    from dllm.decoding.speculative import Decoder
    from dllm.decoding.unmasking import Generation, Watch
    from dllm.models.diffusion.protocol import DiffusionLM


class DFlash(Sampler):
    """Speculative decoding with a draft; above temperature 0 each token has the target's distribution."""

    name, settings = "dflash", {"draft": DraftSettings}

    @override
    def decoder(self, model: Any, load_draft: Callable[[], Any], settings: Any) -> Decoder:
        from dllm.decoding.speculative import Decoder

        return Decoder(model, load_draft(), settings.block_size or 0, named_by="--block-size")


class Ar(Sampler):
    """One token per pass: a draft's target, a plain causal model, or a diffusion model's causal side."""

    name, needs_causal, evaluated = "ar", True, True
    settings: ClassVar = {"draft": SampledSettings, "causal": SampledSettings, "diffusion": CausalSettings}
    implementation = "dllm.decoding.causal:decode_causally"

    @override
    def decoder(self, model: Any, load_draft: Callable[[], Any], settings: Any) -> Decoder:
        from dllm.decoding.speculative import Decoder

        return Decoder(model)


class SelfSpeculation(Sampler):
    """Draft a block with attention both ways, and verify it causally; greedy, the text is `ar`'s."""

    name, needs_causal, evaluated = "self-spec", True, True
    settings, defaults = {"diffusion": SelfSpeculationSettings}, {"block_size": 32}
    implementation = "dllm.decoding.causal:speculate_on_itself"


class Unmasking(Sampler):
    """Commit several masked tokens per pass."""

    settings: ClassVar = {"diffusion": Settings}

    @override
    def describe(self, settings: Any) -> str:
        if settings.threshold is not None:
            return f"threshold {settings.threshold:g}"
        if settings.steps is None:
            return "one token per pass"
        return f"{settings.steps} pass{'' if settings.steps == 1 else 'es'}"


class Nemotron(Unmasking):
    """Block by block, each around a causal first token."""

    name, needs_causal = "nemotron", True
    settings, defaults = {"diffusion": UnmaskingSettings}, {"block_size": 32, "threshold": 0.9}
    implementation = "dllm.decoding.causal:decode_seeded"


class Llada(Unmasking):
    """Block by block over a whole canvas, the most confident tokens first."""

    name, defaults, infills = "llada", {"block_size": 32}, True
    implementation = "dllm.decoding.unmasking:sample"

    @override
    def check(self, model: Decodable) -> None:
        if model.sets_own_masks:
            raise ConfigError(
                f"sampler {self.name} cannot set this model's masks", hint="take own, nemotron, self-spec or ar"
            )

    @override
    def defaults_for(self, model: Any) -> dict[str, Any]:
        return {**super().defaults_for(model), **({"cache": "block"} if "block" in model.caches else {})}


class Llada2(Llada):
    """As `llada` above a confidence, for block-causal models."""

    name, defaults, infills = "llada2", {"block_size": 32, "threshold": 0.95}, False

    @override
    def check(self, model: Decodable) -> None:
        if model.config.context == "full":
            raise ConfigError(
                "sampler llada2 is for block-causal models, and this one's attention is full", hint="take llada"
            )
        super().check(model)


class Own(Unmasking):
    """The generation code that a published model brings, one prompt at a time."""

    name, defaults, reports_steps = "own", {"block_size": 32}, False
    method = "generate"

    @override
    def unused(self, model: Any, named: Mapping[str, Any]) -> list[str]:
        from dllm.decoding.own_generate import unknown_to_own_code

        return unknown_to_own_code(model, self.method, named)

    @override
    def defaults_for(self, model: Any) -> dict[str, Any]:
        seeded = {"threshold": Nemotron.defaults["threshold"]} if model.config.context == "causal" else {}
        return {**super().defaults_for(model), **seeded}

    @override
    def decode(
        self,
        model: DiffusionLM,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        watch: Watch | None = None,
        copies: Sequence[int] | None = None,
    ) -> list[Generation]:
        from dllm.decoding.own_generate import generate_with_own_code

        return generate_with_own_code(model, prompts, settings, self.method, copies)


class OwnAr(Own):
    """As `own`, by Nemotron-Labs-Diffusion's `ar_generate`."""

    name, method = "own-ar", "ar_generate"

    @override
    def defaults_for(self, model: Any) -> dict[str, Any]:
        return {}


class OwnSelfSpeculation(Own):
    """As `own`, by Nemotron-Labs-Diffusion's `linear_spec_generate`."""

    name, method = "own-self-spec", "linear_spec_generate"

    @override
    def defaults_for(self, model: Any) -> dict[str, Any]:
        return Sampler.defaults_for(self, model)


DFLASH, AR, OWN, OWN_AR, OWN_SELF_SPECULATION = DFlash(), Ar(), Own(), OwnAr(), OwnSelfSpeculation()
LLADA, LLADA2, NEMOTRON, SELF_SPECULATION = Llada(), Llada2(), Nemotron(), SelfSpeculation()
