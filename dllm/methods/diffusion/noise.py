"""Noise: which response tokens are masked, and with which probability; a function of seed, epoch and row id.

Independent of batch composition, rank and resumption; the global random state is not used.

Shape suffixes: S sequence, K blocks of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.training.batches import Example, collate
from dllm.training.order import derive_seed

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, lie evenly in [0, 1) however many are taken."""


@dataclass(frozen=True)
class Noise:
    """One row's masks.

    Shapes: masked_S bool; prob_S float32, the probability with which each position was masked (1 where it could not
        be).
    """

    masked_S: Tensor
    prob_S: Tensor

    def complement(self, maskable_S: Tensor) -> Noise:
        """Mask the maskable positions that this one leaves clean. Source: LLaDA2.0, on complementary masking."""
        return Noise(maskable_S & ~self.masked_S, torch.where(maskable_S, 1 - self.prob_S, 1.0))


class Times:
    """The noise levels t of a split's rows, uniform on [0, 1).

    With `low_discrepancy` the rows of an epoch, in the order in which they are visited, are spread evenly over [0, 1),
    so that every part of an epoch covers all levels. Source: MDLM (Sahoo et al. 2024), appendix C, made
    independent of batches.
    """

    def __init__(self, ids: Sequence[str], seed: int, split: str, low_discrepancy: bool) -> None:
        self.ids, self.seed, self.split, self.low_discrepancy = ids, seed, split, low_discrepancy
        self._epoch, self._ranks = -1, list[int]()

    def of(self, row: int, epoch: int, number: int, generator: torch.Generator) -> Tensor:
        """Return the levels of a row's `number` blocks; those of one row differ by multiples of 1 / number.

        Shapes: returns t_K float64.
        """
        if not self.low_discrepancy:
            return torch.rand(number, generator=generator, dtype=torch.float64)
        offset = derive_seed(self.seed, "times", self.split, epoch) / 2**63
        first = offset + GOLDEN * self._rank(row, epoch)
        order_K = torch.randperm(number, generator=generator).double() / number
        return first % 1 / number + order_K

    def _rank(self, row: int, epoch: int) -> int:
        if epoch != self._epoch:
            order = sorted(range(len(self.ids)), key=lambda i: derive_seed(self.seed, epoch, self.ids[i]))
            self._epoch, self._ranks = epoch, [0] * len(order)
            for rank, index in enumerate(order):
                self._ranks[index] = rank
        return self._ranks[row]


def noise_generator(seed: int, split: str, epoch: int, id: str) -> torch.Generator:
    """Return the random generator of a row."""
    return torch.Generator().manual_seed(derive_seed(seed, "noise", split, epoch, id))


def uniform_noise(
    maskable_S: Tensor, block_S: Tensor, t_K: Tensor, generator: torch.Generator, *, eps: float, at_least_one: bool
) -> Noise:
    """Mask each maskable position of block k independently with probability p = (1 - eps) t_k + eps.

    Args:
        at_least_one: draw only from masks that mask something in each block with maskable positions. A position's
            probability is then p / (1 - (1 - p)^n), and dividing its weight by that keeps the loss
            unbiased.

    Shapes: maskable_S bool, block_S int64 (below 0 before the response), t_K float64.
    Source: LLaDA (Nie et al. 2025), equation 3 and appendix A; the conditional probability follows from Bayes.
    """
    p_K = (1 - eps) * t_K + eps
    home_S = block_S.clamp_min(0)
    p_S = p_K[home_S]
    draw_S = torch.rand(len(maskable_S), generator=generator, dtype=torch.float64)
    if at_least_one:
        number_K, index_S = _counts(maskable_S, home_S, len(t_K))
        some_K = -torch.expm1(number_K * torch.log1p(-p_K.clamp_max(1 - 1e-12)))  # 1 - (1 - p)^n
        # The first masked position of a block is truncated geometric; those after it are independent.
        u_K = torch.rand(len(t_K), generator=generator, dtype=torch.float64)
        first_K = (torch.log1p(-u_K * some_K) / torch.log1p(-p_K.clamp_max(1 - 1e-12))).floor()
        first_S = first_K.clamp(min=0).minimum((number_K - 1).clamp_min(0).double())[home_S]
        masked_S = maskable_S & ((index_S == first_S) | ((index_S > first_S) & (draw_S < p_S)))
        p_S = p_S / some_K.clamp_min(1e-300)[home_S]
    else:
        masked_S = maskable_S & (draw_S < p_S)
    return Noise(masked_S, torch.where(maskable_S, p_S, 1.0).float())


