"""How many masked tokens a step commits: by plan, by confidence above a threshold, by the factor rule, or by entropy.

All rules commit the best-scored tokens; they differ in how many. Shape suffixes: B batch, C columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dllm.decoding.settings import Schedule, UnmaskingSettings


def commit_counts(score_BC: Tensor, planned_B: Tensor, settings: UnmaskingSettings) -> Tensor:
    """Count the tokens that a step commits in each row, by the rule that the settings choose.

    Shapes: score_BC holds -inf where there is nothing to commit; planned_B int64, at least 1; returns count_B.
    """
    if settings.factor is not None:
        return factor_counts(score_BC, settings.factor)
    if settings.entropy_bound is not None:
        return entropy_bound_counts(-score_BC, settings.entropy_bound)
    if settings.threshold is not None:
        # With `steps` given at least as many as planned, as in LLaDA2; else at least one.
        least_B = planned_B if settings.steps is not None else torch.ones_like(planned_B)
        return threshold_counts(score_BC, settings.threshold, least_B)
    return planned_B


def plan(masks: int, steps: int, schedule: Schedule) -> list[int]:
    """Plan how many masks each step commits; more steps than masks count as many as masks."""
    steps = max(1, min(steps, masks))
    return planned_counts(masks, steps) if schedule == "even" else derived_counts(masks, steps, cosine)


def cosine(t: float) -> float:
    """Return the share that is clean at time t of the cosine schedule. Source: MaskGIT (Chang et al. 2022)."""
    return 1 - math.cos(math.pi * (1 - t) / 2)


def transfer_shares(steps: int, alpha: Callable[[float], float]) -> list[float]:
    """Return what share of its masks each step unmasks, from time t = 1 to 0, so that a share alpha(t) is clean at t.

    It is (alpha(s) - alpha(t)) / (1 - alpha(t)) on the way from t to s, and 1 in the last step.
    Source: MDLM (Sahoo et al. 2024), its reverse posterior.
    """
    clean = [alpha(1 - step / steps) for step in range(steps)] + [1.0]
    return [(after - before) / (1 - before) for before, after in pairwise(clean)]


def derived_counts(masks: int, steps: int, alpha: Callable[[float], float]) -> list[int]:
    """Spread masks over steps by a noise schedule alpha, rounding what is left; a step without any is dropped.

    Source: as `transfer_shares`, with expected numbers in place of draws.
    """
    counts, left = [], masks
    for share in transfer_shares(steps, alpha):
        counts.append(round(left * share))
        left -= counts[-1]
    return [count for count in counts if count]


def planned_counts(masks: int, steps: int) -> list[int]:
    """Spread masks over steps as evenly as can be, larger counts first; with more steps than masks some are 0.

    Source: LLaDA (Nie et al. 2025), its generation code.
    """
    each, left = divmod(masks, steps)
    return [each + (step < left) for step in range(steps)]


def threshold_counts(score_BC: Tensor, threshold: float, least_B: Tensor) -> Tensor:
    """Count the scores strictly above the threshold (so that 1 gives one at a time), and no fewer than `least_B`.

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


def entropy_bound_counts(entropy_BC: Tensor, bound: float) -> Tensor:
    """Count the k positions of least entropy of which all but the last sum to at most `bound`; at least one.

    Shapes: entropy_BC holds inf where there is nothing to commit; returns count_B.
    Units: nats.
    Source: Ben-Hamu et al. 2025 (arXiv 2505.24857), and DiffusionGemma's generation in transformers.
    """
    least_BC = entropy_BC.sort(1).values.double()
    before_BC = torch.nn.functional.pad(least_BC.cumsum(1)[:, :-1], (1, 0))
    return ((before_BC <= bound) & least_BC.isfinite()).sum(1).clamp_min(1)


def best(score_BC: Tensor, count_B: Tensor) -> Tensor:
    """Mark each row's `count_B` best scores, never one of -inf; ties go to the left. Shapes: returns bool_BC."""
    order_BC = score_BC.argsort(dim=1, descending=True, stable=True)
    rank_BC = torch.empty_like(order_BC)
    ranks_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    rank_BC.scatter_(1, order_BC, ranks_C.expand_as(order_BC))
    return (rank_BC < count_B[:, None]) & (score_BC > float("-inf"))
