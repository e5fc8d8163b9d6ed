"""Cross-entropy against a frozen head, a chunk of rows at a time, and the weights of a block's offsets.

Shape suffixes: M rows (block positions that count), D hidden, V vocabulary, N blocks, P predicted slots of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm.training.hits import is_argmax

PAPER_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss rows and their gradient in one pass: logits live for one chunk, and are never computed twice.

    The head is frozen, so the gradient of a row's loss reaches only that row's hidden state. It is formed while the
    row's logits are at hand and scaled in backward by whatever weight the row was given.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, chunk: int, teacher_MD: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, device = len(hidden_MD), hidden_MD.device
        nll_M = torch.empty(rows, dtype=torch.float32, device=device)
        soft_M = torch.empty(rows if share else 0, dtype=torch.float32, device=device)
        hit_M = torch.empty(rows, dtype=torch.bool, device=device)
        grad_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            label_C1 = labels_M[part, None]
            logits_CV = hidden_MD[part] @ head_VD.T
            probs_CV = torch.softmax(logits_CV, -1)
            prob_C1 = probs_CV.gather(1, label_C1)
            nll_M[part] = -prob_C1[:, 0].float().clamp_min(1e-37).log()
            if share:
                wanted_CV = torch.softmax(teacher_MD[part] @ head_VD.T, -1)
                soft_M[part] = -(probs_CV.float().clamp_min(1e-37).log_() * wanted_CV).sum(-1)
                probs_CV.sub_(wanted_CV, alpha=share)
            probs_CV[_rows(label_C1), label_C1[:, 0]] -= 1 - share
            hit_M[part] = is_argmax(logits_CV, label_C1[:, 0])
            if grad_MD is not None:
                torch.mm(probs_CV, head_VD, out=grad_MD[part])
        ctx.save_for_backward(grad_MD)
        ctx.mark_non_differentiable(nll_M, hit_M)
        loss_M = nll_M.clone() if not share else (1 - share) * nll_M + share * soft_M
        return loss_M, nll_M, hit_M

    @staticmethod
    def backward(ctx: Any, grad_loss_M: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad_MD,) = ctx.saved_tensors
        return grad_MD * grad_loss_M[:, None].to(grad_MD.dtype), None, None, None, None, None


def _rows(label_C1: Tensor) -> Tensor:
    # Indexing writes C places; an in-place scatter_ copies the whole chunk first, an eighth of a step.
    return torch.arange(len(label_C1), device=label_C1.device)


def linear_cross_entropy(
    hidden_MD: Tensor,
    head_VD: Tensor,
    labels_M: Tensor,
    chunk: int,
    teacher_MD: Tensor | None = None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's loss (float32, differentiable), its negative log-likelihood, and whether its argmax is right.

    The loss is (1 - share) of the negative log-likelihood and share of the cross-entropy against the teacher's
    distribution: with share 0 they are the same.

    Shapes: hidden_MD, teacher_MD (what the target itself fed its head) and head_VD of one dtype, labels_M int64.
        Returns loss_M, nll_M, hit_M bool.
    Units: nats.
    Source: Hinton et al. 2015 (distillation), temperature 1.
    """
    if teacher_MD is None:
        teacher_MD, share = hidden_MD.new_empty(0), 0.0
    return _LinearCrossEntropy.apply(hidden_MD, head_VD, labels_M, chunk, teacher_MD, share)


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
