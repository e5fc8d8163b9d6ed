"""The model that training starts from: the target with its causal mask lifted, its mere shape, or with adapters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch

from dllm.config.params import Target, Train
from dllm.errors import ConfigError, ModelError
from dllm.methods.diffusion.settings import Masking
from dllm.models import targets
from dllm.models.diffusion.families import family_to_run, load_diffusion_lm
from dllm.models.diffusion.lora import Adapter
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.precision import compute_dtype
from dllm.models.sharding import mesh_of_ranks, recompute_layers, shard
from dllm.models.target_config import logit_switch
from dllm.training.distributed import one_rank_at_a_time


def initial_model(target: Target, settings: Train, device: torch.device | str) -> DiffusionLM:
    """Load the model to train, with float32 weights that may move, or frozen ones beside float32 adapters.

    With `fsdp` each rank keeps its piece of the weights, and all ranks must call this; the main memory of a machine
    then holds one whole model at a time, however many ranks it has.

    Raises:
        ModelError: the target cannot be read, or bends its logits in a way that the chunked loss does not know.
        ConfigError: the mask token or the way of training does not fit the target.
        PeerLost: another rank went away while it read.
    """
    masking, device = _masking(settings), torch.device(device)
    mesh = mesh_of_ranks(device) if masking.fsdp else None
    with nullcontext() if mesh is None else one_rank_at_a_time(device):
        model = _whole_model(target, settings, device if mesh is None else "cpu")
        if masking.activation_checkpointing:
            recompute_layers(model)
        if mesh is not None:
            shard(model, mesh, compute_dtype(settings.compute_dtype, device))
    return model


def _whole_model(target: Target, settings: Train, device: torch.device | str) -> DiffusionLM:
    masking = _masking(settings)
    check_family(target, settings)
    dtype = torch.float32 if masking.lora is None else compute_dtype(settings.compute_dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # an added mask row is drawn at random
        model = load_diffusion_lm(target, dtype, device, mask_token_id=masking.mask_token_id)
        model = model.for_likelihood(masking.block_size)
    if switch := logit_switch(model.model_config):
        raise ModelError(f"logits with {switch} cannot be trained here", where=f"target.model: {target.model}")
    if masking.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            fresh = type(model.model)(model.model.config)
        model.model.load_state_dict(fresh.state_dict())
    if masking.lora is None:
        return model.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model.adapter = Adapter(model.model, masking.lora, target.model, target.revision)
    return model


def check_family(target: Target, settings: Train) -> None:
    """Refuse a way of training that a published model's own code cannot do, before its gigabytes are read.

    Raises:
        ConfigError: with the way that it can be trained.
    """
    family = family_to_run(targets.locate(target, weights=False), target.trust_remote_code)
    masking = _masking(settings)
    conflict = family.training_conflict(
        predicts_next=masking.predicts_next,
        by_block=masking.attention == "block",
        recomputes=masking.activation_checkpointing and not masking.fsdp,
    )
    if conflict:
        raise ConfigError(conflict, where=f"target.model: {target.model}")


def _masking(settings: Train) -> Masking:
    return cast(Masking, settings.method_settings)
