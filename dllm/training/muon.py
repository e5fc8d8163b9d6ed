"""Muon, with its products in the dtype that the device computes in.

Shape suffixes: N rows and M columns of a matrix, R the shorter side, C the longer one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dllm.models.precision import compute_dtype


class Muon(torch.optim.Muon):
    """torch.optim.Muon with updates of AdamW's size, in float32 where a CPU has no instructions for bfloat16.

    torch orthogonalizes in bfloat16 on every device. Such a CPU emulates those products, and they would take four
    fifths of a training step. Elsewhere this is torch's own step. The state is the same.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; the size: Liu et al. 2025, Muon is Scalable for LLM
        Training, equation 4.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the matrices that have a gradient; with a closure, as torch does."""
        devices = {parameter.device for group in self.param_groups for parameter in group["params"]}
        if closure is not None or all(compute_dtype(torch.bfloat16, device) == torch.bfloat16 for device in devices):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return None

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = orthogonalized(grad.lerp(buffer, group["momentum"]), group["ns_coefficients"], group["ns_steps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalized(matrix_NM: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations, in its own dtype.

    Args:
        matrix_NM: the matrix.
        coefficients: a, b, c of X <- a X + (b G + c G G) X with G = X X^T.
        steps: iterations.

    Shapes: returns (N, M).
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    is_tall = matrix_NM.shape[0] > matrix_NM.shape[1]
    x_RC = matrix_NM.T if is_tall else matrix_NM
    x_RC = x_RC / x_RC.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.T
        x_RC = torch.addmm(x_RC, torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c), x_RC, beta=a)
    return x_RC.T if is_tall else x_RC
