"""How many masked tokens a step commits: by plan, by confidence above a threshold, or by the factor rule.

All rules commit the best-scored tokens; they differ in how many. Shape suffixes: B batch, C columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planned_counts(masks: int, steps: int) -> list[int]:
    """Spread masks over steps as evenly as can be, larger counts first; with more steps than masks some are 0.

    Source: LLaDA (Nie et al. 2025), its generation code.
    """
    each, left = divmod(masks, steps)
    return [each + (step < left) for step in range(steps)]


def threshold_counts(score_BC: Tensor, threshold: float, least_B: Tensor) -> Tensor:
    """Count the scores above the threshold (strictly, so that 1 asks for one at a time), and no fewer than `least_B`.

    Shapes: score_BC holds -inf where there is nothing to commit; returns count_B.
    Source: Fast-dLLM (arXiv 2505.22618), section 3.3; LLaDA2.0 (arXiv 2512.15745), its generation code.
    """
    return (score_BC > threshold).sum(1).maximum(least_B)


def factor_counts(score_BC: Tensor, factor: float) -> Tensor:
    """Count the n best for which (n + 1) (1 - c_n) < factor, and at least one; c_n is the n-th best probability.

    For factor <= 1 all of them agree with the joint's most likely choice, if the probabilities come from one joint.
    Shapes: as in `threshold_counts`.
    Source: Fast-dLLM, theorem 1.
    """
    best_BC = score_BC.sort(1, descending=True).values.double()
    rank_C = torch.arange(1, best_BC.shape[1] + 1, device=best_BC.device)
    return ((rank_C + 1) * (1 - best_BC) < factor).sum(1).clamp_min(1)


def best(score_BC: Tensor, count_B: Tensor) -> Tensor:
    """Mark each row's `count_B` best scores, never one of -inf; among equals the leftmost. Shapes: returns bool_BC."""
    order_BC = score_BC.argsort(dim=1, descending=True, stable=True)
    rank_BC = torch.empty_like(order_BC)
    places_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    rank_BC.scatter_(1, order_BC, places_C.expand_as(order_BC))
    return (rank_BC < count_B[:, None]) & (score_BC > float("-inf"))
