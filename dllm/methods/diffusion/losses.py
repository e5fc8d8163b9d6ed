"""Cross-entropy where it counts: logits exist for scored places alone, a chunk at a time, and the head learns too.

Shape suffixes: M scored places, C places of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm.training.hits import is_argmax


class _WeightedCrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies, and its gradients while each chunk's logits are at hand.

    The weights are known beforehand, so both gradients are formed in the forward pass and only scaled in backward:
    logits are computed once, and no more than a chunk of them is ever held.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, weights_M: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, device = len(hidden_MD), hidden_MD.device
        nll_M = torch.empty(rows, dtype=torch.float32, device=device)
        hit_M = torch.empty(rows, dtype=torch.bool, device=device)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_MD = torch.empty_like(hidden_MD) if wants_hidden else None
        # Chunks add up in float32: bfloat16 would lose the small ones.
        grad_VD = torch.zeros(head_VD.shape, dtype=torch.float32, device=device) if wants_head else None
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            label_C, place_C = labels_M[part], torch.arange(len(labels_M[part]), device=device)
            logits_CV = hidden_MD[part] @ head_VD.T
            hit_M[part] = is_argmax(logits_CV, label_C)
            log_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
            nll_M[part] = -log_CV[place_C, label_C]
            if not wants_hidden and not wants_head:
                continue
            probs_CV = log_CV.exp_()
            probs_CV[place_C, label_C] -= 1
            wrong_CV = probs_CV.mul_(weights_M[part, None]).to(hidden_MD.dtype)
            if grad_MD is not None:
                torch.mm(wrong_CV, head_VD, out=grad_MD[part])
            if grad_VD is not None:
                grad_VD += wrong_CV.T @ hidden_MD[part]
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
    """Sum weight times cross-entropy over the scored places; without any the sum is 0, with finite gradients.

    The mask token is an ordinary word to the softmax, as in LLaDA and Nemotron, so that bounds compare with theirs.

    Shapes: hidden_MD and head_VD in any dtypes (the product is in hidden's), labels_M int64, weights_M float32.
        Returns the sum (float32, differentiable), nll_M float32 and hit_M bool (the label is the argmax).
    Units: nats.
    """
    head = head_VD.to(hidden_MD.dtype)
    found: tuple[Tensor, Tensor, Tensor] = _WeightedCrossEntropy.apply(
        hidden_MD, head, labels_M, weights_M.float(), chunk
    )
    return found
