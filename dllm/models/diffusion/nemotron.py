"""Nemotron-Labs-Diffusion run by its own code.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm.errors import ModelError
from dllm.models.diffusion import remote
from dllm.models.diffusion.bidirectional import DiffusionConfig
from dllm.models.diffusion.own_code import OwnCodeLM


class NemotronLabsDiffusion(OwnCodeLM):
    """Nemotron-Labs-Diffusion, whose code sets its masks and lays out [x_t | x_0] itself. Source: the model's code."""

    published = DiffusionConfig("hybrid", 100, 32)
    sets_own_masks = True

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json names this family."""
        return config.get("model_type") == "nemotron_labs_diffusion"

    @classmethod
    def training_config(cls, directory: Path, block_size: int) -> dict[str, Any]:
        """Return the config entries to change so that its code trains."""
        knows_both = any(remote.PAIRED[1] in file.read_text(errors="replace") for file in directory.glob("*.py"))
        return {"dlm_paradigm": remote.PAIRED[knows_both], "block_size": block_size}

    @classmethod
    def training_conflict(cls, *, predicts_next: bool, by_block: bool) -> str | None:
        """Return why the model cannot be trained that way; None where it can."""
        if not (predicts_next and by_block):
            return "this model's code lays out blocks itself: train it with mode hybrid and attention block"
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
        raise ModelError("this model's code sets its own masks", where=self.config.model_type, hint="use --sampler own")

    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Return the last hidden states with a causal mask."""
        everything_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        return self.paired(ids_BS, everything_BS, torch.zeros_like(everything_BS))[1]

    def paired(self, ids_BS: Tensor, valid_BS: Tensor, masked_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run noisy blocks beside clean text; shapes as in the base class."""
        size, length = self.note.block_size, ids_BS.shape[1]
        if size is None:
            raise ModelError("this model has no layout of its own", where=self.config.model_type)
        room = (0, -length % size)
        shown_BS = nn.functional.pad(masked_BS | ~valid_BS, room, value=True)
        noisy_BSD, clean_BSD = remote.run_paired(self.model, nn.functional.pad(ids_BS, room), shown_BS, size)
        return noisy_BSD[:, :length], clean_BSD[:, :length]
