"""LoRA adapters: low-rank matrices beside frozen weights, trained in float32.

Owns how they are inserted, saved in peft's format, and merged into the weights.
Source: LoRA (Hu et al. 2021), section 4.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dllm.config.lora import Lora
from dllm.errors import ConfigError, ModelError

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS)
"""What `save` writes and peft's own `PeftModel.from_pretrained` reads."""

_NAME = "default"


class Adapter:
    """The adapters of some linear layers of a model.

    Args:
        model: its weights are frozen; modules inside it are replaced by adapted ones.
        settings: rank, scale and target modules.
        base: what the adapter belongs to, for those who load it elsewhere.
        revision: commit of `base`.

    Raises:
        ConfigError: peft is not installed, or target_modules name nothing, or the embedding or the head.
    """

    def __init__(self, model: PreTrainedModel, settings: Lora, base: str, revision: str | None = None) -> None:
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError:
            hint = "pip install 'dllm[lora]'"
            raise ConfigError("LoRA needs the package peft", where="train: lora", hint=hint) from None
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        named = {name for name, module in model.named_modules() if module in ends}
        if any(f".{name}".endswith(f".{target}") for name in named for target in settings.target_modules):
            # The loss multiplies by the head's own matrix, a chunk of positions at a time.
            raise ConfigError("the embedding and the head take no adapter", where="train: lora.target_modules")
        about = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            revision=revision,
        )
        model.requires_grad_(False)
        try:
            self._tuner: Any = LoraModel(model, about, _NAME)
        except ValueError:
            raise ConfigError(
                f"no module of the model is called {' or '.join(settings.target_modules)}",
                where="train: lora.target_modules",
            ) from None
        self._model, self._about = model, about
        for parameter in self._tensors().values():
            # Half precision would lose the small steps that these alone have to take.
            parameter.data = parameter.data.float()

    def save(self, directory: Path) -> None:
        """Write the adapter in peft's format."""
        tensors = {_public(name): p.detach().contiguous() for name, p in self._tensors().items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        self._about.save_pretrained(str(directory))

    def load(self, directory: Path) -> None:
        """Load what `save` wrote, exactly.

        Raises:
            ModelError: it is missing, or of another rank or for other modules.
        """
        path = directory / WEIGHTS
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read the adapter: {error}", where=str(path)) from None
        own = {_public(name): parameter for name, parameter in self._tensors().items()}
        if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in own.items()}:
            raise ModelError("the adapter is of another rank or for other modules", where=str(path))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def merge(self) -> None:
        """Merge the adapter into the weights; the model is an ordinary one again."""
        self._tuner.merge_and_unload()

    def _tensors(self) -> dict[str, Tensor]:
        marks = (f".lora_A.{_NAME}.", f".lora_B.{_NAME}.")
        return {name: p for name, p in self._model.named_parameters() if any(mark in name for mark in marks)}


def _public(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"