def exact_count_noise(
    maskable_S: Tensor,
    block_S: Tensor,
    t_K: Tensor,
    generator: torch.Generator,
    *,
    eps: float,
    block_size: int,
    half_life_ratio: float,
    at_least_one: bool,
) -> Noise:
    """Mask round(r n) of the n maskable positions of each block, r = (1 - eps) t + eps, later ones more often.

    Position i of a block has log-weight ln 2 (1 - r) i / (half_life_ratio block_size) in a draw without replacement
    (Gumbel-top-k). `prob_S` is the block's k / n for all its positions: their weights sum to n exactly, and late
    positions weigh more by as much as they are masked more often.
    Source: Nemotron-Labs-Diffusion (arXiv 2607.05722), block-wise corruption; k and i count supervised positions only.
    """
    home_S = block_S.clamp_min(0)
    number_K, index_S = _counts(maskable_S, home_S, len(t_K))
    r_K = (1 - eps) * t_K + eps
    k_K = (r_K * number_K).round().clamp_min(1 if at_least_one else 0).minimum(number_K.double())
    slope_K = math.log(2) * (1 - r_K) / (half_life_ratio * block_size)
    u_S = torch.rand(len(maskable_S), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    score_S = slope_K[home_S] * index_S - torch.log(-torch.log(u_S))
    score_S = score_S.masked_fill(~maskable_S, float("-inf"))
    by_score_S = score_S.argsort(descending=True)
    order_S = by_score_S[home_S[by_score_S].argsort(stable=True)]
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S))
    size_K = torch.bincount(home_S, minlength=len(t_K))
    rank_S = place_S - (size_K.cumsum(0) - size_K)[home_S]
    masked_S = maskable_S & (rank_S < k_K[home_S])
    prob_S = (k_K / number_K.clamp_min(1))[home_S]
    return Noise(masked_S, torch.where(maskable_S & (prob_S > 0), prob_S, 1.0).float())


def exact_number_noise(maskable_S: Tensor, number: int, generator: torch.Generator) -> Noise:
    """Mask exactly `number` maskable positions, uniformly at random. Source: LLaDA, equation 6."""
    score_S = torch.rand(len(maskable_S), generator=generator, dtype=torch.float64).masked_fill(~maskable_S, 2.0)
    masked_S = torch.zeros_like(maskable_S)
    masked_S[score_S.argsort()[:number]] = True
    prob = number / max(1, int(maskable_S.sum()))
    return Noise(masked_S & maskable_S, torch.where(maskable_S, prob, 1.0).float())


def batch_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Collate examples. Shapes: returns ids_BS int64, maskable_BS bool (responses), valid_BS bool (no padding)."""
    ids_BS, maskable_BS = collate(examples)
    lengths_B = torch.tensor([len(example) for example in examples])
    return ids_BS, maskable_BS, torch.arange(ids_BS.shape[1]) < lengths_B[:, None]


def padded(values: Sequence[Tensor], fill: float) -> Tensor:
    """Stack rows of different lengths, filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def _counts(maskable_S: Tensor, home_S: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Count the maskable positions of each block, and number every position among them."""
    number_K = torch.zeros(blocks, dtype=torch.int64).index_add_(0, home_S, maskable_S.long())
    index_S = maskable_S.long().cumsum(0) - 1 - (number_K.cumsum(0) - number_K)[home_S]
    return number_K, index_S
