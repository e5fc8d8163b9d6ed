"""How likely a diffusion model finds given answers: a bound by Monte Carlo, its error, and accuracy by noise level.

Shape suffixes: B batch, S sequence, M masked places, K blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from dllm.methods.diffusion.noise import exact_number_noise, noise_generator
from dllm.methods.diffusion.passes import batch_of, grid_of, masked_pass, padded
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.training.batches import Example
from dllm.training.cross_entropy import nll_and_hits

LEVELS = 10

Mask = tuple[Tensor, Tensor, Tensor]
"""masked_S bool, chance_S float32 (what a place's cross-entropy is divided by), block_S int64."""


@dataclass
class Bound:
    """Sums over answers and masks; figures are made of them at the end.

    Units: nats; tokens of answers.
    """

    tokens: int = 0
    estimates: list[list[float]] = field(default_factory=list)
    """Of each answer, one estimate of its bound a mask; a single one where all its masks were taken."""
    correct: list[int] = field(default_factory=lambda: [0] * LEVELS)
    masked: list[int] = field(default_factory=lambda: [0] * LEVELS)
    nll: list[float] = field(default_factory=lambda: [0.0] * LEVELS)

    def figures(self) -> dict[str, Any]:
        """Return the bound and its standard error a token, perplexity, and the curve over noise levels.

        The standard error is the masks' alone: other masks, the same answers.
        """
        pairs = [mean_and_error(own) for own in self.estimates]
        means, variances = [mean for mean, _ in pairs], [error**2 for _, error in pairs]
        per_token = sum(means) / max(1, self.tokens)
        curve = zip(self.correct, self.masked, self.nll, strict=True)
        return {
            "nelbo": per_token,
            "nelbo_se": math.sqrt(sum(variances)) / max(1, self.tokens),
            "perplexity_bound": math.exp(min(per_token, 700.0)),
            "likelihood_answers": len(means),
            "likelihood_tokens": self.tokens,
            "masked_acc": sum(self.correct) / max(1, sum(self.masked)),
            "by_noise_level": [
                {
                    "masked_up_to": round((level + 1) / LEVELS, 2),
                    "tokens": masked,
                    "accuracy": correct / masked if masked else None,
                    "cross_entropy": nll / masked if masked else None,
                }
                for level, (correct, masked, nll) in enumerate(curve)
            ],
        }


def mean_and_error(estimates: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one answer's estimates and its standard error, 0 for a single one.

    The error is of independent estimates; evenly spread numbers of masks make the true one smaller.
    """
    number, mean = len(estimates), sum(estimates) / len(estimates)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in estimates) / max(1, number - 1) / number)


@torch.no_grad()
def bound(
    model: BidirectionalLM,
    examples: Sequence[Example],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    chunk: int = 512,
    count_out: bool = False,
    advance: Callable[[int], object] = lambda answers: None,
) -> Bound:
    """Bound the answers' negative log-likelihood from above, by as many masks each as asked.

    In each block of n answer tokens k of them are masked, k uniform on 1 .. n and spread evenly over an answer's
    samples; the cross-entropy on them times n / k estimates the block's bound without bias. A model without blocks is
    one block. With blocks of one token the estimate is the autoregressive likelihood, exactly.

    Args:
        count_out: where an answer's blocks have no more than `samples` masks, take each once and leave nothing to
            chance; the curve over noise levels then has no meaning.
        advance: told how many more answers are done.
    Source: LLaDA (Nie et al. 2025), equation 6; BD3-LM (Arriola et al. 2025), equation 8, for the sum over blocks.
    """
    found = Bound()
    plans = (_plan(model, example, samples, seed, count_out) for example in examples)
    todo = ((plan, mask) for plan in plans for mask in plan.masks)
    pending: list[float] = []
    while part := list(islice(todo, batch_size)):
        estimates = _estimates(model, [(plan.example, mask) for plan, mask in part], found, chunk)
        for (plan, _), estimate in zip(part, estimates, strict=True):
            pending.append(estimate)
            if len(pending) == plan.number:
                found.estimates.append([sum(pending) / len(pending)] if plan.is_exact else pending)
                pending = []
                advance(1)
    found.tokens = sum(len(example) - example.prompt_length for example in examples)
    return found


@torch.no_grad()
def causal_scores(
    model: BidirectionalLM, examples: Sequence[Example], *, batch_size: int, chunk: int = 512
) -> list[tuple[float, bool]]:
    """Return each answer's negative log-likelihood with the causal mask in place, and whether it is the greedy one.

    Greedy decoding never writes the mask token, so that is no rival.
    Units: nats an answer.
    """
    found = []
    for begin in range(0, len(examples), batch_size):
        part = examples[begin : begin + batch_size]
        ids_BS, maskable_BS, valid_BS = (x.to(model.head_VD.device) for x in batch_of(part))
        ahead_BS = maskable_BS[:, 1:]
        hidden_MD = model.causal_hidden(ids_BS[:, :-1], valid_BS[:, :-1])[ahead_BS]
        nll_M, hit_M = nll_and_hits(model.logits, hidden_MD, ids_BS[:, 1:][ahead_BS], chunk, model.mask_token_id)
        found += by_row(ahead_BS, nll_M, hit_M)
    return found


def causal_nll(model: BidirectionalLM, examples: Sequence[Example], *, batch_size: int, chunk: int = 512) -> float:
    """Return the mean negative log-likelihood of answer tokens under the same weights with their causal mask.

    Units: nats a token.
    """
    scores = causal_scores(model, examples, batch_size=batch_size, chunk=chunk)
    tokens = sum(len(example) - example.prompt_length for example in examples)
    return sum(nll for nll, _ in scores) / max(1, tokens)


def by_row(places_BS: Tensor, nll_M: Tensor, hit_M: Tensor) -> list[tuple[float, bool]]:
    """Gather scored places by row: the sum of their cross-entropies, and whether all were hits."""
    counts = places_BS.sum(1).tolist()
    return [
        (float(nll.sum()), bool(hit.all())) for nll, hit in zip(nll_M.split(counts), hit_M.split(counts), strict=True)
    ]


@dataclass(frozen=True)
class _Plan:
    """One answer and its masks; the mean over them is the bound itself (`is_exact`) or an estimate."""

    example: Example
    masks: Iterator[Mask]
    number: int
    is_exact: bool


def _plan(model: BidirectionalLM, example: Example, samples: int, seed: int, count_out: bool) -> _Plan:
    block_S = grid_of(model, example, model.note.block_size)
    answer_S = torch.arange(len(example)) >= example.prompt_length
    blocks = [answer_S & (block_S == block) for block in range(int(block_S.max()) + 1)]
    number = 2 ** max(int(here.sum()) for here in blocks) - 1
    if count_out and number <= samples:
        return _Plan(example, _all_masks(blocks, block_S, number), number, True)
    return _Plan(example, _masks(example, blocks, block_S, samples, seed), samples, False)


def _masks(example: Example, blocks: Sequence[Tensor], block_S: Tensor, samples: int, seed: int) -> Iterator[Mask]:
    """Draw one answer's masks."""
    generator = noise_generator(seed, "likelihood", 0, example.id)
    first = [int(torch.randint(int(here.sum()), (), generator=generator)) for here in blocks]
    for sample in range(samples):
        masked_S, chance_S = torch.zeros(len(example), dtype=torch.bool), torch.ones(len(example))
        for here, begin in zip(blocks, first, strict=True):
            number = int(here.sum())
            # Evenly spread, and each one uniform on 1 .. number, since `begin` is.
            count = (begin + sample * number // samples) % number + 1
            masked_S |= exact_number_noise(here, count, generator).masked_S
            chance_S[here] = count / number
        yield masked_S, chance_S, block_S


def _all_masks(blocks: Sequence[Tensor], block_S: Tensor, number: int) -> Iterator[Mask]:
    """Take every mask of each block once, beside those of the others: blocks do not see each other's masks.

    A mask of k among n places is drawn with chance 1 / (n C(n, k)) and then counts n / k; over `number` masks that come
    once each, cross-entropies divided by k C(n, k) / number have the bound as their mean.
    """
    places = [here.nonzero()[:, 0].tolist() for here in blocks]
    subsets = [[c for k in range(1, len(own) + 1) for c in combinations(own, k)] for own in places]
    for index in range(number):
        masked_S, chance_S = torch.zeros(len(block_S), dtype=torch.bool), torch.ones(len(block_S))
        for own, masks in zip(places, subsets, strict=True):
            if index < len(masks):
                masked_S[list(masks[index])] = True
                k = len(masks[index])
                chance_S[list(masks[index])] = k * math.comb(len(own), k) / number
        yield masked_S, chance_S, block_S


def _estimates(model: BidirectionalLM, part: Sequence[tuple[Example, Mask]], found: Bound, chunk: int) -> list[float]:
    device = model.head_VD.device
    ids_BS, _, valid_BS = (x.to(device) for x in batch_of([example for example, _ in part]))
    masked_BS, chance_BS, block_BS = (
        padded([mask[i] for _, mask in part], fill).to(device) for i, fill in enumerate((False, 1.0, -1))
    )
    hidden_MD, _ = masked_pass(model, ids_BS, valid_BS, block_BS, masked_BS, model.note.context)
    nll_M, hit_M = nll_and_hits(model.logits, hidden_MD, ids_BS[masked_BS], chunk)
    chance_M = chance_BS[masked_BS].cpu()
    level_M = (chance_M * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1)
    for level, hit, nll in zip(level_M.tolist(), hit_M.tolist(), nll_M.tolist(), strict=True):
        found.masked[level] += 1
        found.correct[level] += hit
        found.nll[level] += nll
    return [total for total, _ in by_row(masked_BS.cpu(), nll_M / chance_M, hit_M)]
