"""RMSNorm in training, on a CPU: as torch's, with few passes over memory.

torch has no fused kernel for it on CPUs: each of its dozen operations, forward and backward, reads and writes the whole
tensor in float32. Here a few hundred rows at a time go through all of them while they lie in the cache.
Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.

Shape suffixes: R rows, D normalised axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 1 << 17
"""Elements that go through all operations together: half a megabyte in float32, of which a few fit a core's cache."""

SPLIT = 1 << 15
"""From this length on, torch sums a row that is alone in several threads, in another order than one among others."""


class FewPasses(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, with the bits of `F.rms_norm`.

    Shapes: x (..., D), weight (D,), both of x's dtype; the mean is taken in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalise; only x and one factor per row are kept for the backward pass."""
        x_RD, scale_D = x.reshape(-1, x.shape[-1]), weight_D.float()
        out_RD, factor_R1 = torch.empty_like(x_RD), torch.empty(len(x_RD), 1, device=x.device)
        for part in _parts(x_RD):
            own_RD = x_RD[part].float()
            factor_R1[part] = own_RD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            out_RD[part] = own_RD.mul(factor_R1[part]).mul_(scale_D)
        ctx.save_for_backward(x_RD, weight_D, factor_R1)
        return out_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients by x and the weight, that of the weight summed in float32."""
        x_RD, weight_D, factor_R1 = ctx.saved_tensors
        grad_RD, scale_D = grad.reshape(x_RD.shape), weight_D.float()
        by_x_RD, by_weight_D = torch.empty_like(x_RD), torch.zeros_like(scale_D)
        for part in _parts(x_RD):
            normed_RD = x_RD[part].float() * factor_R1[part]
            own_RD = grad_RD[part].float()
            by_weight_D += torch.mul(own_RD, normed_RD).sum(0)
            own_RD = own_RD * scale_D  # of float32, own_RD was a view of the gradient
            along_R1 = torch.mul(own_RD, normed_RD).mean(-1, keepdim=True)
            by_x_RD[part] = own_RD.addcmul_(normed_RD, along_R1, value=-1).mul_(factor_R1[part])
        return by_x_RD.view(grad.shape), by_weight_D.to(weight_D.dtype), None


def _parts(x_RD: Tensor) -> Iterator[slice]:
    rows, length = x_RD.shape
    size = max(1, rows if x_RD.is_meta or length >= SPLIT else ELEMENTS // max(1, length))
    return (slice(start, start + size) for start in range(0, rows, size))
