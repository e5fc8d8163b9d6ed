"""LLaDA2, by its own code.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.layout import visible_columns
from dllm.models.diffusion.own_code import OwnCodeLM, accepted, check_width, in_one_dtype, without_head


class LLaDA2(OwnCodeLM):
    """LLaDA2, whose code adds a 4-dimensional mask to attention scores. Source: the model's config."""

    model_type = "llada2_moe"
    published = DiffusionConfig("mdlm", 156895, 32)

    @override
    def _hidden(
        self, ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        visible_BSS = visible_columns(ids_BS, valid_BS, allowed_BSS)
        options = accepted(self.model, use_cache=False, return_dict=True)
        dtype, call = in_one_dtype(self.model, ids_BS.device.type)
        with without_head(self.model) as width:
            if visible_BSS is None:
                visible_BSS = torch.ones(*ids_BS.shape, ids_BS.shape[1], dtype=torch.bool, device=ids_BS.device)
            scores = torch.zeros(visible_BSS.shape, dtype=dtype, device=ids_BS.device)
            scores = scores.masked_fill(~visible_BSS, torch.finfo(dtype).min)[:, None]
            found = call(ids_BS, attention_mask=scores, position_ids=position_ids_BS, **options)
            return check_width(found.logits, width)
