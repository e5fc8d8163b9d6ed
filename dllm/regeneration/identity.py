"""What determines the answers, and what a manifest says of how they were made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dllm.config.params import Regenerate, Sglang, Target
from dllm.models import targets
from dllm.prompts import template as chat
from dllm.registry import ENGINES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = {None: "template default", True: "on", False: "off"}
"""`target.enable_thinking` as a manifest has it."""
MACHINE = ("servers", "concurrency", "timeout_s", "max_retries", "max_failure_rate")
"""Settings that shape no answer, so that work goes on after one of them changes."""


def determining(settings: Regenerate) -> Regenerate:
    """Put aside the settings that shape no answer with this engine."""
    defaults, affects = Regenerate(), ENGINES[settings.engine].affects
    aside = {
        name: getattr(defaults, name) for name in (*MACHINE, *({"batch_size", "served_model", "sglang"} - affects))
    }
    if "sglang" in affects:
        aside["sglang"] = Sglang(args=settings.sglang.args)
    return settings.model_copy(update=aside)


def identity(settings: Regenerate, target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Name the engine, the target and the chat template.

    Raises:
        DataError: the tokenizer has no chat template, or one that opens no assistant turn.
        ModelError: the target's weights are needed here and cannot be had.
    """
    factory = ENGINES[settings.engine]
    factory.check(settings)
    chat.end_of_turn_id(tokenizer)  # complains of a template that will not do, before anything is asked
    found = {"engine": settings.engine, "template": chat.template_digest(tokenizer)}
    if factory.is_external:  # the weights lie with the servers, and need not be here
        named = {"model": target.model, "revision": target.revision}
        return {**found, "target": named, "served_model": settings.served_model or target.model}
    return {**found, "target": targets.identity(target)}


def about(settings: Regenerate, target: Target) -> dict[str, Any]:
    """Say how the target was asked, for the manifest."""
    sampling = ("samples_per_prompt", "temperature", "top_p", "max_new_tokens", "seed")
    return {
        "sampling": settings.model_dump(include=set(sampling)),
        "thinking": THINKING[target.enable_thinking],
        "turns": settings.turns,
        "drop": list(settings.drop),
    }
