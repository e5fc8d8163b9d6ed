"""Base of the published families that run by the code in their directory.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dllm.errors import ModelError
from dllm.models.diffusion.bidirectional import BidirectionalLM


class OwnCodeLM(BidirectionalLM):
    """A published diffusion LM that runs by its own code, without our caches."""

    runs_own_code = True
    can_run_without_code = False

    @property
    def block_origin(self) -> Literal["answer", "sequence"]:
        """Return where its blocks are counted from: the first token of the row."""
        return "sequence"

    @property
    def caches(self) -> frozenset[str]:
        """Return the caches that it supports: none."""
        return frozenset({"none"})

    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Return the last hidden states with a causal mask."""
        before_SS = torch.ones(ids_BS.shape[1], ids_BS.shape[1], dtype=torch.bool, device=ids_BS.device).tril()
        return self.hidden(ids_BS, valid_BS, allowed_BSS=before_SS.expand(len(ids_BS), -1, -1))

    def _run(self, *_: Any, **__: Any) -> Tensor:
        raise ModelError(
            "no cache of ours through a model's own code", where=self.config.model_type, hint="--cache none"
        )
