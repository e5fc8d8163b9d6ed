"""Answers by the generation code that a published diffusion model brings itself, one prompt at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from dllm.decoding.proposals import row_generators
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import Generation, check_prompts, trimmed
from dllm.errors import ConfigError, ModelError
from dllm.models.diffusion import older_code
from dllm.models.diffusion.bidirectional import BidirectionalLM

METHODS = {"ar": "ar_generate", "self-spec": "linear_spec_generate"}
"""What samplers are called in Nemotron-Labs-Diffusion's code; all others are `generate`."""


def own_method(model: BidirectionalLM, sampler: str) -> Any:
    """Find the method of a model's own code that writes as a sampler does.

    Raises:
        ConfigError: the model brings no code of its own, or none that writes so.
    """
    if model.kind is None:
        raise ConfigError("this model brings no generation code", hint="leave out --own-generate")
    name = METHODS.get(sampler, "generate")
    found = getattr(model.model, name, None)
    if found is None:
        raise ConfigError(f"this model's own code has no {name}", hint="leave out --own-generate")
    return found


def unknown_to_own_code(model: BidirectionalLM, sampler: str, named: Mapping[str, Any]) -> list[str]:
    """List the settings that differ from their defaults and that a model's own code has no argument for.

    Raises:
        ConfigError: as in `own_method`.
    """
    accepted = inspect.signature(own_method(model, sampler)).parameters
    # It writes one prompt at a time, to a length and from a seed that are ours to set.
    ours = {"max_new_tokens", "block_size", "seed", "early_stop", "max_post_steps"}
    defaults = {field.name: field.default for field in fields(Settings)}
    return [n for n, value in named.items() if n not in ours and n not in accepted and value != defaults[n]]


@torch.no_grad()
def generate_with_own_code(
    model: BidirectionalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    sampler: str = "nemotron",
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Call a model's own code, as LLaDA2's and Nemotron-Labs-Diffusion's read; `passes` is 0 where it tells none.

    Raises:
        ConfigError: as in `own_method`, or it has no use for a setting.
        ModelError: its code is not of a known kind, or fails.
    """
    generate = own_method(model, sampler)
    check_prompts(model, prompts, masks=False)
    if unknown := unknown_to_own_code(model, sampler, asdict(settings)):
        raise ConfigError(f"the model's own {generate.__name__} has no use for {', '.join(unknown)}")
    accepted = inspect.signature(generate).parameters
    first = next((name for name in ("inputs", "prompt_ids") if name in accepted), None)
    if first is None or (sampler != "ar" and "block_length" not in accepted):
        raise ModelError(f"the model's own {generate.__name__} takes no block_length", where=model.config.model_type)
    size = settings.block_size or (model.kind.block_size if model.kind is not None else None) or 32
    asked: dict[str, Any] = {
        "gen_length": settings.max_new_tokens,
        "max_new_tokens": _length(settings.max_new_tokens, size if "block_length" in accepted else 1),
        "block_length": size,
        "steps": _steps(settings, size) if first == "prompt_ids" else settings.steps,
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
    for prompt, generator in zip(prompts, row_generators(prompts, settings.seed, copies), strict=True):
        with older_code.cut_to_length(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())  # such code draws from the global state
            try:
                found = generate(**{first: torch.tensor([list(prompt)], device=device)}, **asked)
            except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
                said = f"{type(error).__name__}: {error}".strip().split("\n")[0]
                raise ModelError(
                    f"the model's own {generate.__name__} fails ({said})",
                    where=model.config.model_type,
                    hint="--no-own-generate writes by our samplers",
                ) from error
        ids, passes = found if isinstance(found, tuple) else (found, 0)
        written = ids[0].tolist()
        if written[: len(prompt)] == list(prompt):  # some return the prompt as well
            written = written[len(prompt) :]
        written = written[: settings.max_new_tokens]
        answers.append(trimmed(Generation(written, int(passes)), model.eos_ids))
    return answers


def _length(new_tokens: int, size: int) -> int:
    """Round up to whole blocks, as Nemotron-Labs-Diffusion's code demands."""
    return -(-new_tokens // size) * size


def _steps(settings: Settings, size: int) -> int:
    """Return the steps of all blocks together, which Nemotron-Labs-Diffusion's code divides among them evenly."""
    length = _length(settings.max_new_tokens, size)
    steps = settings.steps or length
    if steps % (length // size):
        raise ConfigError(
            f"the model's own generate divides steps among {length // size} blocks, and {steps} cannot be",
            hint="name a multiple, or take --no-own-generate",
        )
    return steps
