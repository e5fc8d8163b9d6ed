"""A causal LM of transformers with its causal mask removed: the family of every checkpoint that no other recognises.

Any Llama, Qwen2, Qwen3, Mistral or Gemma3 will do; a saved checkpoint is an ordinary Hugging Face directory with a
`dllm.json` beside it.

Shape suffixes: B batch (1 in Columns), S sequence, Q query columns, K key columns, C columns of a pass, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dllm.models.diffusion.cache import CanvasCache
from dllm.models.diffusion.layout import causal_mask, positions, visible_columns
from dllm.models.diffusion.protocol import Columns, DiffusionLM


class TransformersLM(DiffusionLM):
    """A causal LM of transformers that takes its attention masks from us."""

    @classmethod
    @override
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return False

    @override
    def hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        allowed_BSS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        if position_ids_BS is None:
            position_ids_BS = positions(ids_BS, valid_BS)
        return self._run(ids_BS, position_ids_BS, visible_columns(ids_BS, valid_BS, allowed_BSS), causal=False)

    @override
    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        visible_BSS = None
        if valid_BS is not None and not bool(valid_BS.all()):
            rows, length = ids_BS.shape
            causal_BSS = causal_mask(length, length, ids_BS.device).expand(rows, -1, -1)
            visible_BSS = visible_columns(ids_BS, valid_BS, causal_BSS)
        return self._run(ids_BS, positions(ids_BS, valid_BS), visible_BSS, causal=True)

    @override
    def cached_hidden(self, ids_BQ: Tensor, position_ids_BQ: Tensor, visible_BQK: Tensor, cache: CanvasCache) -> Tensor:
        return self._run(ids_BQ, position_ids_BQ, visible_BQK, causal=False, cache=cache)

    @override
    def columns(self, number: int) -> Columns:
        return _CachedColumns(self, number)

    def _run(
        self,
        ids_BQ: Tensor,
        position_ids_BQ: Tensor,
        visible_BQK: Tensor | None,
        *,
        causal: bool,
        cache: CanvasCache | None = None,
    ) -> Tensor:
        key_position_BK = position_ids_BQ if cache is None else cache.position_ids_BK
        mask = self._masks(visible_BQK, position_ids_BQ, key_position_BK, causal)
        found = self.model.base_model(
            input_ids=ids_BQ,
            attention_mask=mask,
            position_ids=position_ids_BQ,
            past_key_values=cache,
            use_cache=cache is not None,
            is_causal=causal,
        )
        hidden_BQD: Tensor = found.last_hidden_state
        return hidden_BQD

    def _masks(
        self, visible_BQK: Tensor | None, position_ids_BQ: Tensor, position_ids_BK: Tensor, causal: bool
    ) -> Tensor | dict[str, Tensor | None] | None:
        """Return masks as transformers takes them: one, or one per kind of layer. None: all columns (or all before)."""
        kinds = getattr(self.model_config, "layer_types", None)
        window = getattr(self.model_config, "sliding_window", None)
        full = None if visible_BQK is None else visible_BQK[:, None]
        near = full
        if window is not None and position_ids_BK.shape[1] > window:
            # Both ways: a window of W reaches W - 1 positions back, and as many ahead without a causal mask.
            apart_BQK = position_ids_BQ[:, :, None] - position_ids_BK[:, None]
            near_BQK = apart_BQK.abs() < window
            if causal and visible_BQK is None:
                near_BQK &= apart_BQK >= 0
            near = (near_BQK if visible_BQK is None else near_BQK & visible_BQK)[:, None]
        if kinds is not None:
            return {"full_attention": full, "sliding_attention": near}
        return full if window is None else near


class _CachedColumns:
    """Columns of a model that runs over a `CanvasCache`."""

    def __init__(self, model: TransformersLM, number: int) -> None:
        self.model = model
        self.position_ids_BK = torch.arange(number, device=model.head_VD.device)[None]
        self.cache = CanvasCache(self.position_ids_BK)

    def run(self, ids_BC: Tensor, begin: int, causal: bool) -> Tensor:
        end = begin + ids_BC.shape[1]
        if causal:
            visible_CK = causal_mask(end - begin, end, ids_BC.device, begin)
        else:
            visible_CK = torch.ones(end - begin, end, dtype=torch.bool, device=ids_BC.device)
        self.cache.next_pass(begin, end, end)
        return self.model.cached_hidden(ids_BC, self.position_ids_BK[:, begin:end], visible_CK[None], self.cache)
