"""Cross-entropy against a frozen head, a chunk of rows at a time, and the weights of a block's offsets.

Shape suffixes: M rows (block positions that count), D hidden, V vocabulary, N blocks, P predicted slots of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAPER_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def decay_weights(block_size: int, gamma: float) -> Tensor:
    """Weigh offset k of a block by exp(-(k-1)/gamma), k = 1 .. block_size - 1.

    gamma 0 takes the paper's value for the block size, and half the block where the paper names none.
    Source: DFlash, equation 4.
    """
    gamma = gamma or PAPER_GAMMA.get(block_size, max(2.0, block_size / 2))
    return torch.exp(-torch.arange(block_size - 1, dtype=torch.float32) / gamma)


def dpace_weights(prob_NP: Tensor, valid_NP: Tensor, alpha: float = 0.5) -> Tensor:
    """Weigh offset k by how much of the expected accepted length hangs on it.

    With s = (1 - alpha) q + alpha (1 where invalid) and pi_k = prod_{j<=k} s_j, the weight is sum_{j>=k} pi_j.
    Shapes: prob_NP the draft's probability of the right token, valid_NP bool. Returns weights_NP without gradient.
    Source: D-PACE, full form.
    """
    smooth_NP = torch.where(valid_NP, (1 - alpha) * prob_NP + alpha, 1.0)
    return smooth_NP.cumprod(-1).flip(-1).cumsum(-1).flip(-1).detach()
