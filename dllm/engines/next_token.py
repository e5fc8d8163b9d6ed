"""The next token of each row of the in-process engine: the most probable, or one by temperature and nucleus.

Shape suffixes: B rows, V vocabulary, K the tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm.engines.engine import Request
from dllm.errors import ModelError

TOGETHER = 16
"""Rows sampled together: their probabilities fit the cache of a CPU, and a row alone keeps no second thread busy."""


def sample(logits_BV: Tensor, rows: Sequence[Request | None], generators: Sequence[torch.Generator]) -> list[int]:
    """Sample the next token of each row: greedily, or by temperature and nucleus; that of a None row means nothing.

    A row that samples draws one number per token from its own generator, so its response does not depend on the batch.

    Raises:
        ModelError: a logit is not a number, or the largest is not finite.
    """
    largest_B, ids_B = logits_BV.max(-1)
    if any(row is not None and not finite for row, finite in zip(rows, largest_B.isfinite().tolist(), strict=True)):
        hint = "target.dtype has too small a range, or its training has diverged"
        raise ModelError("the target's logits are not numbers", hint=hint)
    tokens_B: list[int] = ids_B.tolist()
    asked = [index for index, row in enumerate(rows) if row is not None and row.temperature > 0]
    for start in range(0, len(asked), TOGETHER):
        indices = asked[start : start + TOGETHER]
        some: list[Any] = [rows[index] for index in indices]
        found = _sample_rows(logits_BV[indices], some, [generators[index] for index in indices])
        for index, token in zip(indices, found, strict=True):
            tokens_B[index] = token
    return tokens_B


def _sample_rows(logits_BV: Tensor, rows: Sequence[Request], generators: Sequence[torch.Generator]) -> Iterator[int]:
    temperature_B1 = torch.tensor([[row.temperature] for row in rows], device=logits_BV.device)
    # softmax and cumsum add up a row in the same order in every batch; sum does not.
    probs_BV = torch.softmax(logits_BV.float() / temperature_B1, -1)
    for index, (row, generator) in enumerate(zip(rows, generators, strict=True)):
        if row.top_p == 1:
            yield _draw(probs_BV[index].cumsum(-1), generator)
            continue
        probs_K, ids_K = nucleus(probs_BV[index], row.top_p)
        yield int(ids_K[_draw(probs_K.cumsum(-1), generator)])


def nucleus(probs_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens until their sum reaches top_p: probabilities, falling, and ids."""
    # Tokens below this have together at most half of what a nucleus leaves out: few others are left to sort.
    ids_K = (probs_V > (1 - top_p) / (2 * len(probs_V))).nonzero()[:, 0]
    probs_K, order_K = probs_V[ids_K].sort(descending=True, stable=True)
    number = int((probs_K.cumsum(-1) - probs_K < top_p).sum())
    return probs_K[:number], ids_K[order_K[:number]]


def _draw(total_K: Tensor, generator: torch.Generator) -> int:
    """Invert the cumulative distribution, which need not end at 1, at a uniform draw."""
    point = (torch.rand((), generator=generator) * total_K[-1].cpu()).to(total_K.device)
    # Rounding can push the point onto the last sum; whatever follows the first such index has probability 0.
    return int(torch.minimum(torch.searchsorted(total_K, point, right=True), torch.searchsorted(total_K, total_K[-1])))
