"""Anchors: the positions where the blocks of a sequence begin.

Shape suffixes: B batch, S sequence, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """Anchor positions, rising within a row, and which of the N slots hold one.

    Shapes: pos_BN int64 (0 where dropped), keep_BN bool.
    """

    pos_BN: Tensor
    keep_BN: Tensor


def draw_anchors(
    loss_mask_BS: Tensor, *, num_blocks: int, block_size: int, sampling: str, seeds: Sequence[int]
) -> Anchors:
    """Draw anchors among supervised tokens whose next token is supervised too.

    Each row draws from its own seed, so a row's anchors do not depend on the batch it is in or on padding.
    `without_replacement`: up to num_blocks different ones. `with_replacement`: num_blocks independent draws.
    `non_overlapping`: as many as fit at least block_size apart, every arrangement equally likely.

    Shapes: loss_mask_BS bool. Returns N <= num_blocks columns, as many as the fullest row needs.
    Source: DFlash, section 4.2 (random anchors) and appendix A.1 (512 of them, drawn anew each epoch).
    """
    rows = [
        _draw_row(mask_S, num_blocks, block_size, sampling, seed)
        for mask_S, seed in zip(loss_mask_BS.bool().cpu(), seeds, strict=True)
    ]
    width = max(1, *(len(row) for row in rows)) if len(rows) > 1 else max(1, len(rows[0]))
    pos_BN = torch.zeros(len(rows), width, dtype=torch.int64)
    keep_BN = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        pos_BN[index, : len(row)] = row
        keep_BN[index, : len(row)] = True
    return Anchors(pos_BN.to(loss_mask_BS.device), keep_BN.to(loss_mask_BS.device))


def candidates(mask_S: Tensor) -> Tensor:
    """List the positions that may be anchors: supervised, and followed by a supervised token."""
    return (mask_S[:-1] & mask_S[1:]).nonzero()[:, 0]


def _draw_row(mask_S: Tensor, num_blocks: int, block_size: int, sampling: str, seed: int) -> Tensor:
    found = candidates(mask_S)
    count = len(found)
    if count == 0:
        return found
    generator = torch.Generator().manual_seed(seed)
    if sampling == "with_replacement":
        picks = torch.randint(count, (num_blocks,), generator=generator)
    elif sampling == "without_replacement":
        picks = torch.randperm(count, generator=generator)[:num_blocks]
    else:  # stars and bars: n anchors block_size apart leave `slack` free places before, between and after
        n = min(num_blocks, (count - 1) // block_size + 1)
        slack = count - ((n - 1) * block_size + 1)
        stars = torch.randperm(slack + n, generator=generator)[:n].sort().values - torch.arange(n)
        picks = stars + torch.arange(n) * block_size
    return found[picks.sort().values]
