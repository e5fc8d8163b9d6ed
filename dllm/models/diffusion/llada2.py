"""LLaDA2 run by its own code.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dllm.models.diffusion import remote
from dllm.models.diffusion.bidirectional import DiffusionConfig, places, visible
from dllm.models.diffusion.own_code import OwnCodeLM


class LLaDA2(OwnCodeLM):
    """LLaDA2, whose code adds a 4-dimensional mask to attention scores. Source: the model's config."""

    published = DiffusionConfig("mdlm", 156895, 32)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json names this family."""
        return config.get("model_type") == "llada2_moe"

    def hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        allowed_BSS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states; arguments as in the base class."""
        if position_ids_BS is None:
            position_ids_BS = places(ids_BS, valid_BS)
        return remote.run_with_mask(self.model, ids_BS, position_ids_BS, visible(ids_BS, valid_BS, allowed_BSS))
