"""The strategy of `mdlm`: masked diffusion, with a choice of normaliser and of complementary masks.

Shape suffixes: B batch, S sequence, K blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from dllm.config.params import Train
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.methods.diffusion.noise import Noise, uniform_noise
from dllm.methods.diffusion.settings import Mdlm
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example
from dllm.training.strategy import Split


class MdlmStrategy(MaskedStrategy):
    """Train on masked tokens alone."""

    mode = "mdlm"

    def __init__(self, model: DiffusionLM, splits: Mapping[Split, Sequence[Example]], settings: Train) -> None:
        super().__init__(model, splits, settings)
        self.mdlm = cast(Mdlm, settings.method_settings)
        self.views = 2 if self.mdlm.complementary else 1

    def _draw(self, split: Split, row: int, epoch: int, block_S: Tensor, maskable_S: Tensor) -> list[Noise]:
        if not self.mdlm.complementary:
            return super()._draw(split, row, epoch, block_S, maskable_S)
        t_K, generator = self._times(split, row, epoch, block_S)
        eps = self.mdlm.eps
        # Probabilities from eps to 1 - eps, so that those of the complement have the same range. A pair always masks
        # something.
        t_K = t_K * (1 - 2 * eps) / (1 - eps)
        noise = uniform_noise(maskable_S, block_S, t_K, generator, eps=eps, at_least_one=False)
        return [noise, noise.complement(maskable_S)]

    def _row_weights(self, supervised_B: Tensor) -> Tensor:
        if self.mdlm.normaliser == "sequence":
            return 1 / supervised_B.clamp_min(1).float()
        return super()._row_weights(supervised_B)

    def _denominator(self, supervised_B: Tensor) -> float:
        return super()._denominator(supervised_B) if self.mdlm.normaliser == "token" else float(len(supervised_B))
