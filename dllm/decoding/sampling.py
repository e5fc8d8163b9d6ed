"""Sampling a response above temperature 0: with a draft or without one, each token has the target's distribution.

Speculative sampling: a draft token x, drawn from q, is accepted with probability min(1, p(x) / q(x)), where p is the
target's distribution. The first rejected one is replaced by a draw from max(p - q, 0), normalised; if none is, a bonus
token is drawn from p. A draft that proposes its most probable tokens has a q of one point: x is accepted with
probability p(x), and replaced by a draw from p without x.

`top_k` and `top_p` change p alone. Probabilities are float64: over a large vocabulary the sums of float32 are off by
more than a rare token's probability.

Shape suffixes: L slots of a block, P = L - 1 draft tokens, V vocabulary.
Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.decoding.proposals import row_generators
from dllm.decoding.settings import SampledSettings
from dllm.models.drafts.proposal import Proposal, Sampling, most_probable

NUCLEUS = 128
"""Most probable tokens examined first: sorting a whole vocabulary takes longer than what it is for."""


@dataclass(frozen=True)
class Verified:
    """What a block brings.

    Units: `chances` are the probabilities with which the draft tokens up to the first rejected one were accepted, over
        all that could have been drafted at their offset: the sum of min(p, q).
    """

    tokens: tuple[int, ...]
    """The accepted draft tokens and one token of the target's."""
    chances: tuple[float, ...] = ()
    """Empty if decoding is greedy."""


@dataclass(frozen=True)
class TargetSampling:
    """How one response is sampled.

    Args:
        sampling: the temperature and the response's random numbers.
        top_p: keep the smallest set of most probable tokens with at least this probability.
        top_k: keep so many of the most probable tokens; 0 keeps all. It comes before `top_p`.
    """

    sampling: Sampling
    top_p: float = 1.0
    top_k: int = 0

    def law(self, logits_V: Tensor) -> Tensor:
        """Return the target's distribution of one token. Shapes: float64 (V,).

        Raises:
            ModelError: a logit is not a number.
        """
        if 0 < self.top_k < len(logits_V):
            logits_V = logits_V.masked_fill(~_largest(logits_V, self.top_k), float("-inf"))
        probs_V = self.sampling.law(logits_V)
        if self.top_p < 1:
            probs_V = probs_V.masked_fill(~_largest(probs_V, _nucleus_size(probs_V, self.top_p)), 0)
            probs_V = probs_V / probs_V.sum()
        return probs_V

    def uniform(self) -> float:
        """Draw a number from 0 on, below 1."""
        return float(torch.rand((), dtype=torch.float64, generator=self.sampling.generator))

    def draw(self, probs_V: Tensor) -> int:
        """Draw a token; probabilities need not sum to 1."""
        return int(self.sampling.draw(probs_V[None]))


def verify(proposal: Proposal | None, logits_LV: Tensor, sampling: TargetSampling | None) -> Verified:
    """Accept or reject draft tokens, and choose the token after those accepted; no proposal is one without tokens.

    Shapes: logits_LV the target's, after the anchor and after each draft token.
    """
    if sampling is None:
        return _verify_greedily(proposal, logits_LV)
    drafted = [] if proposal is None else proposal.ids_P.tolist()
    draft_PV = None if proposal is None else proposal.probs_PV
    chances: list[float] = []
    for offset, token in enumerate(drafted):
        target_V = sampling.law(logits_LV[offset])
        if draft_PV is None:  # all of q is at the token
            ratio = chance = float(target_V[token])
            rest_V = target_V.index_fill(0, torch.tensor(token, device=target_V.device), 0)
        else:
            draft_V = draft_PV[offset].double()
            draft_V = draft_V / draft_V.sum()
            ratio, chance = float(target_V[token] / draft_V[token]), float(torch.minimum(target_V, draft_V).sum())
            rest_V = (target_V - draft_V).clamp_min(0)
        chances.append(chance)
        if sampling.uniform() < ratio:
            continue
        # No probability is left where p and q are equal but for rounding.
        chosen = sampling.draw(rest_V if bool(rest_V.any()) else target_V)
        return Verified((*drafted[:offset], chosen), tuple(chances))
    return Verified((*drafted, sampling.draw(sampling.law(logits_LV[len(drafted)]))), tuple(chances))


def _verify_greedily(proposal: Proposal | None, logits_LV: Tensor) -> Verified:
    truth_L = most_probable(logits_LV)
    if proposal is None:
        return Verified((int(truth_L[0]),))
    both = torch.cat([proposal.ids_P, truth_L]).tolist()  # one transfer from a GPU
    drafted, truth = both[: len(proposal.ids_P)], both[len(proposal.ids_P) :]
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == truth[accepted]:
        accepted += 1
    return Verified(tuple(truth[: accepted + 1]))


def samplings(
    prompts: Sequence[Sequence[int]], settings: SampledSettings, copies: Sequence[int] | None = None
) -> list[TargetSampling | None]:
    """Give each prompt its random numbers, which depend on the seed and on the prompt; None is greedy.

    Args:
        copies: as in `dllm.decoding.proposals.row_generators`.
    """
    if settings.temperature == 0:
        return [None] * len(prompts)
    return [
        TargetSampling(Sampling(settings.temperature, generator), settings.top_p, settings.top_k)
        for generator in row_generators(prompts, settings.seed, copies)
    ]


def _largest(values_V: Tensor, number: int) -> Tensor:
    """Mark the largest values; of equal ones the first, as argmax does. Shapes: bool (V,)."""
    least = values_V.topk(number).values[-1]
    above_V, equal_V = values_V > least, values_V == least
    return above_V | (equal_V & (equal_V.cumsum(0) <= number - above_V.sum()))


def _nucleus_size(probs_V: Tensor, top_p: float) -> int:
    """Count the most probable tokens, until their sum reaches `top_p`."""
    top_K = probs_V.topk(min(NUCLEUS, len(probs_V))).values
    if float(top_K.sum()) < top_p:
        top_K = probs_V.sort(descending=True).values
    return int((top_K.cumsum(0) - top_K < top_p).sum())
