"""Pick next tokens: greedy, or by temperature and nucleus, each row from its own random stream.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.engines.engine import Request

NUCLEUS = 128
"""Likeliest tokens looked at first: a full sort of the vocabulary costs more than the model's own forward pass."""


def pick(logits_BV: Tensor, rows: Sequence[Request | None], generators: Sequence[torch.Generator]) -> list[int]:
    """Return one token a row; None rows get a token that means nothing.

    A row that samples draws exactly one number from its generator, so its answer does not depend on its neighbours.
    """
    best_B: list[int] = logits_BV.max(-1).indices.tolist()
    for index, row in enumerate(rows):
        if row is not None and row.temperature > 0:
            best_B[index] = _sample(logits_BV[index], row.temperature, row.top_p, generators[index])
    return best_B


def _sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Invert the cumulative distribution of the nucleus at a uniform draw."""
    # One row at a time: sums over several rows are cut into chunks by how many there are.
    probs_V = torch.softmax(logits_V.float() / temperature, -1)
    ids_V: Tensor | None = None
    if top_p < 1:
        likely_K, ids_K = probs_V.topk(min(NUCLEUS, len(probs_V)))
        if float(likely_K.sum()) >= top_p:  # the nucleus ends among the likeliest
            probs_V, ids_V = likely_K, ids_K
        else:
            probs_V, ids_V = probs_V.sort(descending=True, stable=True)
        probs_V = torch.where(probs_V.cumsum(-1) - probs_V < top_p, probs_V, 0.0)
    total_V = probs_V.cumsum(-1)
    point = torch.rand((), generator=generator) * total_V[-1].cpu()
    index = int(torch.searchsorted(total_V, point.to(total_V.device), right=True))
    # Rounding can push the point past the last place that holds probability.
    index = min(index, int(probs_V.nonzero()[-1]))
    return index if ids_V is None else int(ids_V[index])
