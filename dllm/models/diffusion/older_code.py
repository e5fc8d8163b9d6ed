"""Patches that let published models' code for transformers 4 load with transformers 5.

Known failures: a `tie_weights` that takes no arguments and a constructor that never calls `post_init` (LLaDA); a plain
list of tied weights, and plain rotary frequencies, whose formula transformers 5 no longer lists and which it leaves
unset after loading (LLaDA2); a cache that is cropped to a length (Nemotron), where transformers 5 takes the number of
tokens to remove.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def prepare(reference: str, directory: Path) -> None:
    """Patch a class of a model's own code before it is instantiated; its files are not changed.

    Args:
        reference: the class as `auto_map` names it, `module.Class`.
        directory: where the model and its code lie.
    """
    ROPE_INIT_FUNCTIONS.setdefault("default", plain_rope)
    made: Any = get_class_from_dynamic_module(reference.split("--")[-1], str(directory))
    own_tie, own_init = made.__dict__.get("tie_weights"), made.__init__
    if own_tie is not None and len(inspect.signature(own_tie).parameters) == 1:

        def tie_weights(self: Any, *_: Any, **__: Any) -> None:
            own_tie(self)

        made.tie_weights = tie_weights
    if isinstance(made._tied_weights_keys, list):
        made._tied_weights_keys = None  # a list does not name what they are tied to; none of these models ties any
    if getattr(own_init, "completes", False):
        return

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        if not hasattr(self, "all_tied_weights_keys"):
            self.post_init()

    init.completes = True  # type: ignore[attr-defined]
    made.__init__ = init


def settle(model: PreTrainedModel) -> None:
    """Recompute in place the rotary frequencies that no checkpoint holds."""
    for module in model.modules():
        compute: Any = getattr(module, "rope_init_fn", None)
        if compute is not None and "inv_freq" in module._non_persistent_buffers_set:
            frequencies, _ = compute(module.config, None)
            held: Any = module.inv_freq
            held.copy_(frequencies.to(held.device))


@contextmanager
def cut_to_length() -> Iterator[None]:
    """Let `DynamicCache.crop` take a positive number as the length to keep."""
    patched: Any = DynamicCache
    crop = patched.crop

    def either(self: DynamicCache, number: int) -> None:
        crop(self, number if number <= 0 else min(0, number - self.get_seq_length()))

    patched.crop = either
    try:
        yield
    finally:
        patched.crop = crop


def plain_rope(config: Any, device: Any = None, *_: Any, **__: Any) -> tuple[torch.Tensor, float]:
    """Return rotary frequencies without scaling, and the factor 1. Source: RoFormer (Su et al. 2021), equation 15."""
    named: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    base = float(named.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    share = float(named.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head * share)
    even = torch.arange(0, size, 2, dtype=torch.int64, device=device).float()
    return 1.0 / (base ** (even / size)), 1.0
