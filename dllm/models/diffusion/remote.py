"""Forward passes of diffusion models that bring their own code.

Shape suffixes: B batch, S sequence, R rows of equal length, Q query columns, K key columns, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dllm.errors import ModelError
from dllm.models.sharding import is_sharded, most

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_with_mask(
    model: PreTrainedModel, ids_BQ: Tensor, position_ids_BQ: Tensor, visible_BQK: Tensor | None
) -> Tensor:
    """Run a model's own forward pass with a 4-dimensional mask that its code adds to scores; return hidden_BQD.

    Raises:
        ModelError: its head cannot be left out.
    """
    options = _accepted(model, use_cache=False, return_dict=True)
    dtype, call = _in_one_dtype(model, ids_BQ.device.type)
    with without_head(model) as width:
        if visible_BQK is None:
            visible_BQK = torch.ones(*ids_BQ.shape, ids_BQ.shape[1], dtype=torch.bool, device=ids_BQ.device)
        scores = torch.zeros(visible_BQK.shape, dtype=dtype, device=ids_BQ.device)
        scores = scores.masked_fill(~visible_BQK, torch.finfo(dtype).min)[:, None]
        found = call(ids_BQ, attention_mask=scores, position_ids=position_ids_BQ, **options)
        return checked(found.logits, width)


def run_without_mask(model: PreTrainedModel, ids_BQ: Tensor, valid_BQ: Tensor | None) -> Tensor:
    """Run a model's own forward pass without any mask, and so without padding; return hidden_BQD.

    Raises:
        ModelError: its head cannot be left out.
    """
    options = _accepted(model, use_cache=False, return_dict=True)
    _, call = _in_one_dtype(model, ids_BQ.device.type)
    with without_head(model) as width:
        split = is_sharded(model)
        if not split and (valid_BQ is None or bool(valid_BQ.all())):
            return checked(call(ids_BQ, **options).logits, width)
        return _by_length(call, ids_BQ, valid_BQ, options, width, in_step=split)


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


PAIRED = ("block_diff", "sbd_block_diff")
"""Values of `dlm_paradigm` for training: in the code as published the first has a causal clean half; where there is a
second, as in code before it, only that one has."""


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
