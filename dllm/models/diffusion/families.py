"""Recognise the family of a diffusion LM from its config.json, before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.registry import DIFFUSION_LMS

if TYPE_CHECKING:
    from dllm.models.diffusion.bidirectional import BidirectionalLM

DEFAULT = "transformers"
"""The family of a checkpoint that no other family recognises."""


def family_at(directory: Path) -> type[BidirectionalLM]:
    """Return the family of the model in a directory."""
    config = config_at(directory)
    for _, family in DIFFUSION_LMS.items():
        if family.recognises(config):
            return family
    return DIFFUSION_LMS[DEFAULT]


def family_to_run(directory: Path, trust_remote_code: bool) -> type[BidirectionalLM]:
    """Return the family by which a directory's model runs; without trust none that runs its own code."""
    family = family_at(directory)
    if family.runs_own_code and not trust_remote_code:
        return DIFFUSION_LMS[DEFAULT]
    return family


def config_at(directory: Path) -> dict[str, Any]:
    """Return the content of config.json; empty where it cannot be read."""
    try:
        found = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
