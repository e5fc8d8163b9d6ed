"""Weights in the layout the CPU's matrix units want, made once instead of at every call.

For a few rows at a time, as in decoding, torch spends as long on reordering a weight as on multiplying by it.
oneDNN's packed form, which torch.compile's CPU backend uses, does away with that. Elsewhere nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 64
"""Rows the layout is chosen for; other numbers work as well, if not as fast."""


@contextmanager
def packed_linears(*models: nn.Module) -> Iterator[None]:
    """Let every nn.Linear of some models multiply by a packed copy of its weight while the context lasts.

    Weights must not change meanwhile. Costs the weights' size in memory once more.
    """
    changed = []
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Linear) and _can_pack(module.weight):
                module.forward = _packed_forward(module)  # type: ignore[method-assign,assignment]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def packed_product(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies by the transpose of a weight that never changes, packed if that is faster.

    Costs the weight's size in memory once more where it is packed.
    """
    if weight_OI.dtype != torch.bfloat16 or not _can_pack(weight_OI):
        return lambda x: x @ weight_OI.T
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), ROWS)
    return lambda x: multiply(x, packed, None, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _mkldnn_has_bfloat16()))
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _mkldnn_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
    bias, dtype = module.bias, module.weight.dtype

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype:
            return nn.functional.linear(x, module.weight, bias)
        return multiply(x, packed, bias, "none", [], "")

    return forward
