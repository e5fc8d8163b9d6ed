"""The candidate selector of DFlash 2: choose among each slot's most probable tokens by the token before it.

Shape suffixes: M slots, N blocks, P draft tokens of a block, Q = P - 1, K candidates of a slot, R rank, D hidden, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.drafts.layers import Linear
from dllm.models.drafts.proposal import Proposal, Sampling

COLUMNS = 16
"""Logits of a group in `top_candidates`: fewer make its second pass longer, more its third."""


def top_candidates(logits_MV: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Find each row's largest logits and their ids, the lowest id first.

    On CPUs in half the time of torch.topk: the largest of each group of columns, the groups with the largest of these,
    and the largest of what those hold. Among equals at the border any may be chosen.
    Shapes: returns values (M, K) and int64 ids (M, K), K = number.
    """
    rows, width = logits_MV.shape
    groups = width // COLUMNS
    if groups <= number:
        ids_MK = logits_MV.topk(number, sorted=False).indices
    else:
        whole = logits_MV[:, : groups * COLUMNS].unflatten(-1, (COLUMNS, groups))  # group g: columns g, g + groups, ...
        group_MK = whole.amax(1).topk(number, sorted=False).indices
        first = torch.arange(COLUMNS, device=logits_MV.device)[:, None] * groups
        rest = torch.arange(groups * COLUMNS, width, device=logits_MV.device).expand(rows, -1)
        found = torch.cat([(group_MK[:, None] + first).flatten(1), rest], 1)
        ids_MK = found.gather(1, logits_MV.gather(1, found).topk(number, sorted=False).indices)
    ids_MK = ids_MK.sort(-1).values
    return logits_MV.gather(1, ids_MK), ids_MK


class _Matches(torch.autograd.Function):
    """Products of each query with a few rows of a codebook, whose copies (M, K, R) never exist.

    With sums over bags of K rows weighed by w, bag_m = sum_k w_mk B[ids_mk], these products are the derivative of
    <bag_m, query_m> by w, and torch has kernels for bags: a third of the time on a CPU.
    Shapes: query_MR, codebook_VR of one dtype, ids_MK; returns (M, K).
    """

    @staticmethod
    def forward(ctx: Any, query_MR: Tensor, codebook_VR: Tensor, ids_MK: Tensor) -> Tensor:
        ctx.save_for_backward(query_MR, codebook_VR, ids_MK)
        weights_MK = torch.zeros(ids_MK.shape, dtype=query_MR.dtype, device=ids_MK.device, requires_grad=True)
        with torch.enable_grad():
            bags_MR = F.embedding_bag(ids_MK, codebook_VR.detach(), mode="sum", per_sample_weights=weights_MK)
            return torch.autograd.grad(bags_MR, weights_MK, query_MR)[0]

    @staticmethod
    def backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor, Tensor, None]:
        query_MR, codebook_VR, ids_MK = ctx.saved_tensors
        with torch.enable_grad():
            leaf_VR = codebook_VR.detach().requires_grad_()
            bags_MR = F.embedding_bag(ids_MK, leaf_VR, mode="sum", per_sample_weights=grad_MK.contiguous())
            return bags_MR.detach(), torch.autograd.grad(bags_MR, leaf_VR, query_MR)[0], None


class CandidateSelector(nn.Module):
    """Score candidate b after token a by logit(b) + <A[a] * (H h), B[b]>.

    Source: DFlash 2; parameter names as in the published drafts, where the codebooks have no `.weight`.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = min(top_k, vocab_size)
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = Linear(hidden_size, rank)

    def scores(self, hidden_MD: Tensor, before_M: Tensor, logits_MK: Tensor, ids_MK: Tensor) -> Tensor:
        """Score each slot's candidates after one token.

        Shapes: before_M and ids_MK rows of the codebooks; returns (M, K) float32.
        """
        query_MR = F.embedding(before_M, self.predecessor_codebook) * self.hidden_projection(hidden_MD).float()
        matches_MK: Tensor = _Matches.apply(query_MR, self.successor_codebook, ids_MK)
        return logits_MK.float() + matches_MK

    def greedy(self, anchor_ids_N: Tensor, hidden_NPD: Tensor, logits_NPV: Tensor) -> Tensor:
        """Choose the best candidate of each slot after the one before, the first after the anchor. Shapes: (N, P)."""
        first_NK, pairs_NQKK, ids_NPK = self._pairs(anchor_ids_N, hidden_NPD, logits_NPV)
        chosen = [first_NK.argmax(-1, keepdim=True)]
        for best_NK in pairs_NQKK.argmax(-1).unbind(1):
            chosen.append(best_NK.gather(1, chosen[-1]))
        return ids_NPK.gather(2, torch.cat(chosen, 1)[..., None])[..., 0]

    def sample(self, anchor_id: int, hidden_PD: Tensor, logits_PV: Tensor, sampling: Sampling) -> Proposal:
        """Draw the tokens of one block one after the other, each from the softmax over its slot's candidates."""
        anchor_ids = torch.tensor([anchor_id], device=hidden_PD.device)
        (scores_K,), (pairs_QKK,), (ids_PK,) = self._pairs(anchor_ids, hidden_PD[None], logits_PV[None])
        laws, chosen = [sampling.law(scores_K)[None]], []
        for scores_KK in (*pairs_QKK, None):
            chosen.append(sampling.draw(laws[-1]))
            if scores_KK is not None:
                laws.append(sampling.law(scores_KK[chosen[-1]]))
        probs_PK = torch.cat(laws)
        probs_PV = probs_PK.new_zeros(logits_PV.shape).scatter_(1, ids_PK, probs_PK)
        return Proposal(ids_PK.gather(1, torch.cat(chosen)[:, None])[:, 0], probs_PV)

    def _pairs(self, anchor_ids_N: Tensor, hidden_NPD: Tensor, logits_NPV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score all pairs of neighbouring candidates at once, so that a step of a walk is a look-up.

        Shapes: returns first_NK, each block's first candidates after its anchor; pairs_NQKK, Q = P - 1, by slot,
            predecessor and candidate; ids_NPK.
        """
        number = min(self.top_k, logits_NPV.shape[-1])
        logits_MK, ids_MK = top_candidates(logits_NPV.flatten(0, 1), number)
        logits_NPK, ids_NPK = (each.unflatten(0, hidden_NPD.shape[:2]) for each in (logits_MK.float(), ids_MK))
        after_NPKR = self.successor_codebook[ids_NPK] * self.hidden_projection(hidden_NPD)[..., None, :]
        anchor_NR1 = self.predecessor_codebook[anchor_ids_N][..., None]
        first_NK = logits_NPK[:, 0] + (after_NPKR[:, 0] @ anchor_NR1)[..., 0].float()
        pairs_NQKK = (self.predecessor_codebook[ids_NPK[:, :-1]] @ after_NPKR[:, 1:].mT).float()
        return first_NK, logits_NPK[:, 1:, None] + pairs_NQKK, ids_NPK
