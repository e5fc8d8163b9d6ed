"""Base of the families that run the code in their checkpoint's directory, and calls of such code.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import inspect
import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from dllm.errors import ModelError
from dllm.models.diffusion.config import Origin
from dllm.models.diffusion.layout import causal_mask, positions
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.sharding import is_sharded


class OwnCodeLM(DiffusionLM):
    """A published diffusion LM that runs its own code, without our caches."""

    model_type: ClassVar[str]
    """`model_type` in its config.json."""
    runs_own_code = True
    can_run_without_code = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
        super().__init__(model, tokenizer, mask_token_id)
        self.code = Path(str(model.config.name_or_path))
        """Where its code lies; `save` copies it."""
        self.changed: dict[str, Any] = {}
        """Config entries that were changed so that its code trains; `save` restores them."""

    @classmethod
    @override
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == cls.model_type

    @classmethod
    @override
    def training_conflict(cls, *, predicts_next: bool, by_block: bool, recomputes: bool) -> str | None:
        if recomputes:
            return "activation_checkpointing of a model with code of its own needs fsdp"
        return None

    @property
    @override
    def block_origin(self) -> Origin:
        return "sequence"

    @property
    @override
    def caches(self) -> frozenset[str]:
        return frozenset({"none"})

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
        return self._hidden(ids_BS, valid_BS, allowed_BSS, position_ids_BS)

    @override
    def causal_hidden(self, ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        rows, length = ids_BS.shape
        causal_BSS = causal_mask(length, length, ids_BS.device).expand(rows, -1, -1)
        return self.hidden(ids_BS, valid_BS, allowed_BSS=causal_BSS)

    @override
    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a directory as `DiffusionLM.save` does, with the code and the config entries as published."""
        super().save(directory, weights)
        for file in sorted(self.code.glob("*.py")):
            shutil.copyfile(file, directory / file.name)
        path = directory / "config.json"
        written, published = (json.loads(each.read_text()) for each in (path, self.code / "config.json"))
        for name in (*self.changed, "auto_map"):
            written.pop(name, None)
            if name in published:
                written[name] = published[name]
        path.write_text(json.dumps(written, indent=2) + "\n")

    @abstractmethod
    def _hidden(
        self, ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        """Return the last hidden states; arguments as in `hidden`."""


def in_one_dtype(model: PreTrainedModel, device: str) -> tuple[torch.dtype, Callable[..., Any]]:
    """Return the dtype in which a model's code is to compute, and how to call it.

    Where autocast asks for another dtype than the weights', they are converted as a whole, and gradients flow back to
    them: such code gathers, adds and attends across dtypes that autocast would mix.
    """
    if not torch.is_autocast_enabled(device):
        return model.dtype, model
    dtype = torch.get_autocast_dtype(device)
    weights = {}
    if not is_sharded(model):  # FSDP converts its shards itself
        weights = {n: p.to(dtype) for n, p in model.named_parameters() if p.dtype != dtype and p.is_floating_point()}

    def call(ids: Tensor, **arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return torch.func.functional_call(model, weights, (ids,), arguments)

    return dtype, call


def accepted(model: PreTrainedModel, **values: Any) -> dict[str, Any]:
    """Keep the arguments that a model's forward pass names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in values.items() if name in names}


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[int]:
    """Let a model's head return its input, so that logits are computed only where they are needed; yield its width.

    Raises:
        ModelError: the head is not one linear layer.
    """
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise ModelError("the model has no linear output embedding", where=model.config.model_type)
    head: Any = found
    head.forward = lambda x: x
    try:
        yield head.in_features
    finally:
        del head.forward


def check_width(hidden: Tensor, width: int) -> Tensor:
    """Return hidden states that a model's code returned as logits, `without_head`.

    Raises:
        ModelError: they have another width, so the head was not the last step.
    """
    if hidden.shape[-1] != width:
        raise ModelError("the model's code does not go through its output embedding", hint="use --sampler own")
    return hidden
