"""What a run of `mdlm` or `hybrid` needs: counted from the settings and the shape of the model alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dllm.methods.diffusion.settings import Masking
from dllm.methods.method import PlanContext
from dllm.models.experts import weights_per_token
from dllm.models.precision import compute_dtype
from dllm.training.optimizer import moment_bytes
from dllm.training.plan import LOGIT_COPIES, Plan

LAYER_STATES = 17
"""Hidden states that a layer keeps for the backward pass, with fused attention: 34 bytes per channel in 16 bits.

Source: Korthikanti et al. 2022, section 4.1, without the scores of attention."""


def plan(ctx: PlanContext[Any]) -> Plan:
    """Count parameters, memory and operations; nothing is loaded."""
    settings: Masking = ctx.settings
    train, work, model = ctx.params.train, ctx.workload, ctx.target
    dtype = compute_dtype(train.compute_dtype, ctx.device)
    decoder, config = model.get_decoder(), model.config.get_text_config()
    size = sum(parameter.numel() for parameter in model.parameters())
    adapters = _adapters(model, settings)
    pieces = ctx.ranks if settings.fsdp else 1
    passes = 2 if settings.attention == "block" else 1  # noisy text beside clean text
    tokens = train.batch_size * work.longest * passes
    states = LAYER_STATES * config.num_hidden_layers
    if settings.activation_checkpointing:  # the inputs of all layers, and one layer at a time
        states = config.num_hidden_layers + LAYER_STATES
    activations = tokens * config.hidden_size * states * dtype.itemsize
    head = model.get_output_embeddings().weight
    memory = {
        "weights": size * dtype.itemsize if adapters else 4 * size // pieces,
        "gradients": 4 * (adapters or size) // pieces,
        "optimizer": 8 * adapters if adapters else moment_bytes(model.float(), train.optimizer) // pieces,
        "weights in the compute dtype": 0 if adapters or dtype is torch.float32 else size * dtype.itemsize,
        "activations": activations,
        "logits at one time": min(settings.ce_chunk_size, tokens) * head.shape[0] * LOGIT_COPIES * 4,
    }
    sequences = train.batch_size * train.grad_accumulation * ctx.ranks
    times = 4 if adapters else 6
    used = weights_per_token(decoder, config)
    body = sum(number for parameter, number in used if parameter.ndim > 1) - _embedding(model).numel()
    attention = 6 * passes**2 * work.length**2 * 2 * config.num_hidden_layers * config.hidden_size
    scored = sequences * work.supervised / 2  # half of the response is masked, on average
    step: Mapping[str, float] = {
        "model": sequences * (times * body * work.length * passes + attention),
        "head": times * head.numel() * scored,
    }
    parameters = {"model": size} | ({"adapters, trained": adapters} if adapters else {})
    return Plan(parameters, memory, step, notes=("validation and checkpoints are not counted",))


def _adapters(model: nn.Module, settings: Masking) -> int:
    """Count the weights of LoRA adapters; 0 where all weights are trained."""
    if settings.lora is None:
        return 0
    named = set(settings.lora.target_modules)
    layers = [each for name, each in model.named_modules() if name.rpartition(".")[2] in named]
    return sum(settings.lora.rank * sum(each.weight.shape) for each in layers if isinstance(each, nn.Linear))


def _embedding(model: Any) -> nn.Parameter:
    weight: nn.Parameter = model.get_input_embeddings().weight
    return weight
