"""Text that is run a stretch of columns at a time over what is kept of those before: causally, or looking both ways.

transformers' models run over a `CanvasCache`; a published one that sets its own masks runs by its own code, over a
cache of transformers, and by the switch that this code has on its attention layers.

Shape suffixes: B batch (1), K columns, C columns of a pass, D hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dllm.errors import ModelError
from dllm.models.diffusion import remote
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.models.diffusion.cache import CanvasCache


class Columns(Protocol):
    """One row of text and the keys and values of what was run of it."""

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        """Run the columns from `begin` on over those before; what was kept of later ones is forgotten.

        Args:
            causal: let none of them see a later one, and keep them for good; otherwise all see all, for this time.

        Shapes: ids_BC int64; returns hidden_BCD.
        """


def columns_of(model: BidirectionalLM, number: int) -> Columns:
    """Make room for a row of so many columns.

    Raises:
        ModelError: the model's own code has no switch, or was set up for training.
    """
    return _ByOwnCode(model) if model.sets_own_masks else _ByTransformers(model, number)


class _ByTransformers:
    def __init__(self, model: BidirectionalLM, number: int) -> None:
        self.model = model
        self.position_ids_BK = torch.arange(number, device=model.head_VD.device)[None]
        self.cache = CanvasCache(self.position_ids_BK)

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        end = begin + ids_BC.shape[1]
        visible_BCK = torch.ones(1, ids_BC.shape[1], end, dtype=torch.bool, device=ids_BC.device)
        if causal:
            visible_BCK = visible_BCK.tril(begin)
        self.cache.write(begin, end, end)
        return self.model.part(ids_BC, self.position_ids_BK[:, begin:end], visible_BCK, self.cache)


class _ByOwnCode:
    """Source: the calls that Nemotron-Labs-Diffusion's own generation code makes."""

    def __init__(self, model: BidirectionalLM) -> None:
        from transformers import DynamicCache

        family = model.config.model_type
        self.model: Any = model.model
        self.switched: list[Any] = [module for module in self.model.modules() if hasattr(module, "diffusion_lm")]
        if not self.switched:
            raise ModelError("the model's code has no switch between causal and full attention", where=family)
        if model.set_for_training:
            raise ModelError("the model's code was set up for training, not for generation", where=family)
        self.cache = DynamicCache()

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        if (beyond := self.cache.get_seq_length() - begin) > 0:
            self.cache.crop(-beyond)
        for module in self.switched:
            module.diffusion_lm = not causal
        try:
            with remote.without_head(self.model) as width:
                found = self.model(ids_BC, past_key_values=self.cache, use_cache=causal, use_causal_mask=causal)
        finally:
            for module in self.switched:
                module.diffusion_lm = True  # as published
        return remote.checked(found.logits, width)
