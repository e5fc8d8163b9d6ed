"""Answers by the generation code that a published diffusion model brings itself, one prompt at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from dllm.diffusion.sampler import Answer, check_prompts, trimmed
from dllm.diffusion.sampler_proposals import row_generators
from dllm.diffusion.sampler_settings import Settings
from dllm.errors import ConfigError, ModelError
from dllm.models.bidirectional import BidirectionalLM


def unknown_to_own_code(model: BidirectionalLM, named: Mapping[str, Any]) -> list[str]:
    """List the settings that differ from their defaults and that a model's own `generate` has no argument for."""
    generate: Any = model.model.generate
    accepted = inspect.signature(generate).parameters
    # It writes one prompt at a time, to a length and from a seed that are ours to set.
    ours = {"max_new_tokens", "block_size", "seed", "early_stop", "max_post_steps"}
    defaults = {field.name: field.default for field in fields(Settings)}
    return [n for n, value in named.items() if n not in ours and n not in accepted and value != defaults[n]]


@torch.no_grad()
def generate_with_own_code(
    model: BidirectionalLM, prompts: Sequence[Sequence[int]], settings: Settings
) -> list[Answer]:
    """Call a model's own `generate`, as LLaDA2's and Nemotron-Labs-Diffusion's read; `passes` is 0 where it tells none.

    Raises:
        ConfigError: the model brings no code of its own.
        ModelError: its `generate` is not of a known kind.
    """
    if model.kind is None:
        raise ConfigError("this model brings no generation code", hint="leave out --own-generate")
    check_prompts(model, prompts, masks=False)
    generate: Any = model.model.generate
    accepted = inspect.signature(generate).parameters
    first = next((name for name in ("inputs", "prompt_ids") if name in accepted), None)
    if first is None or "block_length" not in accepted:
        raise ModelError("the model's own generate takes no block_length", where=model.config.model_type)
    size = settings.block_size or model.kind.block_size or 32
    asked: dict[str, Any] = {
        "gen_length": settings.max_new_tokens,
        "max_new_tokens": -(-settings.max_new_tokens // size) * size,  # Nemotron's must be a multiple of the block
        "block_length": size,
        "steps": settings.steps,
        "temperature": settings.temperature,
        "top_p": settings.top_p if settings.top_p < 1 else None,
        "threshold": settings.threshold,
        "editing_threshold": settings.editing_threshold,
        "max_post_steps": settings.max_post_steps,
        "eos_early_stop": settings.early_stop,
        "mask_id": model.mask_token_id,
        "eos_id": min(model.eos_ids, default=None),
        "eos_token_id": min(model.eos_ids, default=None),
    }
    asked = {name: value for name, value in asked.items() if name in accepted and value is not None}
    answers = []
    device = model.head_VD.device
    for prompt, generator in zip(prompts, row_generators(prompts, settings.seed), strict=True):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())  # such code draws from the global state
            found = generate(**{first: torch.tensor([list(prompt)], device=device)}, **asked)
        ids, passes = found if isinstance(found, tuple) else (found, 0)
        written = ids[0].tolist()
        if written[: len(prompt)] == list(prompt):  # some return the prompt as well
            written = written[len(prompt) :]
        written = written[: settings.max_new_tokens]
        answers.append(trimmed(Answer(written, int(passes)), model.eos_ids))
    return answers
