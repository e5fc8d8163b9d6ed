"""LLaDA run by its own code; `llada` reads it as a Llama instead.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dllm.errors import ModelError
from dllm.models.diffusion import remote
from dllm.models.diffusion.bidirectional import DiffusionConfig
from dllm.models.diffusion.own_code import OwnCodeLM


class LLaDA(OwnCodeLM):
    """LLaDA, whose code takes no attention mask that can be relied on.

    Source: the model's config and generation code; older code ignores padding masks (its issues 89 and 105).
    """

    published = DiffusionConfig("mdlm", 126336)
    can_run_without_code = True

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json names this family."""
        return config.get("model_type") == "llada"

    @classmethod
    def training_conflict(cls, *, predicts_next: bool, by_block: bool) -> str | None:
        """Return why the model cannot be trained that way; None where it can."""
        if predicts_next or by_block:
            return (
                "this model's code takes no attention mask: mode mdlm with attention full is all it can be trained with"
            )
        return None

    def hidden(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        allowed_BSS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states; arguments as in the base class."""
        if allowed_BSS is not None:
            raise ModelError("this model's code takes no attention mask", where=self.config.model_type)
        return remote.run_without_mask(self.model, ids_BS, valid_BS)
