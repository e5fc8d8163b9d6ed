"""Forward passes over a canvas, block by block: attention masks, and caches of keys and values.

`none` runs everything at every step. `prefix` and `dual` (full attention) run everything once per block, then the
columns from the block on, or the block alone, over stale keys and values: approximate, but exact at one step per block.
`block` (block-causal attention) runs the block alone over finished ones: exact.

Shape suffixes: B batch, K columns, Q query columns, C columns of a block, D hidden.
Source: Fast-dLLM (arXiv 2505.22618), section 3.2; BD3-LM (Arriola et al. 2025) for block caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas
from dllm.decoding.settings import CacheKind
from dllm.models.diffusion.cache import CanvasCache
from dllm.models.diffusion.config import Context
from dllm.models.diffusion.layout import with_self
from dllm.models.diffusion.protocol import DiffusionLM


class Passes:
    """Runs a model over the block that is being decoded.

    Args:
        model: the model.
        canvas: what it is run on; `keep` drops rows.
        context: the attention to what is before a block.
        cache: what is kept between passes.
    """

    def __init__(self, model: DiffusionLM, canvas: Canvas, context: Context, cache: CacheKind) -> None:
        self.model, self.canvas, self.context, self.kind = model, canvas, context, cache
        self.cache = CanvasCache(canvas.position_ids_BK) if cache != "none" else None
        self.final = 0
        """Columns before this one are final, and so are their keys and values."""
        self._masks: dict[tuple[int, int], Tensor | None] = {}
        """Attention masks of this block's passes so far, by their columns."""

    def enter(self, begin: int, end: int) -> None:
        """Move on to the columns of another block."""
        self.begin, self.end, self.fresh = begin, end, True
        self._masks.clear()

    def hidden(self, ids_BK: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run the model; return hidden_BCD of the block's columns.

        Shapes: ids_BK is the canvas's, or guidance's; rows int64, those to run: all in a block's first pass, since the
            next block attends to its keys and values. Returns one row for each that was run.
        """
        first, last = self._columns()
        seen = self.canvas.width if self.context == "full" else self.end
        valid_BK, positions_BK = self.canvas.valid_BK, self.canvas.position_ids_BK
        if rows is not None:
            ids_BK, valid_BK, positions_BK = ids_BK[rows], valid_BK[rows], positions_BK[rows]
        if self.cache is None and self.context == "full":
            found = self.model.hidden(ids_BK, valid_BK, position_ids_BS=positions_BK)
            return found[:, self.begin : self.end]
        if (first, last) not in self._masks:
            self._masks[first, last] = self._visible(first, last, seen)
        visible_BQK = self._masks[first, last]
        if visible_BQK is not None and rows is not None:
            visible_BQK = visible_BQK[rows]
        ids_BQ, positions_BQ = ids_BK[:, first:last], positions_BK[:, first:last]
        if self.cache is None:
            found = self.model.hidden(ids_BQ, allowed_BSS=visible_BQK, position_ids_BS=positions_BQ)
        else:
            self.cache.next_pass(first, last, seen, rows)
            if visible_BQK is None:
                visible_BQK = torch.ones(len(ids_BQ), last - first, seen, dtype=torch.bool, device=ids_BQ.device)
            found = self.model.cached_hidden(ids_BQ, positions_BQ, visible_BQK, self.cache)
            if self.fresh:
                self.final = self.begin
        self.fresh = False
        return found[:, self.begin - first : self.end - first]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop rows from the cache that were dropped from the canvas."""
        self._masks.clear()
        if self.cache is not None:
            self.cache.keep(torch.tensor(rows, dtype=torch.int64, device=self.canvas.ids_BK.device))

    def _columns(self) -> tuple[int, int]:
        """Return the range of columns that the next pass must run."""
        if self.kind == "none":
            return 0, self.canvas.width if self.context == "full" else self.end
        if self.kind == "block":
            # The block before is run again with this one's first step: only now is it complete.
            return (self.final if self.fresh else self.begin), self.end
        if self.fresh:
            return 0, self.canvas.width
        return self.begin, (self.canvas.width if self.kind == "prefix" else self.end)

    def _visible(self, first: int, last: int, seen: int) -> Tensor | None:
        """Return which columns before `seen` the columns from `first` to `last` attend to; None for all."""
        canvas = self.canvas
        valid_BK = canvas.valid_BK[:, :seen]
        if self.context == "full":
            if bool(valid_BK.all()):
                return None
            visible_BQK = valid_BK[:, None].expand(-1, last - first, -1)
        else:
            block_BQ, block_BK = canvas.block_BK[:, first:last], canvas.block_BK[:, :seen]
            if self.context == "block":
                visible_BQK = (block_BK[:, None] <= block_BQ[:, :, None]) & valid_BK[:, None]
            else:
                column_Q = torch.arange(first, last, device=valid_BK.device)
                column_K = torch.arange(seen, device=valid_BK.device)
                back_QK = column_K <= column_Q[:, None]
                here_QK = (column_Q[:, None] >= self.begin) & (column_K >= self.begin)
                visible_BQK = (back_QK | here_QK) & valid_BK[:, None]
        return with_self(visible_BQK, first)
