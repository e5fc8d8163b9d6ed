"""The pair [x_t | x_0] in one pass: noisy blocks beside the clean text they may look back at.

Shape suffixes: B batch, S sequence, T columns of the noisy half, X = T + S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairedLayout:
    """What a model is fed for one pass over noisy and clean text.

    The noisy half begins at the first column in which any row has an answer block: prompts need no noisy copy.
    Shapes: ids_BX int64, position_ids_BX int64, allowed_BXX bool (true = may look); the first `noisy` columns are x_t.
    """

    ids_BX: Tensor
    position_ids_BX: Tensor
    allowed_BXX: Tensor
    begin: int
    """Column of the text at which the noisy half begins."""
    noisy: int
    """Columns of the noisy half."""


def paired_layout(
    noisy_BS: Tensor, clean_BS: Tensor, valid_BS: Tensor, block_BS: Tensor, clean_half: Literal["block", "causal"]
) -> PairedLayout:
    """Lay out x_t beside x_0: a noisy block sees itself and the clean blocks before it, clean text never sees noise.

    clean_half: `block`: clean text sees its own block and those before (LLaDA2.0, BD3-LM); `causal`: only what comes
    before, so that the clean half gives next-token logits as well (Nemotron's sbd_block_diff).
    Shapes: noisy_BS and clean_BS int64, valid_BS bool (false on padding), block_BS int64 as `noise.blocks_of` has it.
    Source: BD3-LM (Arriola et al. 2025), section 3.1; LLaDA2.0 (arXiv 2512.15745); arXiv 2607.05722.
    """
    rows, length = clean_BS.shape
    answer_S = ((block_BS >= 0) & valid_BS).any(0)
    begin = int(answer_S.nonzero()[0, 0]) if answer_S.any() else length - 1
    places_S = torch.arange(length, device=clean_BS.device)
    block_BT, valid_BT = block_BS[:, begin:], valid_BS[:, begin:]
    among_noisy = (block_BT[:, :, None] == block_BT[:, None]) & valid_BT[:, None]
    back = (block_BS[:, None] < block_BT[:, :, None]) & valid_BS[:, None]
    forth = torch.zeros(rows, length, length - begin, dtype=torch.bool, device=clean_BS.device)
    if clean_half == "causal":
        among_clean = (places_S[None] <= places_S[:, None]) & valid_BS[:, None]
    else:
        among_clean = (block_BS[:, None] <= block_BS[:, :, None]) & valid_BS[:, None]
    allowed_BXX = torch.cat([torch.cat([among_noisy, back], -1), torch.cat([forth, among_clean], -1)], -2)
    # A place that sees nothing, such as padding, has no softmax: let each see itself.
    allowed_BXX |= torch.eye(allowed_BXX.shape[-1], dtype=torch.bool, device=clean_BS.device)
    return PairedLayout(
        torch.cat([noisy_BS[:, begin:], clean_BS], 1),
        torch.cat([places_S[begin:], places_S]).expand(rows, -1),
        allowed_BXX,
        begin,
        length - begin,
    )
