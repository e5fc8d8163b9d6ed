"""Diffusion models that bring their own code: LLaDA, LLaDA2 and Nemotron-Labs-Diffusion behind the calls of the others.

Owns what is known of each by its `model_type`: mask token, blocks, and what its forward pass accepts.

Shape suffixes: B batch, S sequence, R rows of equal length, Q query columns, K key columns, D hidden.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dllm.errors import ModelError
from dllm.models.diffusion.llada import is_llada
from dllm.models.sharding import is_sharded, most

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelFamily:
    """A published family."""

    mask_token_id: int
    mode: Literal["mdlm", "hybrid"]
    block_size: int | None
    masks: Literal["none", "additive", "own"]
    """What its forward pass accepts: no mask that can be relied on; a 4-dimensional one that is added to scores; none,
    for it sets its own, and lays out noisy and clean text itself."""

    def mask_token_id_in(self, directory: Path) -> int:
        """Return the mask id that a checkpoint's config names, else the family's."""
        return int(json.loads((directory / "config.json").read_text()).get("mask_token_id") or self.mask_token_id)


KINDS = {
    "llada": ModelFamily(126336, "mdlm", None, "none"),
    "llada2_moe": ModelFamily(156895, "mdlm", 32, "additive"),
    "nemotron_labs_diffusion": ModelFamily(100, "hybrid", 32, "own"),
}
"""By `model_type`. Source: the models' configs and generation code; older code of LLaDA ignores padding masks (its
issues 89 and 105)."""


def kind_of(model: PreTrainedModel) -> ModelFamily | None:
    """Tell which published family a model with code of its own belongs to; None for transformers' own models."""
    if not type(model).__module__.startswith("transformers_modules"):
        return None
    return KINDS.get(model.config.model_type)


