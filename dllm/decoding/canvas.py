"""The canvas that is decoded: prompts and masks, one row per prompt, with blocks in the same columns.

Prompts are padded on the left, so that all responses begin in one column; positions count valid columns only.

Shape suffixes: B batch, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.models.diffusion.config import Origin
from dllm.models.diffusion.layout import number_blocks, positions

PADDING_BLOCK = -(1 << 40)


@dataclass
class Canvas:
    """Rows that are being decoded.

    Shapes: ids_BK int64; valid_BK, given_BK bool (given: not decoded here); position_ids_BK, block_BK int64
        (decoded blocks count from 0, those before them are negative).
    """

    ids_BK: Tensor
    valid_BK: Tensor
    given_BK: Tensor
    position_ids_BK: Tensor
    block_BK: Tensor
    start: int
    """First column of block 0."""
    row_of_B: list[int]
    """Which prompt each row is."""

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return self.ids_BK.shape[1]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but some."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.ids_BK.device)
        for name in ("ids_BK", "valid_BK", "given_BK", "position_ids_BK", "block_BK"):
            setattr(self, name, getattr(self, name)[index])
        self.row_of_B = [self.row_of_B[row] for row in rows]


def for_responses(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    block_size: int,
    mask_id: int,
    origin: Origin,
    prompt_blocks: bool = False,
    device: torch.device | str = "cpu",
) -> Canvas:
    """Lay out prompts with masks after them.

    Args:
        origin: where the grid of blocks begins: with the `response`, or with the `sequence`: block 0 may then hold the
            end of a prompt.
        prompt_blocks: number the prompt's blocks too, for models that are block-causal there as well.
    """
    whole = [len(p) - len(p) % block_size if origin == "sequence" else len(p) for p in prompts]
    start = max(whole)
    width = start + max(len(p) - w for p, w in zip(prompts, whole, strict=True)) + new_tokens
    canvas = _blank(len(prompts), width, start, mask_id)
    for row, (prompt, before) in enumerate(zip(prompts, whole, strict=True)):
        begin = start - before
        end = begin + len(prompt)
        canvas.ids_BK[row, begin:end] = torch.tensor(prompt, dtype=torch.int64)
        canvas.given_BK[row, begin:end] = True
        canvas.valid_BK[row, begin : end + new_tokens] = True
    _number(canvas, block_size, prompt_blocks)
    return _to(canvas, device)


def for_filling(
    texts: Sequence[Sequence[int]], block_size: int | None, mask_id: int, device: torch.device | str = "cpu"
) -> Canvas:
    """Lay out texts that hold masks themselves; everything else in them is given.

    They are padded on the right, so that each has the blocks that it would have alone.
    """
    width = max(map(len, texts))
    canvas = _blank(len(texts), width, 0, mask_id)
    for row, text in enumerate(texts):
        canvas.ids_BK[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        canvas.valid_BK[row, : len(text)] = True
    canvas.given_BK = canvas.valid_BK & (canvas.ids_BK != mask_id)
    _number(canvas, block_size or width, False)
    return _to(canvas, device)


def _blank(rows: int, width: int, start: int, mask_id: int) -> Canvas:
    no = torch.zeros(rows, width, dtype=torch.bool)
    ids_BK = torch.full((rows, width), mask_id)
    return Canvas(ids_BK, no.clone(), no.clone(), ids_BK, ids_BK, start, list(range(rows)))


def _number(canvas: Canvas, block_size: int, prompt_blocks: bool) -> None:
    canvas.position_ids_BK = positions(canvas.ids_BK, canvas.valid_BK)
    block_K = number_blocks(canvas.width, canvas.start, block_size, prompt_blocks=prompt_blocks)
    canvas.block_BK = torch.where(canvas.valid_BK, block_K, PADDING_BLOCK)


def _to(canvas: Canvas, device: torch.device | str) -> Canvas:
    for name in ("ids_BK", "valid_BK", "given_BK", "position_ids_BK", "block_BK"):
        setattr(canvas, name, getattr(canvas, name).to(device))
    return canvas
