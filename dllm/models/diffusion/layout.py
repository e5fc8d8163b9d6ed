"""Blocks, attention masks and the pair [x_t | x_0]: what a diffusion LM is fed, in training and in decoding alike.

Shape suffixes: B batch, S sequence, Q query columns, K key columns, T columns of the noisy half, X = T + S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm.models.diffusion.config import Origin


def number_blocks(length: int, begin: int, block_size: int, *, prompt_blocks: bool) -> Tensor:
    """Number the blocks of a row: the one that starts at column `begin` is 0, all before it are block -1.

    Args:
        prompt_blocks: number those before it too (-1, -2, ...), for models that are block-causal in the prompt.

    Shapes: returns block_S int64.
    """
    block_S = torch.div(torch.arange(length) - begin, block_size, rounding_mode="floor")
    return block_S if prompt_blocks else block_S.clamp_min(-1)


def blocks_of(
    length: int, prompt_length: int, block_size: int | None, origin: Origin, prompt_blocks: bool = False
) -> Tensor:
    """Number the blocks of a row: the one that holds the first response token is 0.

    Blocks counted from the start of the row (`sequence`: LLaDA2, BD3-LM) may have the end of the prompt in block 0;
    those counted from the response (`response`: Nemotron) do not. Without a block size the whole row is block 0.

    Shapes: returns block_S int64.
    """
    if block_size is None:
        return torch.zeros(length, dtype=torch.int64)
    begin = prompt_length if origin == "response" else prompt_length // block_size * block_size
    return number_blocks(length, begin, block_size, prompt_blocks=prompt_blocks)


def positions(ids_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Number the valid columns of each row from 0. Shapes: returns position_ids_BS int64."""
    if valid_BS is None:
        return torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
    return (valid_BS.long().cumsum(1) - 1).clamp_min(0)


def causal_mask(queries: int, keys: int, device: torch.device, first: int = 0) -> Tensor:
    """Return the causal mask of query columns that start at column `first`. Shapes: returns bool_QK."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first)


def with_self(visible_BQK: Tensor, first: int = 0) -> Tensor:
    """Let each query column, the first of which is column `first`, attend to itself.

    Padding attends to nothing else, and the softmax over nothing is NaN.
    """
    queries, keys = visible_BQK.shape[-2:]
    own_QK = torch.eye(first + queries, keys, dtype=torch.bool, device=visible_BQK.device)[first:]
    return visible_BQK | own_QK


def visible_columns(ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None) -> Tensor | None:
    """Join the mask of valid columns and that of allowed pairs; None where every column attends to every other.

    Shapes: returns visible_BSS bool.
    """
    if valid_BS is None or bool(valid_BS.all()):
        return allowed_BSS
    visible_BSS = valid_BS[:, None].expand(-1, ids_BS.shape[1], -1)
    return with_self(visible_BSS if allowed_BSS is None else visible_BSS & allowed_BSS)


@dataclass(frozen=True)
class PairedLayout:
    """The input of one pass over noisy and clean text.

    The noisy half begins at the first column in which any row has a response block: prompts need no noisy copy.
    Shapes: ids_BX int64, position_ids_BX int64, allowed_BXX bool (true = may attend); the first `noisy` columns are
        x_t.
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
    """Put x_t beside x_0: a noisy block attends to itself and to the clean blocks before it, clean text to no noise.

    Args:
        clean_half: `block`, clean text attends to its own block and those before (LLaDA2.0, BD3-LM); `causal`, it
            attends causally, so that the clean half predicts next tokens as well (Nemotron's sbd_block_diff).

    Shapes: noisy_BS and clean_BS int64, valid_BS bool (false on padding), block_BS int64 as in `number_blocks`.
    Source: BD3-LM (Arriola et al. 2025), section 3.1; LLaDA2.0 (arXiv 2512.15745); arXiv 2607.05722.
    """
    rows, length = clean_BS.shape
    response_S = ((block_BS >= 0) & valid_BS).any(0)
    begin = int(response_S.nonzero()[0, 0]) if response_S.any() else length - 1
    column_S = torch.arange(length, device=clean_BS.device)
    block_BT, valid_BT = block_BS[:, begin:], valid_BS[:, begin:]
    noisy_to_noisy = (block_BT[:, :, None] == block_BT[:, None]) & valid_BT[:, None]
    noisy_to_clean = (block_BS[:, None] < block_BT[:, :, None]) & valid_BS[:, None]
    clean_to_noisy = torch.zeros(rows, length, length - begin, dtype=torch.bool, device=clean_BS.device)
    if clean_half == "causal":
        clean_to_clean = causal_mask(length, length, clean_BS.device) & valid_BS[:, None]
    else:
        clean_to_clean = (block_BS[:, None] <= block_BS[:, :, None]) & valid_BS[:, None]
    upper_BTX, lower_BSX = (
        torch.cat(parts, -1) for parts in ((noisy_to_noisy, noisy_to_clean), (clean_to_noisy, clean_to_clean))
    )
    return PairedLayout(
        torch.cat([noisy_BS[:, begin:], clean_BS], 1),
        torch.cat([column_S[begin:], column_S]).expand(rows, -1),
        with_self(torch.cat([upper_BTX, lower_BSX], -2)),
        begin,
        length - begin,
    )
