"""The static key/value cache of rows that decode together, and the attention that reads it.

Each row has a slot that is written in place, so nothing is copied as responses grow. A row's results do not depend on
the batch: prompts are concatenated and each attends to itself only.

Shape suffixes: B slots, L new tokens per slot, S tokens of several prompts concatenated, T cache positions, H query
heads, G key/value heads, R = H / G, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from dllm.errors import ModelError

ATTENTION = "dllm_slots"
POSITION_MULTIPLE, FEWEST_POSITIONS = 32, 128
"""Positions are allocated in multiples of it, and not fewer, so that a sum over them has the same order at any length:
with bfloat16 in AMX tiles it has another one where 16 positions are left over, or for a product with very few."""


class SlotCache:
    """Keys and values of every slot, with the cache interface that transformers' decoders call.

    A layer's tensors are no longer than the longest row needs, so that they are contiguous: products with a part of a
    longer tensor take two to six times as long. A change of their length moves each into a spare buffer.

    Args:
        layers: number of decoder layers.
        slots: number of rows that decode together.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.slots, self.positions, self.reserved = slots, 0, 0
        self.prompts: list[tuple[list[int], slice]] | None = None
        self.at: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._spare_N = torch.empty(0)

    def reserve(self, positions: int) -> None:
        """Expect rows of up to so many positions: buffers are made for them."""
        self.reserved = max(self.reserved, _rounded(positions))

    def prefill(self, prompts: list[tuple[list[int], slice]]) -> None:
        """Treat the next pass as concatenated prompts: for each its slots (one per sample) and its slice."""
        self.prompts = prompts
        self._resize(max(self.positions, *(part.stop - part.start for _, part in prompts)))

    def decode(self, position_BL: Tensor, device: torch.device) -> Tensor:
        """Treat the next pass as new tokens of every slot; return which positions each does not attend to.

        Shapes: returns unseen_BLT bool. Tokens that a slot rejects later are overwritten by those at their positions.
        """
        self.prompts = None
        self.at = (torch.arange(len(position_BL), device=device)[:, None], position_BL.to(device))
        self._resize(int(position_BL.max()) + 1)
        return torch.arange(self.positions) > position_BL[..., None]

    def load(self, slot: int, cache: DynamicCache) -> None:
        """Fill a slot with the keys and values of one sequence."""
        self._resize(max(self.positions, cache.get_seq_length()))
        for layer, held in enumerate(cache.layers):
            key, value = cast(DynamicLayer, held).keys, cast(DynamicLayer, held).values
            assert key is not None and value is not None
            self._allocate(layer, key, value)
            self.keys[layer][slot, :, : key.shape[2]] = key[0]
            self.values[layer][slot, :, : value.shape[2]] = value[0]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those that the queries attend to.

        Shapes: (1, G, S, E) in prefill, (B, G, L, E) in decoding.
        """
        self._allocate(layer, key, value)
        keys, values = self.keys[layer], self.values[layer]
        if self.prompts is not None:
            for slots_of_prompt, part in self.prompts:
                keys[slots_of_prompt, :, : part.stop - part.start] = key[0, :, part]
                values[slots_of_prompt, :, : part.stop - part.start] = value[0, :, part]
            return key, value
        slots, positions = self.at
        keys[slots, :, positions] = key.transpose(1, 2)
        values[slots, :, positions] = value.transpose(1, 2)
        return keys, values

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots."""
        self.slots = len(slots)
        self._move(list(slots))

    def widen(self, slots: int) -> None:
        """Add empty slots, up to `slots` in all."""
        before, self.slots = self.slots, max(slots, self.slots)
        if self.slots > before:
            self._move(slice(before))

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: positions are always passed explicitly."""
        return 0

    def _allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        if not len(self.keys[layer]):
            self.keys[layer] = self._empty(key)
            self.values[layer] = self._empty(value)

    def _resize(self, positions: int) -> None:
        if _rounded(positions) != self.positions:
            self.positions = _rounded(positions)
            self._move(slice(None))

    def _move(self, slots: list[int] | slice) -> None:
        """Give every tensor today's shape, and keep what some slots of it hold."""
        self.keys = [self._moved(old, slots) for old in self.keys]
        self.values = [self._moved(old, slots) for old in self.values]

    def _moved(self, old: Tensor, slots: list[int] | slice) -> Tensor:
        if not len(old):
            return old
        new = self._empty(old)
        kept = min(self.positions, old.shape[2])
        kept_BGTE = old[slots, :, :kept]
        new[: len(kept_BGTE), :, :kept] = kept_BGTE
        self._spare_N = old.new_empty(0).set_(old.untyped_storage())
        return new

    def _empty(self, like: Tensor) -> Tensor:
        """Return a tensor of today's shape; what is not written to it is finite, and never attended to."""
        heads, size = like.shape[1], like.shape[3]
        held, buffer_N = self.slots * heads * self.positions * size, self._spare_N
        if buffer_N.numel() < held or buffer_N.dtype != like.dtype or buffer_N.device != like.device:
            buffer_N = like.new_zeros(self.slots * heads * max(self.positions, self.reserved) * size)
        self._spare_N = torch.empty(0)
        return buffer_N[:held].view(self.slots, heads, self.positions, size)


def _rounded(positions: int) -> int:
    return max(FEWEST_POSITIONS, -(-positions // POSITION_MULTIPLE) * POSITION_MULTIPLE)


@contextmanager
def slot_attention(model: Any) -> Iterator[None]:
    """Use slot attention in a transformers model inside the `with` block."""
    AttentionInterface.register(ATTENTION, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    # A model that passes one of these has other attention, and was to be refused before.
    if others := [name for name in ("sliding_window", "softcap", "s_aux") if more.get(name) is not None]:
        raise ModelError(
            f"the local engine supports no attention with {', '.join(others)}", where=type(module).__name__
        )
    if mask is None:
        # transformers passes this argument through unread; here it carries each prompt's slice.
        parts = more["cu_seq_lens_q"]
        return torch.cat([_one_prompt(query, key, value, part, scaling) for part in parts], 1), None
    # One token per slot: the R query heads that share a key head become the query's length.
    batch, heads, size = query.shape[0], query.shape[1], query.shape[3]
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    mixed = _few_queries(grouped, key, value, mask, scaling)
    return mixed.reshape(batch, 1, heads, value.shape[3]), None


def _few_queries(query_BGRE: Tensor, key_BGTE: Tensor, value_BGTE: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attend with R queries per key head, each batch of products whole.

    torch's fused kernel for CPUs is made for many queries: with three it takes three times as long as plain products.
    Scores are rounded to the dtype of the queries, as in transformers' eager attention.
    """
    if query_BGRE.device.type != "cpu":
        return F.scaled_dot_product_attention(query_BGRE, key_BGTE, value_BGTE, attn_mask=mask, scale=scaling)
    scores_BGRT = torch.matmul(query_BGRE, key_BGTE.transpose(2, 3)).float().mul_(scaling).add_(mask)
    return torch.matmul(scores_BGRT.softmax(-1).to(value_BGTE.dtype), value_BGTE)


def _one_prompt(query: Tensor, key: Tensor, value: Tensor, part: slice, scaling: float) -> Tensor:
    own = (query[:, :, part], key[:, :, part], value[:, :, part])
    return F.scaled_dot_product_attention(*own, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
