"""What a draft family reads of the draft's loss, and what it adds to it.

Shape suffixes: B batch, N blocks, L slots of a block, P = L - 1 draft tokens of a block, D hidden, V vocabulary, M
slots that have a label, K candidates of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredSlots:
    """The slots of a micro-batch that have a label, with the draft's cross-entropy on them.

    Shapes: ids_BNL int64, each block's true tokens, its anchor first; valid_BNP bool, M true in all; hidden_MD with
        gradient; head_VD the target's head, of the rows vocab_ids if not None; loss_M float32 with gradient; nll_M
        float32; hit_M bool, where the label has the largest logit; top_ids_MK rows of head_VD, rising, and
        top_logits_MK with gradient: the largest logits, K = `Draft.num_candidates`, or V if that is less; teacher_MD
        what the target fed its head for the same tokens, if the loss distils.
    """

    ids_BNL: Tensor
    valid_BNP: Tensor
    hidden_MD: Tensor
    head_VD: Tensor
    vocab_ids: Tensor | None
    loss_M: Tensor
    nll_M: Tensor
    hit_M: Tensor
    top_logits_MK: Tensor
    top_ids_MK: Tensor
    teacher_MD: Tensor | None = None

    def correct(self, hit_M: Tensor) -> tuple[Tensor, int]:
        """Count hits at each offset, and hits in the leading runs of all blocks. Shapes: (P,) int64."""
        correct_BNP = torch.zeros_like(self.valid_BNP).masked_scatter(self.valid_BNP, hit_M)
        return correct_BNP.sum((0, 1)), int(correct_BNP.long().cumprod(-1).sum())


@dataclass(frozen=True)
class ExtraLoss:
    """What a family adds to the loss and the figures of a micro-batch.

    Shapes: term a scalar with gradient, added to the loss's numerator; hit_M bool, where the draft proposes the label
        after the true tokens before it, None: where the label has the largest logit; counts as `Draft.counts` says.
    """

    term: Tensor
    hit_M: Tensor | None = None
    counts: Mapping[str, Tensor | float] = field(default_factory=dict)
