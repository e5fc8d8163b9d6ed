"""The strategy of `hybrid`: masked diffusion and next-token prediction with the same weights.

The next-token term scores the hidden state of a clean token against the token after it: it shifts the data itself.

Shape suffixes: B batch, S sequence, K blocks of a row, D hidden, M scored positions.
Source: Nemotron-Labs-Diffusion (arXiv 2607.05722).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from dllm.config.params import Train
from dllm.methods.diffusion.masked import Corrupted, MaskedStrategy
from dllm.methods.diffusion.noise import Noise, exact_count_noise
from dllm.methods.diffusion.settings import Hybrid
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example
from dllm.training.cross_entropy import weighted_cross_entropy
from dllm.training.strategy import Split


class HybridStrategy(MaskedStrategy):
    """Train on masked tokens, and on the next token of clean responses."""

    mode = "hybrid"
    shown = ("loss", "diffusion_loss", "ar_loss", "masked_acc", "val_loss")

    def __init__(self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train) -> None:
        super().__init__(model, splits, settings)
        self.hybrid = cast(Hybrid, settings.method_settings)
        self.counts |= {"ar_nll": 1, "ar_correct": 1}
        self.diffusion_weight = self.hybrid.ar_loss_alpha

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return also the two terms of the loss, before ar_loss_alpha, and next-token accuracy.

        Units: nats per token.
        """
        figures, supervised = super().metrics(sums), sums["supervised"][0]
        if supervised:
            figures["diffusion_loss"] = sums["weighted"][0] / supervised
            figures["ar_loss"] = sums["ar_nll"][0] / supervised
            figures["ar_acc"] = sums["ar_correct"][0] / supervised
        return figures

    @property
    def _block_size(self) -> int | None:
        by_block = self.hybrid.attention == "block" or self.hybrid.corruption == "exact_count"
        return self.hybrid.block_size if by_block else None

    @property
    def _bounds_likelihood(self) -> bool:
        return self.hybrid.corruption == "uniform"

    def _draw(self, split: Split, row: int, epoch: int, block_S: Tensor, maskable_S: Tensor) -> list[Noise]:
        if self.hybrid.corruption == "uniform":
            return super()._draw(split, row, epoch, block_S, maskable_S)
        t_K, generator = self._times(split, row, epoch, block_S)
        assert self.hybrid.block_size is not None
        noise = exact_count_noise(
            maskable_S,
            block_S,
            t_K,
            generator,
            eps=self.hybrid.eps,
            block_size=self.hybrid.block_size,
            half_life_ratio=self.hybrid.half_life_ratio,
            at_least_one=self.hybrid.at_least_one,
        )
        return [noise]

    def _clean_hidden(self, batch: Corrupted, clean_BSD: Tensor | None) -> Tensor | None:
        if clean_BSD is None:
            clean_BSD = self.model.causal_hidden(batch.ids_BS, batch.valid_BS)
        return clean_BSD[:, :-1][batch.maskable_BS[:, 1:]].to(self.dtype)

    def _score_clean(self, batch: Corrupted, clean_MD: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, int]:
        labels_M = batch.ids_BS[:, 1:][batch.maskable_BS[:, 1:]]
        ones_M = torch.ones(len(clean_MD), device=self.device)
        loss, nll_M, hit_M = weighted_cross_entropy(
            clean_MD, self.model.head_VD, labels_M, ones_M, self.hybrid.ce_chunk_size
        )
        sums["ar_nll"] += nll_M.double().sum().cpu()
        sums["ar_correct"] += hit_M.sum().cpu()
        return loss, len(nll_M)

    @property
    def _passes(self) -> int:
        return 2
