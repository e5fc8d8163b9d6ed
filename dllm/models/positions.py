"""How many positions a target has, for prompt and response together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dllm.config.params import Target
from dllm.models.target_config import ROPE_SECTIONS
from dllm.models.targets import locate

UNBOUNDED = 1 << 30
"""Positions of a model whose config names none."""
ORIGINAL = "original_max_position_embeddings"


def max_positions(target: Target) -> int | None:
    """Read how many positions the target has, for prompt and response together; None where its config does not say."""
    try:
        config = json.loads((locate(target) / "config.json").read_bytes())
        return positions_in(config.get("text_config") or config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def positions_in(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a config names, with those that yarn adds; None where it names none.

    Those of longrope end where its second set of frequencies would begin: a row beyond it changes the embeddings of all
    rows of its batch, so that a response or a feature would depend on its neighbours.
    """
    named = (config.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length"))
    positions = next((int(value) for value in named if value), None)
    for section in ROPE_SECTIONS:
        scaling = config.get(section) or {}
        kind = scaling.get("rope_type") or scaling.get("type")
        original = scaling.get(ORIGINAL) or config.get(ORIGINAL)
        if positions and kind == "yarn":  # transformers, too, takes all positions where there is no other number
            positions = max(positions, int((original or positions) * scaling["factor"]))
        elif positions and original and kind in ("longrope", "su"):  # its older name
            positions = min(positions, int(original))
    return positions
