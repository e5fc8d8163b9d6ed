"""The draft tokens of one block: how they are chosen, and what decoding asks of a draft to get them.

Shape suffixes: B batch, S context, F tapped features, V vocabulary, P draft tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm.errors import ModelError


def most_probable(logits_V: Tensor) -> Tensor:
    """Return the index of the largest logit along the last axis, as argmax does.

    In bfloat16 on a CPU argmax takes six times as long.
    """
    return logits_V.max(-1).indices


@dataclass(frozen=True)
class Proposal:
    """The draft tokens of one block.

    Shapes: ids_P int64; probs_PV the distribution that each was sampled from, given those before it, which verification
        needs; None if no random number chose them.
    """

    ids_P: Tensor
    probs_PV: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How a response is sampled: from softmax(logits / temperature), with random numbers of its own.

    Args:
        temperature: above 0.
        generator: on the CPU, so that a seed gives the same numbers on any device.
    """

    temperature: float
    generator: torch.Generator

    def law(self, logits_PV: Tensor) -> Tensor:
        """Return the distribution that these logits stand for. Shapes: float64 of the logits' shape.

        Raises:
            ModelError: a logit is not a number.
        """
        probs_PV = torch.softmax(logits_PV.double() / self.temperature, -1)
        if not bool(probs_PV.isfinite().all()):
            raise ModelError("the model's logits are not numbers", hint="training may have diverged")
        return probs_PV

    def draw(self, probs_PV: Tensor) -> Tensor:
        """Draw an index from each row with one random number. Shapes: returns int64 (P,); rows need not sum to 1."""
        total_PV = probs_PV.double().cumsum(-1)
        uniform_P1 = torch.rand(len(probs_PV), 1, dtype=torch.float64, generator=self.generator)
        last_P1 = total_PV[:, -1:]
        # Rounding must not lead past the last index that has a probability.
        point_P1 = torch.minimum(uniform_P1.to(probs_PV.device) * last_P1, last_P1.nextafter(torch.zeros_like(last_P1)))
        return torch.searchsorted(total_PV, point_P1, right=True)[:, 0]


@dataclass(frozen=True)
class BlockRequest:
    """What `Draft.propose` asks of one sequence, for several at once: its arguments."""

    anchor_id: int
    num_tokens: int
    features_BSF: Tensor
    start: int
    cache: Any
    sampling: Sampling | None = None
