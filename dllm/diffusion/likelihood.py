"""How likely a diffusion model finds given answers: a bound by Monte Carlo, its error, and accuracy by noise level.

Shape suffixes: B batch, S sequence, M masked places, K blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dllm.data.collate import Example
from dllm.diffusion.losses import weighted_cross_entropy
from dllm.diffusion.noise import exact_number_noise, noise_generator
from dllm.diffusion.passes import batch_of, grid, masked_pass, padded
from dllm.models.bidirectional import BidirectionalLM

LEVELS = 10


@dataclass
class Bound:
    """Sums over answers and masks; figures are made of them at the end.

    Units: nats; tokens of answers.
    """

    tokens: int = 0
    estimates: list[list[float]] = field(default_factory=list)
    """Of each answer, one estimate of its bound a mask."""
    correct: list[int] = field(default_factory=lambda: [0] * LEVELS)
    masked: list[int] = field(default_factory=lambda: [0] * LEVELS)
    nll: list[float] = field(default_factory=lambda: [0.0] * LEVELS)

    def figures(self) -> dict[str, Any]:
        """Return the bound and its standard error a token, perplexity, and the curve over noise levels.

        The standard error is the masks' alone: other masks, the same answers.
        """
        means = [sum(own) / len(own) for own in self.estimates]
        variances = [
            sum((x - mean) ** 2 for x in own) / (len(own) - 1) / len(own)
            for own, mean in zip(self.estimates, means, strict=True)
            if len(own) > 1
        ]
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


@torch.no_grad()
def bound(
    model: BidirectionalLM,
    examples: Sequence[Example],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    chunk: int = 512,
    advance: Callable[[int], object] = lambda answers: None,
) -> Bound:
    """Bound the answers' negative log-likelihood from above, by as many masks each as asked.

    In each block of n answer tokens k of them are masked, k uniform on 1 .. n and spread evenly over an answer's
    samples; the cross-entropy on them times n / k estimates the block's bound without bias. A model without blocks is
    one block. With blocks of one token the estimate is the autoregressive likelihood, exactly.

    Args:
        advance: told how many more answers are done.
    Source: LLaDA (Nie et al. 2025), equation 6; BD3-LM (Arriola et al. 2025), equation 8, for the sum over blocks.
    """
    found = Bound()
    todo = ((example, mask) for example in examples for mask in _masks(model, example, samples, seed))
    pending: list[float] = []
    while part := list(islice(todo, batch_size)):
        for estimate in _estimates(model, part, found, chunk):
            pending.append(estimate)
            if len(pending) == samples:
                found.estimates.append(pending)
                pending = []
                advance(1)
    found.tokens = sum(len(example) - example.prompt_length for example in examples)
    return found


@torch.no_grad()
def causal_nll(model: BidirectionalLM, examples: Sequence[Example], *, batch_size: int, chunk: int = 512) -> float:
    """Return the mean negative log-likelihood of answer tokens under the same weights with their causal mask.

    Units: nats a token.
    """
    total, tokens = 0.0, 0
    for begin in range(0, len(examples), batch_size):
        ids_BS, maskable_BS, valid_BS = (
            x.to(model.head_VD.device) for x in batch_of(examples[begin : begin + batch_size])
        )
        ahead_BS = maskable_BS[:, 1:]
        hidden_MD = model.causal_hidden(ids_BS, valid_BS)[:, :-1][ahead_BS]
        labels_M = ids_BS[:, 1:][ahead_BS]
        _, nll_M, _ = weighted_cross_entropy(hidden_MD, model.head_VD, labels_M, torch.ones_like(labels_M), chunk)
        total, tokens = total + float(nll_M.double().sum()), tokens + len(labels_M)
    return total / max(1, tokens)


def _masks(
    model: BidirectionalLM, example: Example, samples: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw one answer's masks. Shapes: yields masked_S bool, weight_S and chance_S float32, block_S int64."""
    generator = noise_generator(seed, "likelihood", 0, example.id)
    block_S = grid(example, model.note.mode, model.note.block_size, model.prompt_blocks)
    answer_S = torch.arange(len(example)) >= example.prompt_length
    blocks = [answer_S & (block_S == block) for block in range(int(block_S.max()) + 1)]
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


def _estimates(
    model: BidirectionalLM, part: Sequence[tuple[Example, tuple[Tensor, ...]]], found: Bound, chunk: int
) -> list[float]:
    device = model.head_VD.device
    ids_BS, _, valid_BS = (x.to(device) for x in batch_of([example for example, _ in part]))
    masked_BS, chance_BS, block_BS = (
        padded([masks[i] for _, masks in part], fill).to(device) for i, fill in enumerate((False, 1.0, -1))
    )
    hidden_MD, _ = masked_pass(model, ids_BS, valid_BS, block_BS, masked_BS, model.note.context)
    chance_M = chance_BS[masked_BS]
    _, nll_M, hit_M = weighted_cross_entropy(hidden_MD, model.head_VD, ids_BS[masked_BS], 1 / chance_M, chunk)
    level_M = (chance_M * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1).cpu()
    for level, hit, nll in zip(level_M.tolist(), hit_M.tolist(), nll_M.tolist(), strict=True):
        found.masked[level] += 1
        found.correct[level] += hit
        found.nll[level] += nll
    row_M = masked_BS.nonzero()[:, 0].cpu()
    sums_B = torch.zeros(len(part), dtype=torch.float64).index_add_(0, row_M, (nll_M.double() / chance_M).cpu())
    return [float(x) for x in sums_B]
