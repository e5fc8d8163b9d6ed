"""Which weights of a model a token uses: all, but of routed experts only the share that it is routed to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

TOTAL = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")
"""Names of both numbers in configs, of which a model has one each."""


def weights_per_token(module: nn.Module, config: Any) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield each parameter with the number of its weights that a forward pass uses for a token.

    Experts are found by their names, and by their number as the first of three axes; shared ones are no routed ones.

    Args:
        config: the text model's.
    """
    total, used = _number(config, TOTAL), _number(config, USED)
    share = min(1.0, used / total) if total and used else 1.0
    for name, parameter in module.named_parameters():
        is_routed = ".experts." in f".{name}" or (parameter.ndim == 3 and parameter.shape[0] == total)
        yield parameter, parameter.numel() * (share if is_routed else 1.0)


def _number(config: Any, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
