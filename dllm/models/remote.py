"""Diffusion models that bring their own code: LLaDA, LLaDA2 and Nemotron-Labs-Diffusion behind the calls of the others.

Owns what is known of each by its `model_type`: mask token, blocks, and what its forward pass accepts.

Shape suffixes: B batch, S sequence, Q query columns, K key columns, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dllm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """A published family."""

    mask_token_id: int
    mode: Literal["mdlm", "hybrid"]
    block_size: int | None
    masks: Literal["none", "additive", "own"]
    """What its forward pass accepts: no mask that can be relied on; a 4-dimensional one that is added to scores; masks
    that only its own generation knows how to set."""


KINDS = {
    "llada": Kind(126336, "mdlm", None, "none"),
    "llada2_moe": Kind(156895, "mdlm", 32, "additive"),
    "nemotron_labs_diffusion": Kind(100, "hybrid", 32, "own"),
}
"""By `model_type`. Source: the models' configs and generation code; older code of LLaDA ignores padding masks (its
issues 89 and 105)."""


def kind_of(model: PreTrainedModel) -> Kind | None:
    """Tell which published family a model with code of its own belongs to; None for transformers' own models."""
    if not type(model).__module__.startswith("transformers_modules"):
        return None
    return KINDS.get(model.config.model_type)


def published(directory: Path) -> bool:
    """Tell from its config whether a directory holds a model of such a family."""
    try:
        return json.loads((directory / "config.json").read_text()).get("model_type") in KINDS
    except (OSError, ValueError, AttributeError):
        return False


def run(
    model: PreTrainedModel,
    kind: Kind,
    ids_BQ: Tensor,
    valid_BQ: Tensor | None,
    position_ids_BQ: Tensor,
    visible_BQK: Tensor | None,
) -> Tensor:
    """Run a model's own forward pass; return hidden_BQD.

    Raises:
        ModelError: its code cannot do what is asked, or its head cannot be left out.
    """
    if kind.masks == "own":
        raise ModelError(
            "this model's code sets its own masks", where=model.config.model_type, hint="use --own-generate"
        )
    with _without_head(model) as width:
        if kind.masks == "additive":
            if visible_BQK is None:
                visible_BQK = torch.ones(*ids_BQ.shape, ids_BQ.shape[1], dtype=torch.bool, device=ids_BQ.device)
            scores = torch.zeros(visible_BQK.shape, dtype=model.dtype, device=ids_BQ.device)
            scores = scores.masked_fill(~visible_BQK, torch.finfo(model.dtype).min)
            return _checked(model(ids_BQ, attention_mask=scores[:, None], position_ids=position_ids_BQ).logits, width)
        if valid_BQ is None or bool(valid_BQ.all()):
            return _checked(model(ids_BQ).logits, width)
        # Whether this code heeds padding masks depends on its age: rows go one by one, without padding.
        found = None
        for row, valid_Q in enumerate(valid_BQ):
            hidden_1SD = _checked(model(ids_BQ[row : row + 1, valid_Q]).logits, width)
            if found is None:
                found = hidden_1SD.new_zeros(*ids_BQ.shape, width)
            found[row, valid_Q] = hidden_1SD[0]
        assert found is not None
        return found


def _checked(hidden: Tensor, width: int) -> Tensor:
    if hidden.shape[-1] != width:
        raise ModelError("the model's code does not go through its output embedding", hint="use --own-generate")
    return hidden


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[int]:
    """Let a model's head pass its input through, so that logits are computed only where they are wanted."""
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise ModelError("the model has no linear output embedding", where=model.config.model_type)
    head: Any = found
    head.forward = lambda x: x
    try:
        yield head.in_features
    finally:
        del head.forward