def kind_at(directory: Path) -> ModelFamily | None:
    """Tell from its config to which published family a directory's model belongs."""
    try:
        return KINDS.get(json.loads((directory / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def needs_its_code(directory: Path) -> bool:
    """Tell whether a published model runs by code of its own alone; LLaDA runs as a Llama too."""
    return kind_at(directory) is not None and not is_llada(directory)


PAIRED = ("block_diff", "sbd_block_diff")
"""Values of `dlm_paradigm` for training: in the code as published the first has a causal clean half; where there is a
second, as in code before it, only that one has."""


def paired_config(directory: Path, block_size: int) -> dict[str, Any]:
    """Say how a config must read for code with masks of its own to train; as published it reads for generation."""
    knows_both = any(PAIRED[1] in file.read_text(errors="replace") for file in directory.glob("*.py"))
    return {"dlm_paradigm": PAIRED[knows_both], "block_size": block_size}


def run(
    model: PreTrainedModel,
    kind: ModelFamily,
    ids_BQ: Tensor,
    valid_BQ: Tensor | None,
    position_ids_BQ: Tensor,
    visible_BQK: Tensor | None,
) -> Tensor:
    """Run a model's own forward pass; return hidden_BQD.

    Raises:
        ModelError: its code cannot do what is asked, or its head cannot be left out.
    """
    if kind.masks == "own":
        raise ModelError(
            "this model's code sets its own masks", where=model.config.model_type, hint="use --sampler own"
        )
    plainly = _accepted(model, use_cache=False, return_dict=True)
    dtype, call = _in_one_dtype(model, ids_BQ.device.type)
    with without_head(model) as width:
        if kind.masks == "additive":
            if visible_BQK is None:
                visible_BQK = torch.ones(*ids_BQ.shape, ids_BQ.shape[1], dtype=torch.bool, device=ids_BQ.device)
            scores = torch.zeros(visible_BQK.shape, dtype=dtype, device=ids_BQ.device)
            scores = scores.masked_fill(~visible_BQK, torch.finfo(dtype).min)[:, None]
            found = call(ids_BQ, attention_mask=scores, position_ids=position_ids_BQ, **plainly)
            return checked(found.logits, width)
        split = is_sharded(model)
        if not split and (valid_BQ is None or bool(valid_BQ.all())):
            return checked(call(ids_BQ, **plainly).logits, width)
        return _by_length(call, ids_BQ, valid_BQ, plainly, width, in_step=split)


def _by_length(
    call: Callable[..., Any],
    ids_BQ: Tensor,
    valid_BQ: Tensor | None,
    plainly: dict[str, Any],
    width: int,
    *,
    in_step: bool,
) -> Tensor:
    """Run rows of equal length together, and no padding at all; return hidden_BQD, 0 on padding.

    Whether such code heeds padding masks depends on its age. Nothing is lost: what models of this size cost is
    arithmetic, and padding would only add to it.

    Args:
        in_step: make as many passes as the rank that needs the most, as split weights demand.
    """
    if valid_BQ is None:
        valid_BQ = torch.ones_like(ids_BQ, dtype=torch.bool)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(valid_BQ.sum(1).tolist()):
        groups.setdefault(length, []).append(row)
    idle = most(len(groups), ids_BQ.device) - len(groups) if in_step else 0
    hidden_BQD: Tensor | None = None
    for length, rows in groups.items():
        here_BQ = torch.zeros_like(valid_BQ)
        here_BQ[rows] = valid_BQ[rows]
        hidden_RSD = checked(call(ids_BQ[here_BQ].view(len(rows), length), **plainly).logits, width)
        if hidden_BQD is None:
            hidden_BQD = hidden_RSD.new_zeros(*ids_BQ.shape, width)
        hidden_BQD[here_BQ] = hidden_RSD.flatten(0, 1)
    assert hidden_BQD is not None
    for _ in range(idle):
        hidden_BQD = hidden_BQD + 0 * call(ids_BQ[:1, :1], **plainly).logits.sum()
    return hidden_BQD


def run_paired(model: PreTrainedModel, ids_BS: Tensor, masked_BS: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Give clean ids and the places to mask to code that lays out [x_t | x_0] itself.

    Shapes: S a multiple of block_size; returns hidden_BSD of the noisy half, and of the clean, causal one.

    Raises:
        ModelError: its forward pass takes no masked_indices, or gives no causal logits.
    """
    needed = {"labels": ids_BS, "masked_indices": masked_BS, "skip_loss": True}
    asked = _accepted(model, **needed, block_size=block_size)
    family = model.config.model_type
    if missing := sorted(set(needed) - set(asked)):
        raise ModelError(f"the model's forward pass takes no {missing[0]}", where=family)
    if (own := getattr(model.config, "dlm_paradigm", None)) not in PAIRED:
        raise ModelError(f"the model's code was set up for {own}, not for training", where=family)
    _, call = _in_one_dtype(model, ids_BS.device.type)
    with without_head(model) as width:
        found = call(ids_BS, **asked)
    noisy, clean = found.logits, getattr(found, "causal_logits", None)
    if clean is None and noisy.shape[1] == 2 * ids_BS.shape[1]:  # older code hands out both halves as one
        noisy, clean = noisy.chunk(2, 1)
    if clean is None:
        raise ModelError("the model's code gives no causal logits", where=family)
    return checked(noisy, width), checked(clean, width)


def copy_code(source: Path, directory: Path, values: dict[str, Any]) -> None:
    """Put a model's code beside a checkpoint of it, and its config's `values` and `auto_map` as they were published."""
    for file in sorted(source.glob("*.py")):
        shutil.copyfile(file, directory / file.name)
    path = directory / "config.json"
    written, published = json.loads(path.read_text()), json.loads((source / "config.json").read_text())
    for name in (*values, "auto_map"):
        written.pop(name, None)
        if name in published:
            written[name] = published[name]
    path.write_text(json.dumps(written, indent=2) + "\n")


def _in_one_dtype(model: PreTrainedModel, device: str) -> tuple[torch.dtype, Callable[..., Any]]:
    """Return the dtype in which a model's code is to compute, and how to call it.

    Where autocast asks for another dtype than the weights', they are converted as a whole, and gradients flow back to
    them: such code gathers, adds and attends across dtypes that autocast would mix.
    """
    if not torch.is_autocast_enabled(device):
        return model.dtype, model
    dtype = torch.get_autocast_dtype(device)
    weights = {}
    if not is_sharded(model):  # split weights come to a pass in that dtype
        weights = {n: p.to(dtype) for n, p in model.named_parameters() if p.dtype != dtype and p.is_floating_point()}

    def call(ids: Tensor, **asked: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return torch.func.functional_call(model, weights, (ids,), asked)

    return dtype, call


def _accepted(model: PreTrainedModel, **values: Any) -> dict[str, Any]:
    """Keep the arguments that a model's forward pass names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in values.items() if name in names}


def checked(hidden: Tensor, width: int) -> Tensor:
    """Return what came out in the place of logits, if it is what goes into the head.

    Raises:
        ModelError: it is of another width, so the head was not the last step.
    """
    if hidden.shape[-1] != width:
        raise ModelError("the model's code does not go through its output embedding", hint="use --sampler own")
    return hidden


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[int]:
    """Let a model's head pass its input through, so that logits are computed only where they are wanted."""
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise ModelError("the model has no linear output embedding", where=model.config.model_type)
    head: Any = found
    head.forward = lambda x: x
    try:
        yield head.in_features
    finally:
        del head.forward
