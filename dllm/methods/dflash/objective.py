"""The loss and the acceptance counts of one micro-batch of blocks, as sums.

Averages are formed later, from numerators and denominators, so that no figure depends on how a batch was split.

Shape suffixes: B batch, S sequence, N blocks, L slots of a block, P = L - 1 predicted slots, D hidden, F features,
V vocabulary, M block positions that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.methods.dflash.anchors import Anchors
from dllm.methods.dflash.objectives import Weighting
from dllm.models.drafts.loss_terms import ScoredSlots
from dllm.models.drafts.protocol import Draft
from dllm.registry import OBJECTIVES
from dllm.training.cross_entropy import FrozenHead, frozen_head_cross_entropy


@dataclass(frozen=True)
class Batch:
    """Sequences with their target features, padded on the right.

    Shapes: input_ids_BS int64, loss_mask_BS bool (false on padding), features_BSF, last_BSD (what the target feeds its
    head; only for distillation).
    """

    input_ids_BS: Tensor
    loss_mask_BS: Tensor
    features_BSF: Tensor
    last_BSD: Tensor | None = None


@dataclass(frozen=True)
class Labels:
    """The true token of each predicted slot, and whether it counts.

    Shapes: ids_BNP int64, valid_BNP bool.
    """

    ids_BNP: Tensor
    valid_BNP: Tensor


@dataclass(frozen=True)
class StepSums:
    """Sums over one micro-batch.

    Shapes: numerator scalar with gradient; correct_P and count_P int64 by offset 1 .. L-1.
    run_sum: tokens in the leading runs of correct predictions, over num_blocks blocks that have a label.
    extra: the sums of the draft's family.
    """

    numerator: Tensor
    denominator: float
    correct_P: Tensor
    count_P: Tensor
    run_sum: int
    num_blocks: int
    extra: Mapping[str, Tensor | float] = field(default_factory=dict)


def block_labels(batch: Batch, anchors: Anchors, block_size: int) -> Labels:
    """Look up the true token of each slot: slot k of a block at a predicts the token AT a + k, no shift.

    Source: DFlash, section 4.1 (same-position prediction).
    """
    length = batch.input_ids_BS.shape[1]
    offset_P = torch.arange(1, block_size, device=anchors.pos_BN.device)
    place_BNP = anchors.pos_BN[..., None] + offset_P
    inside_BNP = place_BNP < length
    flat = place_BNP.clamp(max=length - 1).flatten(1)
    ids_BNP = batch.input_ids_BS.gather(1, flat).view(place_BNP.shape)
    supervised_BNP = batch.loss_mask_BS.gather(1, flat).view(place_BNP.shape)
    return Labels(ids_BNP, supervised_BNP & inside_BNP & anchors.keep_BN[..., None])


def block_hidden(draft: Draft, embedding_VD: Tensor, batch: Batch, anchors: Anchors, labels: Labels) -> Tensor:
    """Run the draft over all blocks and keep the slots that count.

    Shapes: embedding_VD the target's. Returns hidden_MD in the dtype of batch.features_BSF.
    """
    features = batch.features_BSF
    tokens_BN = batch.input_ids_BS.gather(1, anchors.pos_BN)
    mask_D = embedding_VD[draft.config.mask_token_id]
    anchor_BN1D = F.embedding(tokens_BN, embedding_VD)[:, :, None]
    masks = mask_D.expand(*tokens_BN.shape, draft.config.block_size - 1, -1)
    embeds_BNLD = torch.cat([anchor_BN1D, masks], 2).to(features.dtype)
    hidden_BNPD = draft(embeds_BNLD, features, anchors.pos_BN, anchors.keep_BN)
    return hidden_BNPD[labels.valid_BNP]


def teacher_hidden(batch: Batch, anchors: Anchors, labels: Labels) -> Tensor | None:
    """Return the hidden state from which the target predicted each slot that counts: its last, one token before.

    Shapes: returns teacher_MD, or None where the batch carries none.
    """
    if batch.last_BSD is None:
        return None
    offset_P = torch.arange(labels.ids_BNP.shape[-1], device=anchors.pos_BN.device)
    place_BNP = (anchors.pos_BN[..., None] + offset_P).clamp(max=batch.last_BSD.shape[1] - 1)
    row_B11 = torch.arange(len(place_BNP), device=place_BNP.device)[:, None, None]
    return batch.last_BSD[row_B11.expand_as(place_BNP)[labels.valid_BNP], place_BNP[labels.valid_BNP]]


def dflash_terms(
    draft: Draft,
    embedding_VD: Tensor,
    head: FrozenHead | Tensor,
    batch: Batch,
    anchors: Anchors,
    draft_settings: Any = None,
    *,
    gamma: float,
    loss: str = "decay",
    chunk: int = 256,
    vocab_ids: Tensor | None = None,
    distill: float = 0.0,
) -> StepSums:
    """Compute the loss and the acceptance counts of one micro-batch.

    Shapes: head the target's, (V, D) in the compute dtype. With vocab_ids (sorted ids, V' of them) it holds just those
        rows, and every label must be among them.
    draft_settings: `train.dflash.draft`, for the loss terms of the draft's family.
    loss: a name in OBJECTIVES.
    distill: the share of the cross-entropy against the target's distribution; the batch must carry last_BSD.
    """
    labels = block_labels(batch, anchors, draft.config.block_size)
    valid = labels.valid_BNP
    ids_M = labels.ids_BNP[valid]
    hidden_MD = block_hidden(draft, embedding_VD, batch, anchors, labels)
    if vocab_ids is not None:
        ids_M = torch.searchsorted(vocab_ids, ids_M)
    teacher_MD = teacher_hidden(batch, anchors, labels) if distill else None
    rows = frozen_head_cross_entropy(hidden_MD, head, ids_M, chunk, teacher_MD, distill, draft.num_candidates)
    slots = ScoredSlots(
        ids_BNL=torch.cat([batch.input_ids_BS.gather(1, anchors.pos_BN)[..., None], labels.ids_BNP], -1),
        valid_BNP=valid,
        hidden_MD=hidden_MD,
        head_VD=head.weight_VD if isinstance(head, FrozenHead) else head,
        vocab_ids=vocab_ids,
        teacher_MD=teacher_MD,
        **rows._asdict(),
    )
    weighting: Weighting = OBJECTIVES[loss](slots, gamma)
    extra = draft.extra_loss(slots, weighting.weights_M, draft_settings)
    numerator = (weighting.weights_M * rows.loss_M).sum()
    for term in (weighting.term, extra.term if extra else None):
        numerator = numerator if term is None else numerator + term
    correct_P, run_sum = slots.correct(rows.hit_M if extra is None or extra.hit_M is None else extra.hit_M)
    return StepSums(
        numerator=numerator,
        denominator=weighting.denominator,
        correct_P=correct_P,
        count_P=valid.sum((0, 1)),
        run_sum=run_sum,
        num_blocks=int(valid[..., 0].sum()),
        extra=extra.counts if extra else {},
    )
