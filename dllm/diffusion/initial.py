"""The model that training starts from: the target with its causal mask lifted, or its mere shape."""

from __future__ import annotations

from typing import Literal

import torch

from dllm import config
from dllm.errors import ModelError
from dllm.models.bidirectional import BidirectionalLM, Note, load_bidirectional


def initial_model(target: config.Target, settings: config.Train, device: torch.device | str) -> BidirectionalLM:
    """Load the model to train, with float32 weights that may move.

    Raises:
        ModelError: the target cannot be read, or bends its logits in a way that the chunked loss does not know.
        ConfigError: the mask token does not fit the target.
    """
    masking = masking_of(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # an added mask row is drawn at random
        model = load_bidirectional(target, torch.float32, device, masking.mask_token_id)
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise ModelError("soft-capped logits cannot be trained here", where=f"target.model: {target.model}")
    if masking.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            fresh = type(model.model)(model.model.config)
        model.model.load_state_dict(fresh.state_dict())
    return model.requires_grad_(True)


def masking_of(settings: config.Train) -> config.Masking:
    """Return the section of the mode that trains."""
    return settings.hybrid if settings.mode == "hybrid" else settings.mdlm


def note_of(settings: config.Train, mask_token_id: int) -> Note:
    """Say how the trained model is to be decoded."""
    masking = masking_of(settings)
    mode: Literal["mdlm", "hybrid"] = "hybrid" if settings.mode == "hybrid" else "mdlm"
    return Note(mode, mask_token_id, masking.block_size if masking.attention == "block" else None)
