"""Optimizers and learning rate: AdamW, or Muon on matrices with AdamW on the rest; clipping; state without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dllm.config.params import Optimizer
from dllm.errors import ModelError
from dllm.models.sharding import shard_like
from dllm.training.muon import Muon

ADAMW_SHARE = 0.1
"""Beside Muon, AdamW takes this share of its rate (the 10:1 that vllm-project/speculators#979 settled on)."""


class Optimizers:
    """One or two torch optimizers that act as one.

    Args:
        model: whose parameters that require gradients are trained.
        settings: names the optimizer.
        adamw_rates: parameters that AdamW trains in any case, at a multiple of its rate and without decay, by name.
    """

    def __init__(self, model: nn.Module, settings: Optimizer, adamw_rates: Mapping[str, float] | None = None) -> None:
        rates = adamw_rates or {}
        self.settings = settings
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plain = [p for name, p in self.parameters.items() if name not in rates]
        matrices = [p for p in plain if p.ndim == 2]
        others = [p for p in plain if p.ndim != 2]
        muon = settings.name == "muon"
        self.parts: list[torch.optim.Optimizer] = []
        if muon and matrices:
            # RMS-matched: an orthogonal update scaled to the size of AdamW's, so that one rate fits every shape.
            self.parts.append(
                Muon([{"params": matrices, "peak_lr": settings.lr}], lr=settings.lr, weight_decay=settings.weight_decay)
            )
        # Norms and other vectors never decay: pulling a gain towards zero is no regularisation.
        lr = settings.lr * (ADAMW_SHARE if muon else 1)
        groups = [
            {"params": [] if muon else matrices, "weight_decay": settings.weight_decay, "peak_lr": lr},
            {"params": others, "weight_decay": 0.0, "peak_lr": lr},
            *({"params": [self.parameters[n]], "weight_decay": 0.0, "peak_lr": lr * rate} for n, rate in rates.items()),
        ]
        groups = [group for group in groups if group["params"]]
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True))

    def set_lr(self, factor: float) -> float:
        """Set each group's rate to factor times its peak, and return the rate of matrices."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return self.settings.lr * factor

    def clip(self) -> Tensor:
        """Scale gradients down to a global norm of clip_norm, and return the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        """Move the weights, and forget the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return every state tensor, named `<parameter>:<state>`; of a sharded model, DTensors.

        Rates are left out: they follow from the step.
        """
        return {
            f"{name}:{key}": value.detach().contiguous()
            for name, parameter in self.parameters.items()
            for part in self.parts
            for key, value in part.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned, in whole tensors.

        Raises:
            ModelError: a tensor belongs to no parameter here, or has another shape.
        """
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(":")
            parameter = self.parameters.get(name)
            if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
                raise ModelError(f"optimizer state {full_name} does not fit the model", hint="start the stage afresh")
            # AdamW counts its steps where its kernels want the count: beside the parameter when fused.
            owner[parameter].state[parameter][key] = (
                shard_like(tensor, parameter) if tensor.ndim else tensor.to(parameter.device, copy=True)
            )


def lr_factor(step: int, total: int, *, schedule: str, warmup_ratio: float) -> float:
    """Return what the peak rate is multiplied by at optimizer step `step` (0-based) of `total`.

    Rises linearly over the first int(warmup_ratio * total) steps, reaching 1 at the last of them; then `cosine` falls
    towards 0 and `constant` stays.

    Source: DFlash, appendix A.1 (cosine, 4 % warm-up).
    """
    warmup = int(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def moment_bytes(model: nn.Module, settings: Optimizer, adamw_rates: Mapping[str, float] | None = None) -> int:
    """Count what the moments of a model's parameters will take: two of each in AdamW, one in Muon. Units: bytes."""
    groups = [(part, group) for part in Optimizers(model, settings, adamw_rates).parts for group in part.param_groups]
    return sum(
        4 * parameter.numel() * (1 if isinstance(part, Muon) else 2)
        for part, group in groups
        for parameter in group["params"]
    )
