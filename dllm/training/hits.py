"""Whether the label is what the model would have said, from logits that are at hand anyway.

Shape suffixes: C rows of a chunk, V vocabulary, E ties.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_argmax(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Say where the label is the row's argmax; of equals the first wins, as with argmax.

    Asks only whether the label wins: on CPUs amax takes a fraction of argmax's time. Writes into logits_CV
    meanwhile, and leaves it as it was.

    Shapes: label_C int64. Returns hit_C bool.
    """
    place_C = torch.arange(len(label_C), device=label_C.device)
    own_C = logits_CV[place_C, label_C]
    logits_CV[place_C, label_C] = float("-inf")
    other_C = logits_CV.amax(-1)
    logits_CV[place_C, label_C] = own_C
    hit_C = own_C > other_C
    tie_E = (own_C == other_C).nonzero()[:, 0]  # coarse dtypes tie now and then
    hit_C[tie_E] = logits_CV[tie_E].argmax(-1) == label_C[tie_E]
    return hit_C
