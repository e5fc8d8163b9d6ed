"""Generate with the code that a published diffusion model brings, one prompt at a time."""

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
from dllm.models.diffusion.protocol import DiffusionLM


def own_method(model: DiffusionLM, method: str) -> Any:
    """Return a method of a model's own code.

    Raises:
        ConfigError: the model brings no code, or no such method.
    """
    if not model.runs_own_code:
        raise ConfigError("this model brings no generation code", hint="take another --sampler")
    found = getattr(model.model, method, None)
    if found is None:
        raise ConfigError(f"this model's own code has no {method}", hint="take another --sampler")
    return found


def unknown_to_own_code(model: DiffusionLM, method: str, named: Mapping[str, Any]) -> list[str]:
    """List the settings that differ from their defaults and that a model's own code has no argument for.

    Raises:
        ConfigError: as in `own_method`.
    """
    accepted = inspect.signature(own_method(model, method)).parameters
    # Length, random state and where to stop are handled here, one prompt at a time.
    handled = {"max_new_tokens", "block_size", "seed", "early_stop", "max_post_steps"}
    defaults = {field.name: field.default for field in fields(Settings)}
    return [name for name, value in named.items() if name not in handled | set(accepted) and value != defaults[name]]


@torch.no_grad()
def generate_with_own_code(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    method: str = "generate",
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Call a model's own code with the arguments of LLaDA2's or Nemotron-Labs-Diffusion's.

    `passes` is 0 where it reports none.

    Raises:
        ConfigError: as in `own_method`, or it has no use for a setting.
        ModelError: its code takes other arguments, or fails.
    """
    generate = own_method(model, method)
    check_prompts(model, prompts, masks=False)
    if unknown := unknown_to_own_code(model, method, asdict(settings)):
        raise ConfigError(f"the model's own {generate.__name__} has no use for {', '.join(unknown)}")
    accepted = inspect.signature(generate).parameters
    first = next((name for name in ("inputs", "prompt_ids") if name in accepted), None)
    family = model.model.config.model_type
    if first is None or (method != "ar_generate" and "block_length" not in accepted):
        raise ModelError(f"the model's own {generate.__name__} takes no block_length", where=family)
    size = settings.block_size or (model.published.block_size if model.published is not None else None) or 32
    arguments: dict[str, Any] = {
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
    arguments = {name: value for name, value in arguments.items() if name in accepted and value is not None}
    generations = []
    device = model.head_VD.device
    for prompt, generator in zip(prompts, row_generators(prompts, settings.seed, copies), strict=True):
        with older_code.cut_to_length(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())  # such code draws from the global state
            try:
                found = generate(**{first: torch.tensor([list(prompt)], device=device)}, **arguments)
            except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
                message = f"{type(error).__name__}: {error}".strip().split("\n")[0]
                raise ModelError(
                    f"the model's own {generate.__name__} fails ({message})",
                    where=family,
                    hint="take another --sampler",
                ) from error
        ids, passes = found if isinstance(found, tuple) else (found, 0)
        new_ids = ids[0].tolist()
        if new_ids[: len(prompt)] == list(prompt):  # some return the prompt as well
            new_ids = new_ids[len(prompt) :]
        new_ids = new_ids[: settings.max_new_tokens]
        generations.append(trimmed(Generation(new_ids, int(passes)), model.eos_ids))
    return generations


def _length(new_tokens: int, size: int) -> int:
    """Round up to whole blocks, as Nemotron-Labs-Diffusion's code requires."""
    return -(-new_tokens // size) * size


def _steps(settings: Settings, size: int) -> int:
    """Return the steps of all blocks together, which Nemotron-Labs-Diffusion's code divides among them evenly."""
    length = _length(settings.max_new_tokens, size)
    steps = settings.steps or length
    if steps % (length // size):
        raise ConfigError(
            f"the model's own generate divides steps among {length // size} blocks, which do not divide {steps}",
            hint="give a multiple of that, or take another --sampler",
        )
    return steps
