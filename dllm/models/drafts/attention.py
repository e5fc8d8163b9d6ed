"""Exact attention of many blocks over one context, without scores between blocks.

A dense mask over [context | all blocks] would have N * L more columns than any query attends to. Here each query's
scores are its context part (S columns) and its own block (L columns), concatenated before one softmax; on a CPU they
are merged after the softmax, which takes a tenth of the time (`MergedAttention`).

Shape suffixes: B batch, N blocks, Q query slots, L key slots, S context, H query heads, G key/value heads, R = H / G,
M = R * L, T context and block, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm.models.drafts.merged_attention import MergedAttention

SCORES_AT_ONCE = 1 << 26
"""Most attention scores that exist at one time; larger problems run by groups of blocks, recomputed in backward."""
MASK_AT_ONCE = 1 << 21
"""The same for the mask of `MergedAttention`, where no scores exist: it stays in the cache, and more groups skip more
of the context."""
MERGED_ON = frozenset({"cpu"})
"""Kinds of devices whose attention is `MergedAttention`; no `--dry-run` counts on its smaller memory."""


def block_attention(
    query_BNQHE: Tensor,
    key_BSGE: Tensor,
    value_BSGE: Tensor,
    block_key_BNLGE: Tensor,
    block_value_BNLGE: Tensor,
    visible_BN: Tensor,
    window: int | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attend from block slots to the context before their anchor and to their own block.

    Args:
        window: W hides keys at a distance of W or more: slot o of a block at a sees context j > a + o - W.
        is_causal: a slot does not see the slots after it.
    Shapes: visible_BN is the number of context rows a block sees (its anchor's position; 0 for a dropped block). The Q
        query slots are the last Q of the block's L. Returns (B, N, Q, H * E).
    Source: DFlash, appendix A.1; windows as engines serve them.
    """
    batch, blocks, slots, heads, _ = query_BNQHE.shape
    context, is_merged = key_BSGE.shape[1], query_BNQHE.device.type in MERGED_ON
    rows, most = (slots * heads // key_BSGE.shape[2], MASK_AT_ONCE) if is_merged else (slots * heads, SCORES_AT_ONCE)
    attend: Callable[..., Tensor] = _attend_merged if is_merged else _attend
    group = max(1, most // max(1, batch * rows * (context + block_key_BNLGE.shape[2])))
    if group >= blocks:
        whole = (query_BNQHE, key_BSGE, value_BSGE, block_key_BNLGE, block_value_BNLGE, visible_BN)
        return attend(*whole, window, is_causal)
    if not is_merged:
        attend = partial(checkpoint, attend, use_reentrant=False)
    parts = []
    for begin in range(0, blocks, group):
        part = slice(begin, begin + group)
        # No block of the group attends further, nor before its window; as anchors are sorted, this saves half the work.
        visible_Bn = visible_BN[:, part]
        first, seen = (0, context) if visible_Bn.is_meta else _span(visible_Bn, window)
        inputs = [query_BNQHE[:, part], key_BSGE[:, first:seen], value_BSGE[:, first:seen]]
        inputs += [block_key_BNLGE[:, part], block_value_BNLGE[:, part], visible_Bn - first]
        parts.append(attend(*inputs, window, is_causal))
    return torch.cat(parts, 1)


def _span(visible_Bn: Tensor, window: int | None) -> tuple[int, int]:
    """Return the first context row that any of these blocks sees, and the one after the last."""
    seen = max(1, int(visible_Bn.max()))
    return 0 if window is None else max(0, int(visible_Bn.where(visible_Bn > 0, seen).min()) + 1 - window), seen


def is_hidden(distance: Tensor, window: int | None, is_causal: bool) -> Tensor:
    """Mark the keys that a query does not attend to, by how far they stand before it (below 0: after it)."""
    hidden = distance < 0 if is_causal else torch.zeros_like(distance, dtype=torch.bool)
    return hidden if window is None else hidden | (distance.abs() >= window)


def _hidden_last(queries: int, keys: int, window: int | None, is_causal: bool, device: torch.device) -> Tensor | None:
    """Mark, for the last of the slots, those of all `keys` that each does not attend to; None: it attends to all.

    Shapes: (queries, keys) bool.
    """
    if not is_causal and (window is None or window >= keys):
        return None
    place = torch.arange(keys, device=device)
    return is_hidden(place[keys - queries :, None] - place, window, is_causal)


def cached_attention(
    query_BLHE: Tensor, key_BGTE: Tensor, value_BGTE: Tensor, window: int | None, is_causal: bool
) -> Tensor:
    """Attend from one block to a context that ends before it, and to itself: the last L of the T keys.

    Shapes: returns (B, L, H * E).
    """
    slots, heads, groups, keys = *query_BLHE.shape[1:3], *key_BGTE.shape[1:3]
    ratio = heads // groups
    # The queries that share a key/value head are rows of one product, so that no head of keys is repeated.
    query_BGME = query_BLHE.transpose(1, 2).unflatten(1, (groups, ratio)).flatten(2, 3)
    hidden_LT = _hidden_last(slots, keys, window, is_causal, query_BLHE.device)
    mask_MT = None if hidden_LT is None else ~hidden_LT.repeat(ratio, 1)
    mixed_BGME = F.scaled_dot_product_attention(query_BGME, key_BGTE, value_BGTE, attn_mask=mask_MT)
    return mixed_BGME.unflatten(2, (ratio, slots)).permute(0, 3, 1, 2, 4).flatten(2)


def _attend(
    query_BNQHE: Tensor,
    key_BSGE: Tensor,
    value_BSGE: Tensor,
    block_key_BNLGE: Tensor,
    block_value_BNLGE: Tensor,
    visible_BN: Tensor,
    window: int | None,
    is_causal: bool,
) -> Tensor:
    batch, blocks, slots, heads, size = query_BNQHE.shape
    groups, context, keys = key_BSGE.shape[2], key_BSGE.shape[1], block_key_BNLGE.shape[2]
    ratio = heads // groups
    # (B, G, N, Q*R, E): every query that shares a key/value head, so both products are plain batched GEMMs.
    query = (query_BNQHE * size**-0.5).unflatten(3, (groups, ratio)).permute(0, 3, 1, 2, 4, 5)
    query = query.reshape(batch, groups, blocks, slots * ratio, size)
    outer = torch.matmul(query.flatten(2, 3), key_BSGE.permute(0, 2, 3, 1)).unflatten(2, (blocks, slots, ratio))
    inner = torch.matmul(query, block_key_BNLGE.permute(0, 3, 1, 4, 2)).unflatten(3, (slots, ratio))
    hidden = _hidden(visible_BN, context, window, slots, keys)
    outer = outer.masked_fill(hidden, float("-inf"))
    hidden_QL = _hidden_last(slots, keys, window, is_causal, outer.device)
    if hidden_QL is not None:
        inner = inner.masked_fill(hidden_QL[:, None], float("-inf"))
    weights = torch.softmax(torch.cat([outer, inner], -1), -1, dtype=torch.float32).to(query.dtype)
    outer, inner = weights.split([context, keys], -1)
    mixed = torch.matmul(outer.reshape(batch, groups, -1, context), value_BSGE.permute(0, 2, 1, 3))
    mixed = mixed.unflatten(2, (blocks, slots * ratio))
    mixed = mixed + torch.matmul(inner.flatten(3, 4), block_value_BNLGE.permute(0, 3, 1, 2, 4))
    mixed = mixed.unflatten(3, (slots, ratio)).permute(0, 2, 3, 1, 4, 5)
    return mixed.reshape(batch, blocks, slots, heads * size)


def _attend_merged(
    query_BNQHE: Tensor,
    key_BSGE: Tensor,
    value_BSGE: Tensor,
    block_key_BNLGE: Tensor,
    block_value_BNLGE: Tensor,
    visible_BN: Tensor,
    window: int | None,
    is_causal: bool,
) -> Tensor:
    """Do what `_attend` does, with torch's fused kernel."""
    batch, blocks, slots, heads, size = query_BNQHE.shape
    groups, context, keys = key_BSGE.shape[2], key_BSGE.shape[1], block_key_BNLGE.shape[2]
    ratio = heads // groups
    query = query_BNQHE.unflatten(3, (groups, ratio)).permute(0, 3, 1, 2, 4, 5)
    hidden = _hidden(visible_BN, context, window, slots, keys)[:, 0].expand(-1, -1, slots, ratio, -1)
    hidden_QL = _hidden_last(slots, keys, window, is_causal, query.device)
    mixed: Tensor = MergedAttention.apply(
        query.reshape(batch, groups, blocks, slots * ratio, size),
        key_BSGE.transpose(1, 2),
        value_BSGE.transpose(1, 2),
        block_key_BNLGE.permute(0, 3, 1, 2, 4),
        block_value_BNLGE.permute(0, 3, 1, 2, 4),
        hidden.reshape(batch, -1, context),
        None if hidden_QL is None else hidden_QL.repeat_interleave(ratio, 0),
    )
    mixed = mixed.unflatten(3, (slots, ratio)).permute(0, 2, 3, 1, 4, 5)
    return mixed.reshape(batch, blocks, slots, heads * size)


def _hidden(visible_BN: Tensor, context: int, window: int | None, slots: int, keys: int) -> Tensor:
    """Mark the context rows that a query does not attend to. Shapes: (B, 1, N, 1 or Q, 1, S) bool."""
    position_S = torch.arange(context, device=visible_BN.device)
    after = position_S >= visible_BN[:, None, :, None, None, None]
    if window is None:
        return after
    slot_Q1 = torch.arange(keys - slots, keys, device=visible_BN.device)[:, None, None]
    return after | (position_S <= visible_BN[:, None, :, None, None, None] + slot_Q1 - window)
