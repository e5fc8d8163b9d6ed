"""The draft a training run starts from: new, with random weights, or a published one."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

from transformers import DynamicCache

from dllm.config.params import Target
from dllm.decoding.together import can_batch
from dllm.errors import ModelError
from dllm.methods.dflash.abilities import Decoded
from dllm.methods.dflash.settings import Dflash
from dllm.models import hub
from dllm.models.drafts.checkpoint import (
    check_fit,
    check_mask_embedding,
    check_shapes,
    check_tensors,
    draft_directory,
    load_draft,
    read_config,
)
from dllm.models.drafts.protocol import Draft, DraftConfig
from dllm.models.mask_token import draft_mask_id
from dllm.models.target_config import logit_switch
from dllm.models.targets import empty_target, load_tokenizer
from dllm.outside import one_line
from dllm.prompts.template import stop_ids
from dllm.registry import DRAFTS


def check_models(settings: Dflash, target: Target) -> Decoded:
    """Check by their configs that the target can be tapped, and that the draft fits it; no weights are read.

    Returns: how prompts can be decoded with a draft.

    Raises:
        ConfigError, ModelError: what `initial_draft` would refuse.
    """
    model: Any = empty_target(target)
    where = f"target.model: {target.model}"
    can_decode = bool(DynamicCache(config=model.config).is_croppable)
    if not can_decode and not getattr(model.config.get_text_config(), "num_attention_heads", None):
        message = "this target keeps a recurrent state, and has no attention whose shape a draft could take"
        raise ModelError(message, where=where)
    if not hasattr(model.get_decoder(), "layers") or model.get_output_embeddings() is None:
        raise ModelError(f"a target of type {model.config.model_type!r} has no decoder layers to tap", where=where)
    if model.get_output_embeddings().bias is not None:  # decoding would add it to the draft's logits
        raise ModelError("the target's head has a bias (lm_head_bias), which training leaves out", where=where)
    if settings.distill and (switch := logit_switch(model.config)):
        what = f"the target has {switch}, which distillation does not apply to its logits"
        raise ModelError(what, where=f"train.dflash.distill: {settings.distill:g}", hint="set it to 0")
    tokenizer = load_tokenizer(target)
    if settings.draft.init == "random":
        new_config(settings, model, tokenizer)
    else:
        directory = draft_directory(settings.draft.init, settings.draft.revision)
        published, config = read_config(directory)
        family: type[Draft] = DRAFTS[settings.draft.architecture]
        family.start_config(published, config, settings.draft)
        check_fit(config, model.config, settings.draft.init)
        check_mask_embedding(directory)
        _published_config(settings, config, model, tokenizer)
        commit, name = hub.commit_of(directory), settings.draft.init
        if commit is None or any(directory.glob("*.safetensors")):
            check_tensors(directory, published, config)
        elif (shapes := hub.tensor_shapes(name, commit)) is not None:
            check_shapes(shapes, published, config, name)
        else:
            what = "its tensors cannot be listed now; train checks them when it has downloaded the weights"
            print(f"draft {one_line(name)}: {what}", file=sys.stderr, flush=True)
    if not can_decode:
        return "none"
    return "together" if can_batch(model) else "alone"


def new_config(settings: Dflash, target: Any, tokenizer: Any) -> DraftConfig:
    """Size a new draft by its target, and choose its mask id; raises as `initial_draft` does."""
    rows = target.get_input_embeddings().weight.shape[0]
    mask_id = draft_mask_id(settings.mask_token_id, tokenizer, rows, _stops(target, tokenizer))
    family: type[Draft] = DRAFTS[settings.draft.architecture]
    return family.config_for(target.config, settings.draft, block_size=settings.block_size, mask_token_id=mask_id)


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
    if settings.draft.init != "random":
        published = load_draft(settings.draft.init, target.config, settings.draft.revision)
        draft = family.start_from(published, settings.draft, seed)
        draft.config = _published_config(settings, draft.config, target, tokenizer)
        return draft
    draft = family(new_config(settings, target, tokenizer))
    draft.reset_parameters(seed)
    return draft


def _published_config(settings: Dflash, config: DraftConfig, target: Any, tokenizer: Any) -> DraftConfig:
    """Return a published draft's config with the block size of the settings, after checking what else they say."""
    draft = settings.draft
    said = {
        "mask_token_id": ("mask_token_id", settings.mask_token_id),
        "draft.target_layer_ids": ("target_layer_ids", draft.target_layer_ids and tuple(draft.target_layer_ids)),
        "draft.sliding_window": ("sliding_window", draft.sliding_window),
        "draft.layer_types": ("layer_types", draft.layer_types and tuple(draft.layer_types)),
        "draft.causal": ("is_causal", draft.causal),
    }
    for key, (field, value) in said.items():
        trained = getattr(config, field, value)
        if value not in (None, trained):
            raise ModelError(
                f"the draft was trained with {field} {trained}, params say {value}",
                where=f"train.dflash.{key}",
                hint="leave it null to take the draft's",
            )
    rows = target.get_input_embeddings().weight.shape[0]
    draft_mask_id(config.mask_token_id, tokenizer, rows, _stops(target, tokenizer))
    if getattr(config, "num_target_layers", 0) is None:  # some files leave it out, and some engines need it
        config = replace(cast(Any, config), num_target_layers=target.config.get_text_config().num_hidden_layers)
    return config.with_block_size(settings.block_size) if settings.block_size else config


def _stops(target: Any, tokenizer: Any) -> set[int]:
    return stop_ids(tokenizer, target.generation_config, target.config.get_text_config())
