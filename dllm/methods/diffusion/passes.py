"""One pass of a model over masked text, as it was trained to see it.

Shape suffixes: B batch, S sequence, D hidden, M masked places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dllm.methods.diffusion.layout import paired_layout
from dllm.methods.diffusion.noise import blocks_of
from dllm.models.diffusion.bidirectional import BidirectionalLM, Context
from dllm.training.batches import Example, collate


def origin_of(model: BidirectionalLM) -> Literal["answer", "sequence"]:
    """Tell where a model counts blocks from: a published one from the row's first column, in either mode."""
    return model.block_origin


def grid_of(model: BidirectionalLM, example: Example, block_size: int | None) -> Tensor:
    """Number a row's blocks as a model counts them. Shapes: returns block_S int64."""
    return blocks_of(len(example), example.prompt_length, block_size, origin_of(model), model.prompt_blocks)


def padded(values: Sequence[Tensor], fill: float) -> Tensor:
    """Stack rows of unlike length, filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def batch_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Collate examples. Shapes: returns ids_BS int64, maskable_BS bool (answers), valid_BS bool (no padding)."""
    ids_BS, maskable_BS = collate(examples)
    lengths_B = torch.tensor([len(example) for example in examples])
    return ids_BS, maskable_BS, torch.arange(ids_BS.shape[1]) < lengths_B[:, None]


def masked_pass(
    model: BidirectionalLM, ids_BS: Tensor, valid_BS: Tensor, block_BS: Tensor, masked_BS: Tensor, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states of masked places, and with context `causal` those of the clean text, which look ahead.

    Shapes: returns hidden_MD and clean_BSD or None.
    """
    if model.sets_own_masks:
        noisy_BSD, clean_BSD = model.paired(ids_BS, valid_BS, masked_BS)
        return noisy_BSD[masked_BS], clean_BSD
    noisy_BS = ids_BS.masked_fill(masked_BS, model.mask_token_id)
    if context == "full":
        return model.hidden(noisy_BS, valid_BS)[masked_BS], None
    pair = paired_layout(noisy_BS, ids_BS, valid_BS, block_BS, context)
    hidden_BXD = model.hidden(pair.ids_BX, allowed_BSS=pair.allowed_BXX, position_ids_BS=pair.position_ids_BX)
    masked_MD = hidden_BXD[:, : pair.noisy][masked_BS[:, pair.begin :]]
    return masked_MD, hidden_BXD[:, pair.noisy :] if context == "causal" else None
