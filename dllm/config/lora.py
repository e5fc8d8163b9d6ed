"""Settings of LoRA adapters: read by models, and part of the settings of the methods that train adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dllm.config.section import Section, Size


class Lora(Section):
    """Low-rank adapters (LoRA), trained while the weights stay frozen in train.compute_dtype."""

    rank: Size = 16
    alpha: Size = 32
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Last component of the names of the linear layers to adapt, such as q_proj."""
