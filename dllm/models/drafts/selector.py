"""The candidate selector of DFlash 2: choose among each slot's most probable tokens by the token before it.

Shape suffixes: M slots, P draft tokens of a block, K candidates of a slot, R rank, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.drafts.dflash import Linear
from dllm.models.drafts.protocol import Proposal, Sampling

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
        before_MR = F.embedding(before_M, self.predecessor_codebook).to(hidden_MD.dtype)
        query_MR = before_MR * self.hidden_projection(hidden_MD)
        after_MKR = F.embedding(ids_MK, self.successor_codebook).to(hidden_MD.dtype)
        return logits_MK.float() + (after_MKR @ query_MR[..., None])[..., 0].float()

    def walk(self, anchor_id: int, hidden_PD: Tensor, logits_PV: Tensor, sampling: Sampling | None = None) -> Proposal:
        """Choose the tokens of a block one after the other, the first after the anchor.

        All pairs of neighbouring candidates are scored at once, so that a step is a look-up.
        """
        logits_PK, ids_PK = top_candidates(logits_PV, min(self.top_k, logits_PV.shape[-1]))
        after_PKR = self.successor_codebook[ids_PK] * self.hidden_projection(hidden_PD)[:, None]
        first_K = logits_PK[0].float() + (after_PKR[0] @ self.predecessor_codebook[anchor_id]).float()
        pairs = (self.predecessor_codebook[ids_PK[:-1]] @ after_PKR[1:].mT).float()
        scores_PKK = logits_PK[1:, None].float() + pairs  # by slot, predecessor and candidate
        if sampling is not None:
            return _sampled(first_K, scores_PKK, ids_PK, logits_PV.shape[-1], sampling)
        first, *best = torch.cat([first_K.argmax()[None], scores_PKK.argmax(-1).flatten()]).tolist()
        chosen = [first]
        for slot in range(len(scores_PKK)):
            chosen.append(best[slot * ids_PK.shape[1] + chosen[-1]])
        return Proposal(ids_PK.gather(1, torch.tensor(chosen, device=ids_PK.device)[:, None])[:, 0])


def _sampled(first_K: Tensor, scores_PKK: Tensor, ids_PK: Tensor, vocab: int, sampling: Sampling) -> Proposal:
    probs_1K = sampling.law(first_K)[None]
    laws, chosen = [probs_1K], [sampling.draw(probs_1K)]
    for scores_KK in scores_PKK:
        laws.append(sampling.law(scores_KK[chosen[-1]]))
        chosen.append(sampling.draw(laws[-1]))
    probs_PK = torch.cat(laws)
    probs_PV = probs_PK.new_zeros(len(probs_PK), vocab).scatter_(1, ids_PK, probs_PK)
    return Proposal(ids_PK.gather(1, torch.cat(chosen)[:, None])[:, 0], probs_PV)
