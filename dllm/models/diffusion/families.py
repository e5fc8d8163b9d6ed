"""Find the family of a diffusion LM from its config.json, and load the model: the one way in which it is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models import targets
from dllm.models.diffusion.config import config_at, read_config
from dllm.models.diffusion.protocol import DiffusionLM, eos_ids_of
from dllm.models.mask_token import settle_mask_token
from dllm.registry import DIFFUSION_LMS

DEFAULT = "transformers"
"""The family of a checkpoint that no other one recognises."""


def family_at(directory: Path) -> type[DiffusionLM]:
    """Return the family of the model in a directory."""
    return family_of(config_at(directory))


def family_of(config: Mapping[str, Any]) -> type[DiffusionLM]:
    """Return the family of a model with that config.json."""
    families: list[type[DiffusionLM]] = [family for _, family in DIFFUSION_LMS.items() if family.recognises(config)]
    return families[0] if families else DIFFUSION_LMS[DEFAULT]


def family_to_run(directory: Path, trust_remote_code: bool) -> type[DiffusionLM]:
    """Return the family by which a directory's model runs; without trust none that runs its own code.

    Raises:
        ModelError: it runs code of its own, and no family knows that code.
    """
    config = config_at(directory)
    family = family_of(config)
    runs_own_code = trust_remote_code and any(name.startswith("AutoModel") for name in config.get("auto_map") or ())
    if runs_own_code and not family.runs_own_code:
        others = ", ".join(name for name, each in DIFFUSION_LMS.items() if each.runs_own_code)
        raise ModelError(
            f"a model of type {config.get('model_type')!r} with code of its own is none of {others}: "
            "its logits may be those of the next token, and its attention another",
            where=str(directory / "config.json"),
            hint="docs/extending/model-family.md says how to add a family, for Dream's too",
        )
    return DIFFUSION_LMS[DEFAULT] if family.runs_own_code and not trust_remote_code else family


def load_diffusion_lm(
    target: Target,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    mask_token_id: int | None = None,
) -> DiffusionLM:
    """Load a model frozen and in evaluation mode, by its family and with a mask token.

    Args:
        target: which model; a checkpoint's `dllm.json` names its mask token.
        dtype: by default the target's.
        device: where to.
        mask_token_id: the mask token, where neither the checkpoint nor the tokenizer has one; null adds one.

    Raises:
        ModelError: the model cannot be read, or its `dllm.json` is malformed.
        ConfigError: the mask token is no row of the embedding, text uses it, or a published model has another one.
    """
    path = targets.locate(target)
    saved, found_there = read_config(path), family_at(path)
    family = family_to_run(path, target.trust_remote_code)
    tokenizer = targets.load_tokenizer(target)
    model = targets.load_target(target, dtype, device)
    explicit = mask_token_id if saved is None else saved.mask_token_id
    published_id = None if found_there.published is None else found_there.mask_token_id_in(config_at(path))
    if family is not found_there:  # LLaDA, read as a Llama
        explicit, published_id = published_id if explicit is None else explicit, None
    eos_ids = eos_ids_of(model, tokenizer)
    found = family(model, tokenizer, settle_mask_token(model, tokenizer, explicit, eos_ids, published_id))
    found.config = saved or found.config
    return found


def load_checkpoint(
    directory: Path,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> DiffusionLM:
    """Load what `DiffusionLM.save` wrote.

    Args:
        trust_remote_code: run the code that lies in the directory.

    Raises:
        ModelError: there is no such directory, it lacks tensors, or its `dllm.json` is malformed.
    """
    target = Target(model=str(directory), dtype="float32", trust_remote_code=trust_remote_code)
    return load_diffusion_lm(target, dtype, device)
