"""The draft a training run starts from: random, copied from the target's last layers, or a published one."""

from __future__ import annotations

from typing import Any

import torch

from dllm.config.params import Dflash
from dllm.errors import ModelError
from dllm.models.drafts.config import for_target
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.mask_token import draft_mask_id
from dllm.models.targets import stop_ids


def initial_draft(settings: Dflash, target: Any, tokenizer: Any, seed: int) -> DFlashDraft:
    """Make or load the draft, with block size and mask id settled and checked against the target.

    Args:
        settings: the dflash section.
        target: a transformers causal model.
        tokenizer: its tokenizer.
        seed: of random weights.

    Raises:
        ConfigError: the mask id is no row of the target's embedding, or text uses it.
        ModelError: a published draft is missing or does not fit the target.
    """
    wanted = settings.draft
    rows = target.get_input_embeddings().weight.shape[0]
    stops = stop_ids(target, tokenizer)
    if wanted.init not in ("random", "target"):
        return _published(settings, target, tokenizer, rows, stops)
    shape = for_target(
        target.config,
        num_hidden_layers=wanted.num_hidden_layers,
        block_size=settings.block_size,
        mask_token_id=draft_mask_id(settings.mask_token_id, tokenizer, rows, stops),
        taps=wanted.num_target_layers_tapped,
        target_layer_ids=tuple(wanted.target_layer_ids) if wanted.target_layer_ids else None,
        sliding_window=wanted.sliding_window,
    )
    draft = DFlashDraft(shape)
    draft.reset_parameters(seed)
    if wanted.init == "target":
        _copy_last_layers(draft, target)
    return draft


def _published(settings: Dflash, target: Any, tokenizer: Any, rows: int, stops: set[int]) -> DFlashDraft:
    from dllm.models.drafts.checkpoint import load_draft

    draft = load_draft(settings.draft.init, target.config)
    shape = draft.config
    if settings.mask_token_id is not None and settings.mask_token_id != shape.mask_token_id:
        raise ModelError(
            f"the draft was trained with mask id {shape.mask_token_id}, params say {settings.mask_token_id}",
            where="train.dflash.mask_token_id",
            hint="leave it null to take the draft's",
        )
    draft_mask_id(shape.mask_token_id, tokenizer, rows, stops)
    if settings.block_size:
        draft.config = shape.with_block_size(settings.block_size)
    return draft


def _copy_last_layers(draft: DFlashDraft, target: Any) -> None:
    """Start each draft layer as a copy of one of the target's last, as far as names and shapes agree."""
    layers = target.get_decoder().layers
    first = len(layers) - len(draft.layers)
    if first < 0:
        raise ModelError(
            f"the target has {len(layers)} layers, fewer than the draft's {len(draft.layers)}",
            where="train.dflash.draft.num_hidden_layers",
        )
    with torch.no_grad():
        for index, layer in enumerate(draft.layers):
            source = dict(layers[first + index].named_parameters())
            for name, parameter in layer.named_parameters():
                if name in source and source[name].shape == parameter.shape:
                    parameter.copy_(source[name])
