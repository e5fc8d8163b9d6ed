"""Attention of many blocks on a CPU: torch's fused kernel over the context, merged with each block's own few keys.

The kernel returns, beside its output, the logarithm of each row's sum of exponentials. With it two parts of one softmax
can be computed apart and merged, and a backward pass that is given the merged output and logarithm returns the gradient
of the whole softmax by either part. No score over the context ever reaches memory.
Source: FlashAttention-2 (arXiv 2307.08691), sections 3.1 and 3.2.

Shape suffixes: B batch, G key/value heads, M queries that share a key/value head, N blocks, Q queries of a block and
head, L keys of a block, S context, E head dim; M = N * Q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MergedAttention(torch.autograd.Function):
    """Softmax over [context | own block], scaled by 1 / sqrt(E).

    Shapes: query_BGNQE; key_BGSE and value_BGSE; own_key_BGNLE and own_value_BGNLE; hidden_BMS bool, the context that
        a query does not see; own_hidden_QL bool or None. Returns (B, G, N, Q, E).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BGNQE: Tensor,
        key_BGSE: Tensor,
        value_BGSE: Tensor,
        own_key_BGNLE: Tensor,
        own_value_BGNLE: Tensor,
        hidden_BMS: Tensor,
        own_hidden_QL: Tensor | None,
    ) -> Tensor:
        """Merge the two parts by their sums of exponentials."""
        shape = query_BGNQE.shape
        rows_BGME = query_BGNQE.flatten(2, 3)
        mask = _additive(hidden_BMS, query_BGNQE)
        out_BGME, log_BGM = _forward(rows_BGME, key_BGSE, value_BGSE, 0.0, False, attn_mask=mask)
        # The kernel returns 0 for a row that sees nothing.
        log_BGM = log_BGM.masked_fill(hidden_BMS.all(-1)[:, None], float("-inf"))
        scores_BGNQL = _own_scores(query_BGNQE, own_key_BGNLE, own_hidden_QL)
        total_BGNQ = torch.logaddexp(log_BGM.view(shape[:-1]), scores_BGNQL.logsumexp(-1))
        share_BGNQ1 = (log_BGM.view(shape[:-1]) - total_BGNQ).exp()[..., None]
        probs_BGNQL = (scores_BGNQL - total_BGNQ[..., None]).exp()
        own_BGNQE = probs_BGNQL.to(query_BGNQE.dtype) @ own_value_BGNLE
        merged = torch.addcmul(own_BGNQE.to(share_BGNQ1.dtype), out_BGME.view(shape), share_BGNQ1).to(query_BGNQE.dtype)
        ctx.save_for_backward(
            query_BGNQE, key_BGSE, value_BGSE, own_key_BGNLE, own_value_BGNLE, hidden_BMS, merged, total_BGNQ
        )
        ctx.own_hidden_QL = own_hidden_QL
        return merged

    @staticmethod
    def backward(ctx: Any, grad_BGNQE: Tensor) -> tuple[Tensor | None, ...]:
        """Return both parts' gradients of the whole softmax."""
        query, key, value, own_key, own_value, hidden_BMS, merged, total_BGNQ = ctx.saved_tensors
        dtype, scale = query.dtype, query.shape[-1] ** -0.5
        grad_BGNQE = grad_BGNQE.contiguous()
        rows = (each.flatten(2, 3) for each in (grad_BGNQE, query))
        logs, mask = total_BGNQ.flatten(2, 3), _additive(hidden_BMS, query)
        grad_query, grad_key, grad_value = _backward(
            *rows, key, value, merged.flatten(2, 3), logs, 0.0, False, attn_mask=mask
        )
        probs_BGNQL = (_own_scores(query, own_key, ctx.own_hidden_QL) - total_BGNQ[..., None]).exp()
        mean_BGNQ1 = (grad_BGNQE.to(probs_BGNQL.dtype) * merged).sum(-1, keepdim=True)
        grad_scores = (probs_BGNQL * (grad_BGNQE @ own_value.mT - mean_BGNQ1) * scale).to(dtype)
        grad_query = grad_query.view(query.shape) + grad_scores @ own_key
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_scores.mT @ query,
            probs_BGNQL.to(dtype).mT @ grad_BGNQE,
            None,
            None,
        )


def _additive(hidden_BMS: Tensor, query: Tensor) -> Tensor:
    """Return the mask that the kernel takes: one for all heads of a sequence. Shapes: (B, G, M, S)."""
    mask_BMS = torch.zeros(hidden_BMS.shape, dtype=query.dtype).masked_fill_(hidden_BMS, float("-inf"))
    return mask_BMS[:, None].expand(-1, query.shape[1], -1, -1)


def _own_scores(query_BGNQE: Tensor, own_key_BGNLE: Tensor, own_hidden_QL: Tensor | None) -> Tensor:
    """Score the keys of the query's own block, in float32 or above. Shapes: (B, G, N, Q, L)."""
    scores = query_BGNQE @ own_key_BGNLE.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * query_BGNQE.shape[-1] ** -0.5
    return scores if own_hidden_QL is None else scores.masked_fill_(own_hidden_QL, float("-inf"))
