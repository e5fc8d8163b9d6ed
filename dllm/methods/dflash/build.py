"""The draft a training run starts from: new, with random weights, or a published one."""

from __future__ import annotations

from typing import Any

from dllm.errors import ModelError
from dllm.methods.dflash.settings import Dflash
from dllm.models.drafts.checkpoint import load_draft
from dllm.models.drafts.protocol import Draft
from dllm.models.mask_token import draft_mask_id
from dllm.models.targets import stop_ids
from dllm.registry import DRAFTS


def initial_draft(settings: Dflash, target: Any, tokenizer: Any, seed: int) -> Draft:
    """Create or load the draft, with its block size and mask id set and checked against the target.

    Args:
        settings: the dflash section.
        target: a transformers causal model.
        tokenizer: its tokenizer.
        seed: of random weights.

    Raises:
        ConfigError: the mask id is no row of the target's embedding, or text uses it.
        ModelError: a published draft is missing, of another architecture, or does not fit the target.
    """
    family: type[Draft] = DRAFTS[settings.draft.architecture]
    rows = target.get_input_embeddings().weight.shape[0]
    stops = stop_ids(target, tokenizer)
    if settings.draft.init != "random":
        draft = family.start_from(load_draft(settings.draft.init, target.config))
        trained_id = draft.config.mask_token_id
        if settings.mask_token_id not in (None, trained_id):
            raise ModelError(
                f"the draft was trained with mask id {trained_id}, params say {settings.mask_token_id}",
                where="train.dflash.mask_token_id",
                hint="leave it null to take the draft's",
            )
        draft_mask_id(trained_id, tokenizer, rows, stops)
        if settings.block_size:
            draft.config = draft.config.with_block_size(settings.block_size)
        return draft
    mask_id = draft_mask_id(settings.mask_token_id, tokenizer, rows, stops)
    config = family.config_for(target.config, settings.draft, block_size=settings.block_size, mask_token_id=mask_id)
    draft = family(config)
    draft.reset_parameters(seed)
    return draft
