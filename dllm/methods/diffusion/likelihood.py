"""Likelihood of given responses under a diffusion model: a Monte Carlo bound, its error, and accuracy by noise level.

Shape suffixes: B batch, S sequence, M masked positions, K blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from dllm.methods.diffusion.noise import batch_of, exact_number_noise, noise_generator, padded
from dllm.methods.diffusion.settings import LEVELS
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example
from dllm.training.cross_entropy import nll_and_hits

Mask = tuple[Tensor, Tensor, Tensor]
"""masked_S bool, prob_S float32 (what the cross-entropy of a position is divided by), block_S int64."""


@dataclass
class Bound:
    """Sums over responses and masks; figures are computed from them at the end.

    Units: nats; tokens of responses.
    """

    tokens: int = 0
    estimates: list[list[float]] = field(default_factory=list)
    """Per response, one estimate of its bound per mask; a single one where all its masks were enumerated."""
    correct: list[int] = field(default_factory=lambda: [0] * LEVELS)
    masked: list[int] = field(default_factory=lambda: [0] * LEVELS)
    nll: list[float] = field(default_factory=lambda: [0.0] * LEVELS)

    def figures(self) -> dict[str, Any]:
        """Return the bound and its standard error per token, perplexity, and accuracy and loss by noise level.

        The standard error is over masks: other masks, the same responses.
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
    """Return the mean of the estimates of one response and its standard error, 0 for a single one.

    The error assumes independent estimates; evenly spaced numbers of masks make the true one smaller.
    """
    number, mean = len(estimates), sum(estimates) / len(estimates)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in estimates) / max(1, number - 1) / number)


@torch.no_grad()
def bound(
    model: DiffusionLM,
    examples: Sequence[Example],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    chunk: int = 512,
    count_out: bool = False,
    advance: Callable[[int], object] = lambda responses: None,
) -> Bound:
    """Bound the negative log-likelihood of responses from above, with so many mask samples per response.

    In each block of n response tokens k are masked, k uniform on 1 .. n and spaced evenly over the samples of a
    response; the cross-entropy on them times n / k is an unbiased estimate of the bound of the block. A model without
    blocks has one block. With blocks of one token the estimate is the autoregressive likelihood, exactly.

    Args:
        count_out: where the blocks of a response have no more than `samples` masks, enumerate them, so that the
            bound is exact; the figures by noise level then have no meaning.
        advance: called with the number of responses that are done.
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
    model: DiffusionLM, examples: Sequence[Example], *, batch_size: int, chunk: int = 512
) -> list[tuple[float, bool]]:
    """Return the negative log-likelihood of each response under the causal mask, and whether greedy decoding gives it.

    Greedy decoding never generates the mask token, so that token is not compared.
    Units: nats per response.
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


def causal_nll(model: DiffusionLM, examples: Sequence[Example], *, batch_size: int, chunk: int = 512) -> float:
    """Return the mean negative log-likelihood of response tokens under the causal mask.

    Units: nats per token.
    """
    scores = causal_scores(model, examples, batch_size=batch_size, chunk=chunk)
    tokens = sum(len(example) - example.prompt_length for example in examples)
    return sum(nll for nll, _ in scores) / max(1, tokens)


def by_row(places_BS: Tensor, nll_M: Tensor, hit_M: Tensor) -> list[tuple[float, bool]]:
    """Reduce scored positions by row: the sum of their cross-entropies, and whether all were hits."""
    counts = places_BS.sum(1).tolist()
    return [
        (float(nll.sum()), bool(hit.all())) for nll, hit in zip(nll_M.split(counts), hit_M.split(counts), strict=True)
    ]


@dataclass(frozen=True)
class _Plan:
    """One response and its masks; the mean over them is the bound itself (`is_exact`) or an estimate."""

    example: Example
    masks: Iterator[Mask]
    number: int
    is_exact: bool


def _plan(model: DiffusionLM, example: Example, samples: int, seed: int, count_out: bool) -> _Plan:
    block_S = model.blocks(len(example), example.prompt_length, model.config.block_size)
    response_S = torch.arange(len(example)) >= example.prompt_length
    blocks = [response_S & (block_S == block) for block in range(int(block_S.max()) + 1)]
    number = 2 ** max(int(here.sum()) for here in blocks) - 1
    if count_out and number <= samples:
        return _Plan(example, _all_masks(blocks, block_S, number), number, True)
    return _Plan(example, _masks(example, blocks, block_S, samples, seed), samples, False)


def _masks(example: Example, blocks: Sequence[Tensor], block_S: Tensor, samples: int, seed: int) -> Iterator[Mask]:
    """Draw the masks of one response."""
    generator = noise_generator(seed, "likelihood", 0, example.id)
    first = [int(torch.randint(int(here.sum()), (), generator=generator)) for here in blocks]
    for sample in range(samples):
        masked_S, prob_S = torch.zeros(len(example), dtype=torch.bool), torch.ones(len(example))
        for here, begin in zip(blocks, first, strict=True):
            number = int(here.sum())
            # Evenly spaced, and each one uniform on 1 .. number, since `begin` is.
            count = (begin + sample * number // samples) % number + 1
            masked_S |= exact_number_noise(here, count, generator).masked_S
            prob_S[here] = count / number
        yield masked_S, prob_S, block_S


def _all_masks(blocks: Sequence[Tensor], block_S: Tensor, number: int) -> Iterator[Mask]:
    """Enumerate the masks of each block, in parallel over blocks: a block does not attend to the masks of others.

    A mask of k among n positions has probability 1 / (n C(n, k)) and weight n / k; over `number` masks that occur once
    each, cross-entropies divided by k C(n, k) / number have the bound as their mean.
    """
    places = [here.nonzero()[:, 0].tolist() for here in blocks]
    subsets = [[c for k in range(1, len(own) + 1) for c in combinations(own, k)] for own in places]
    for index in range(number):
        masked_S, prob_S = torch.zeros(len(block_S), dtype=torch.bool), torch.ones(len(block_S))
        for own, masks in zip(places, subsets, strict=True):
            if index < len(masks):
                masked_S[list(masks[index])] = True
                k = len(masks[index])
                prob_S[list(masks[index])] = k * math.comb(len(own), k) / number
        yield masked_S, prob_S, block_S


def _estimates(model: DiffusionLM, part: Sequence[tuple[Example, Mask]], found: Bound, chunk: int) -> list[float]:
    device = model.head_VD.device
    ids_BS, _, valid_BS = (x.to(device) for x in batch_of([example for example, _ in part]))
    masked_BS, prob_BS, block_BS = (
        padded([mask[i] for _, mask in part], fill).to(device) for i, fill in enumerate((False, 1.0, -1))
    )
    hidden_MD, _ = model.masked_hidden(ids_BS, valid_BS, block_BS, masked_BS)
    nll_M, hit_M = nll_and_hits(model.logits, hidden_MD, ids_BS[masked_BS], chunk)
    prob_M = prob_BS[masked_BS].cpu()
    level_M = (prob_M * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1)
    for level, hit, nll in zip(level_M.tolist(), hit_M.tolist(), nll_M.tolist(), strict=True):
        found.masked[level] += 1
        found.correct[level] += hit
        found.nll[level] += nll
    return [total for total, _ in by_row(masked_BS.cpu(), nll_M / prob_M, hit_M)]
