"""Cross-entropy of hidden states under an output head, without ever holding all logits.

Every function here goes through `_chunks`: the logits of at most `chunk` rows exist at one time. They differ in what
has a gradient and in the precision of the softmax.

Shape suffixes: M scored positions, C positions of one chunk, D hidden, V vocabulary, K candidates, E ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.models.drafts.selector import top_candidates
from dllm.models.packing import packed_product


def _chunks(
    hidden_MD: Tensor, labels_M: Tensor, logits: Callable[[Tensor], Tensor], chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk's place among the rows, its labels and its logits."""
    for begin in range(0, len(labels_M), chunk):
        part = slice(begin, begin + chunk)
        yield part, labels_M[part], logits(hidden_MD[part])


def _rows(label_C: Tensor) -> Tensor:
    # Indexing writes C places; an in-place scatter_ copies the whole chunk first, an eighth of a training step.
    return torch.arange(len(label_C), device=label_C.device)


def is_argmax(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Tell where the label is the row's argmax; among equals the first wins, as in torch.argmax.

    Compares the label with the largest other logit: on CPUs amax takes a fraction of argmax's time. Writes into
    logits_CV on the way and restores it.

    Shapes: label_C int64. Returns hit_C bool.
    """
    row_C = _rows(label_C)
    label_logit_C = logits_CV[row_C, label_C]
    logits_CV[row_C, label_C] = float("-inf")
    other_C = logits_CV.amax(-1)
    logits_CV[row_C, label_C] = label_logit_C
    hit_C = label_logit_C > other_C
    tie_E = (label_logit_C == other_C).nonzero()[:, 0]  # coarse dtypes tie now and then
    hit_C[tie_E] = logits_CV[tie_E].argmax(-1) == label_C[tie_E]
    return hit_C


class FrozenHead:
    """An output head that is not trained, ready for many gradients: where it pays, with a copy in another layout.

    Args:
        weight_VD: its weight, which must not change.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    @cached_property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """Multiply hidden states by the weight: packed in three quarters of the time with AMX, slower without it."""
        if torch.cpu._is_amx_tile_supported():
            return packed_product(self.weight_VD)
        return lambda hidden_MD: hidden_MD @ self.weight_VD.T

    @cached_property
    def back(self) -> Callable[[Tensor], Tensor]:
        """Multiply errors of logits by the weight: on CPUs a fifth faster than by the weight as it lies in memory."""
        return packed_product(self.weight_VD.T)


class _FrozenHead(torch.autograd.Function):
    """Loss rows and their gradient in one pass: each chunk's logits are computed once.

    The head is frozen, so the gradient of a row's loss reaches only that row's hidden state. It is formed while the
    row's logits exist and scaled in backward by the weight the row was given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        head_VD: Tensor,
        logits: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        labels_M: Tensor,
        chunk: int,
        teacher_MD: Tensor,
        share: float,
        candidates: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows, device = len(hidden_MD), hidden_MD.device
        nll_M = torch.empty(rows, dtype=torch.float32, device=device)
        soft_M = torch.empty(rows if share else 0, dtype=torch.float32, device=device)
        hit_M = torch.empty(rows, dtype=torch.bool, device=device)
        top_logits_MK = hidden_MD.new_empty(rows, candidates)
        top_ids_MK = torch.empty(rows, candidates, dtype=torch.int64, device=device)
        grad_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        for part, label_C, logits_CV in _chunks(hidden_MD, labels_M, logits, chunk):
            probs_CV = torch.softmax(logits_CV, -1)
            row_C = _rows(label_C)
            nll_M[part] = -probs_CV[row_C, label_C].float().clamp_min(1e-37).log()
            if share:
                teacher_CV = torch.softmax(logits(teacher_MD[part]), -1)
                soft_M[part] = -(probs_CV.float().clamp_min(1e-37).log_() * teacher_CV).sum(-1)
                probs_CV.sub_(teacher_CV, alpha=share)
            probs_CV[row_C, label_C] -= 1 - share
            if candidates:
                top_CK, ids_CK = top_candidates(logits_CV, candidates)
                top_logits_MK[part], top_ids_MK[part] = top_CK, ids_CK
                hit_M[part] = ids_CK.gather(1, top_CK.argmax(-1, keepdim=True))[:, 0] == label_C  # ids rise
            else:
                hit_M[part] = is_argmax(logits_CV, label_C)
            if grad_MD is not None:
                grad_MD[part] = back(probs_CV)
        ctx.save_for_backward(grad_MD, head_VD, top_ids_MK)
        ctx.mark_non_differentiable(nll_M, hit_M, top_ids_MK)
        loss_M = nll_M.clone() if not share else (1 - share) * nll_M + share * soft_M
        return loss_M, nll_M, hit_M, top_logits_MK, top_ids_MK

    @staticmethod
    def backward(ctx: Any, grad_loss_M: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_MD, head_VD, top_ids_MK = ctx.saved_tensors
        grad_MD = grad_MD * grad_loss_M[:, None].to(grad_MD.dtype)
        if top_ids_MK.shape[1]:
            grad_MD += F.embedding_bag(top_ids_MK, head_VD, mode="sum", per_sample_weights=grads[2].to(head_VD.dtype))
        return grad_MD, *[None] * 9


class FrozenHeadRows(NamedTuple):
    """What a frozen head makes of each row; see `frozen_head_cross_entropy`."""

    loss_M: Tensor
    nll_M: Tensor
    hit_M: Tensor
    top_logits_MK: Tensor
    top_ids_MK: Tensor


def frozen_head_cross_entropy(
    hidden_MD: Tensor,
    head: FrozenHead | Tensor,
    labels_M: Tensor,
    chunk: int,
    teacher_MD: Tensor | None = None,
    share: float = 0.0,
    candidates: int = 0,
) -> FrozenHeadRows:
    """Return each row's loss, its negative log-likelihood, whether it is a hit, and its largest logits.

    The loss is (1 - share) times the negative log-likelihood plus share times the cross-entropy against the teacher's
    distribution. The softmax is computed in hidden_MD's dtype. The loss and the largest logits are differentiable in
    hidden_MD.

    Shapes: hidden_MD, teacher_MD (the teacher's input to the same head) and the head of one dtype, labels_M int64.
        Returns loss_M and nll_M float32, hit_M bool (the label is the argmax), top_logits_MK and top_ids_MK (rising),
        K = candidates or V if that is less.
    Units: nats.
    Source: Hinton et al. 2015 (distillation), temperature 1.
    """
    if teacher_MD is None:
        teacher_MD, share = hidden_MD.new_empty(0), 0.0
    if isinstance(head, FrozenHead):
        head_VD, logits, back = head.weight_VD, head.logits, head.back
    else:
        head_VD, logits, back = head, lambda x_MD: x_MD @ head.T, lambda x_CV: x_CV @ head
    number = min(candidates, len(head_VD))
    rows = _FrozenHead.apply(hidden_MD, head_VD, logits, back, labels_M, chunk, teacher_MD, share, number)
    return FrozenHeadRows(*rows)


class _TrainedHead(torch.autograd.Function):
    """The weighted sum of cross-entropies, with both gradients formed while each chunk's logits exist.

    The weights are known beforehand, so the gradients are formed in the forward pass and only scaled in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, device = len(hidden_MD), hidden_MD.device
        nll_M = torch.empty(rows, dtype=torch.float32, device=device)
        hit_M = torch.empty(rows, dtype=torch.bool, device=device)
        hidden_learns, head_learns = ctx.needs_input_grad[:2]
        grad_MD = torch.empty_like(hidden_MD) if hidden_learns else None
        # Chunks add up in float32: bfloat16 would lose the small ones.
        grad_VD = torch.zeros(head_VD.shape, dtype=torch.float32, device=device) if head_learns else None
        for part, label_C, logits_CV in _chunks(hidden_MD, labels_M, lambda x_CD: x_CD @ head_VD.T, chunk):
            hit_M[part] = is_argmax(logits_CV, label_C)
            row_C = _rows(label_C)
            log_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
            nll_M[part] = -log_CV[row_C, label_C]
            if not hidden_learns and not head_learns:
                continue
            probs_CV = log_CV.exp_()
            probs_CV[row_C, label_C] -= 1
            error_CV = probs_CV.mul_(weights_M[part, None]).to(hidden_MD.dtype)
            if grad_MD is not None:
                torch.mm(error_CV, head_VD, out=grad_MD[part])
            if grad_VD is not None:
                grad_VD += error_CV.T @ hidden_MD[part]
        ctx.save_for_backward(grad_MD, grad_VD)
        ctx.mark_non_differentiable(nll_M, hit_M)
        return (weights_M.double() * nll_M).sum().float(), nll_M, hit_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_MD, grad_VD = ctx.saved_tensors
        return (
            None if grad_MD is None else grad_MD * grad.to(grad_MD.dtype),
            None if grad_VD is None else grad_VD * grad,
            None,
            None,
            None,
        )


def weighted_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of weight times cross-entropy, differentiable in hidden_MD and head_VD.

    Without any row the sum is 0, with finite gradients. The softmax is computed in float32. The mask token is an
    ordinary token to it, as in LLaDA and Nemotron, so that bounds compare with theirs.

    Shapes: hidden_MD and head_VD in any dtypes (the product is in hidden's), labels_M int64, weights_M float32.
        Returns the sum (float32), nll_M float32 and hit_M bool (the label is the argmax).
    Units: nats.
    """
    head = head_VD.to(hidden_MD.dtype)
    found: tuple[Tensor, Tensor, Tensor] = _TrainedHead.apply(hidden_MD, head, labels_M, weights_M.float(), chunk)
    return found


def nll_and_hits(
    logits: Callable[[Tensor], Tensor], hidden_MD: Tensor, labels_M: Tensor, chunk: int, excluded: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of labels and whether each is the argmax, without gradients.

    Args:
        logits: maps hidden states to logits.
        excluded: an id that is left out of the argmax (not of the softmax).

    Shapes: returns nll_M float64 and hit_M bool, on the CPU.
    Units: nats.
    """
    nll_M, hit_M = torch.empty(len(labels_M), dtype=torch.float64), torch.empty(len(labels_M), dtype=torch.bool)
    for part, label_C, logits_CV in _chunks(hidden_MD, labels_M, logits, chunk):
        log_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
        nll_M[part] = -log_CV[_rows(label_C), label_C].double().cpu()
        if excluded is not None:
            logits_CV[:, excluded] = float("-inf")
        hit_M[part] = is_argmax(logits_CV, label_C).cpu()
    return nll_M, hit_M
