"""What determines the responses, and how a manifest describes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate, Sglang
from dllm.models import target_identity, targets
from dllm.prompts import template as chat
from dllm.registry import ENGINES

THINKING = {None: "template default", True: "on", False: "off"}
"""`target.enable_thinking`, as written in a manifest."""
MACHINE = ("servers", "concurrency", "timeout_s", "max_retries", "max_failure_rate")
"""Settings that affect no response, so that work is resumed after one of them changes."""


def determining(settings: Regenerate) -> Regenerate:
    """Reset the settings that affect no response of this engine to their defaults."""
    defaults, affects = Regenerate(), ENGINES[settings.engine].affects
    aside = {
        name: getattr(defaults, name) for name in (*MACHINE, *({"batch_size", "served_model", "sglang"} - affects))
    }
    if "sglang" in affects:
        aside["sglang"] = Sglang(args=settings.sglang.args)
    return settings.model_copy(update=aside)


def identity(settings: Regenerate, target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the engine, the target and the chat template.

    Raises:
        DataError: the tokenizer has no chat template, or one that opens no assistant turn.
        ModelError: the target's weights are needed here and cannot be found.
    """
    factory = ENGINES[settings.engine]
    factory.check(settings)
    factory.check_target(target)
    end = chat.end_of_turn_id(tokenizer)  # raises for an unusable template before the first request
    found = {"engine": settings.engine, "template": chat.template_digest(tokenizer)}
    if factory.is_external:  # the servers have the weights
        named = {"model": target.model, "revision": target.revision}
        return {**found, "target": named, "served_model": settings.served_model or target.model}
    targets.check_vocabulary(target, tokenizer, [end])
    return {**found, "target": target_identity.identity(target)}


def about(settings: Regenerate, target: Target) -> dict[str, Any]:
    """Return how the responses were sampled, for the manifest."""
    sampling = ("samples_per_prompt", "temperature", "top_p", "max_new_tokens", "seed")
    return {
        "sampling": settings.model_dump(include=set(sampling)),
        "thinking": THINKING[target.enable_thinking],
        "turns": settings.turns,
        "drop": list(settings.drop),
    }


def settings_digest(settings: Regenerate, target: Target, identity: Mapping[str, Any]) -> str | None:
    """Hash what the response to a prompt depends on, and nothing that says which prompts, samples and shards there are.

    None where the responses come with the prompts.

    Args:
        identity: from `identity`, and whatever else determines how responses are made.
    """
    if not ENGINES[settings.engine].generates:
        return None
    sampling = settings.model_dump(include={"temperature", "top_p", "max_new_tokens", "seed", "turns"})
    engine = determining(settings).model_dump(include={"engine", *ENGINES[settings.engine].affects})
    made_of = [dict(identity), sampling, engine, target.model_dump()]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]
