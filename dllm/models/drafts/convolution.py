"""The short convolution of DFlash 2: each slot takes in the slots before it in its block, with taps of its own.

Shape suffixes: N blocks, L slots of a block, O taps, D hidden, G groups of channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.drafts.layers import Linear


class _Convolve(torch.autograd.Function):
    """Mix slots by taps, with few passes over memory: autograd would take four times as many.

    A product with the zeros and ones of channels_DG spreads a delta over its group's channels, or sums over them: exact
    one way, in float32 the other, and faster than broadcasting over groups of a few channels.
    Shapes: x_NLD, delta_NLOG in one dtype, base_OD float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, base: Tensor, channels: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, base, channels)
        mixed = _coefficient(delta, base, channels, 0).mul_(x)
        for tap in range(1, min(len(base), x.shape[1])):
            mixed[:, tap:].addcmul_(_coefficient(delta, base, channels, tap)[:, tap:], x[:, :-tap])
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, delta, base, channels = ctx.saved_tensors
        grad_delta, grad_base, product = torch.zeros_like(delta), torch.zeros_like(base), torch.empty_like(x)
        grad_x = _coefficient(delta, base, channels, 0).mul_(grad)
        for tap in range(min(len(base), x.shape[1])):
            if tap:
                grad_x[:, :-tap] += _coefficient(delta, base, channels, tap).mul_(grad)[:, tap:]
                product[:, :tap] = 0
            torch.mul(grad[:, tap:], x[:, : x.shape[1] - tap], out=product[:, tap:])
            grad_delta[:, :, tap] = product @ channels
            grad_base[tap] = product.sum((0, 1))  # adds up in float32
        return grad_x, grad_delta, grad_base, None


def _coefficient(delta: Tensor, base: Tensor, channels: Tensor, tap: int) -> Tensor:
    return F.linear(delta[:, :, tap].contiguous(), channels, base[tap].to(delta.dtype))


class Convolution(nn.Module):
    """Two causal convolutions over the slots of a block, around a sublayer.

    y[t, c] = sum over taps o of (base[o, c] + delta[t, o, group of c]) * x[t - o, c], with zeros before slot 0. Both
    sets of deltas are projected from the sublayer's normed input. Slots stand on the last axis but one, so that no tap
    reaches into another block.
    """

    def __init__(self, hidden_size: int, taps: int, group_size: int) -> None:
        super().__init__()
        self.taps, self.groups = taps, hidden_size // group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden_size))
        self.kernel_projection = Linear(hidden_size, 2 * taps * self.groups)
        channels_DG = torch.eye(self.groups).repeat_interleave(group_size, 0)
        self.register_buffer("channels_DG", channels_DG, persistent=False)

    def deltas(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Project the deltas before and after the sublayer. Shapes: (..., L, D) -> two of (..., L, O, G)."""
        before, after = self.kernel_projection(normed).unflatten(-1, (2, self.taps, self.groups)).unbind(-3)
        return before, after

    def convolve(self, x: Tensor, delta: Tensor, place: int) -> Tensor:
        """Convolve before the sublayer (place 0) or after it (1). Shapes: x (..., L, D), delta (..., L, O, G)."""
        channels_DG = cast(Tensor, self.channels_DG).to(x.dtype)
        blocks, deltas = x.reshape(-1, *x.shape[-2:]), delta.reshape(-1, *delta.shape[-3:])
        mixed: Tensor = _Convolve.apply(blocks, deltas, self.base_kernel[place], channels_DG)
        return mixed.view(x.shape)
