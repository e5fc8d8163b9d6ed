"""Losses of a draft: how the slots of a block are weighed, and what the weighted sum is divided by.

A loss is one function and one line of `dllm.registry.OBJECTIVES`. All see the same cross-entropy, against the true
tokens or, by the share `train.dflash.distill`, against the target's distribution.

Shape suffixes: N blocks, P draft tokens of a block, M slots that have a label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.models.drafts.loss_terms import ScoredSlots

PAPER_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


@dataclass(frozen=True)
class Weighting:
    """The loss as sums: (sum of weights_M times the slots' cross-entropy, plus `term`) / denominator.

    Shapes: weights_M float32 without gradient; term a scalar with gradient, a loss term beyond the cross-entropy.
    """

    weights_M: Tensor
    denominator: float
    term: Tensor | None = None


Objective = Callable[[ScoredSlots, float], Weighting]
"""Takes the scored slots and `train.dflash.loss_decay_gamma`."""


def decay(slots: ScoredSlots, gamma: float) -> Weighting:
    """Weigh offsets by `decay_weights`; the loss is a weighted mean over slots.

    Source: DFlash, equation 4.
    """
    valid_BNP = slots.valid_BNP
    weights_P = decay_weights(valid_BNP.shape[-1] + 1, gamma).to(valid_BNP.device)
    denominator = float((valid_BNP.sum((0, 1)) * weights_P.double()).sum())
    return Weighting(weights_P.expand(valid_BNP.shape)[valid_BNP], denominator)


def dpace(slots: ScoredSlots, gamma: float) -> Weighting:
    """Weigh offsets by the draft's own confidence (`dpace_weights`); the loss is a mean over blocks.

    Source: D-PACE, alpha 0.5.
    """
    valid_BNP = slots.valid_BNP
    prob_BNP = torch.ones(valid_BNP.shape, device=valid_BNP.device).masked_scatter(valid_BNP, (-slots.nll_M).exp())
    return Weighting(dpace_weights(prob_BNP, valid_BNP)[valid_BNP], float(valid_BNP.any(-1).sum()))


def decay_weights(block_size: int, gamma: float) -> Tensor:
    """Weigh offset k of a block by exp(-(k-1)/gamma), k = 1 .. block_size - 1.

    gamma 0 takes the paper's value for the block size, and half the block where the paper names none.
    Source: DFlash, equation 4.
    """
    gamma = gamma or PAPER_GAMMA.get(block_size, max(2.0, block_size / 2))
    return torch.exp(-torch.arange(block_size - 1, dtype=torch.float32) / gamma)


def dpace_weights(prob_NP: Tensor, valid_NP: Tensor, alpha: float = 0.5) -> Tensor:
    """Weigh offset k by the part of the expected accepted length that depends on it.

    With s = (1 - alpha) q + alpha (1 where invalid) and pi_k = prod_{j<=k} s_j, the weight is sum_{j>=k} pi_j.
    Shapes: prob_NP the draft's probability of the true token, valid_NP bool. Returns weights_NP without gradient.
    Source: D-PACE, full form.
    """
    smooth_NP = torch.where(valid_NP, (1 - alpha) * prob_NP + alpha, 1.0)
    return smooth_NP.cumprod(-1).flip(-1).cumsum(-1).flip(-1).detach()
