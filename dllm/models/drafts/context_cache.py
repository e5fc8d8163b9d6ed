"""Keys and values of the context that a draft's layers keep from round to round.

Shape suffixes: B batch, G key/value heads, T kept rows and those of the block, E head dim.
"""

from __future__ import annotations

from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class ContextCache:
    """Keys and values of the context in each draft layer, as far as its window; those of blocks are not kept."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.layers = [_LayerCache() for _ in range(layers)]


class _LayerCache:
    """Keys and values of one layer, in buffers with room behind them: a round copies its own rows only."""

    def __init__(self) -> None:
        self.buffers_BGTE: list[Tensor] = []
        self.begin = self.end = 0

    def extend(self, context: Pair, block: Pair, window: int | None) -> Pair:
        """Append context rows; return what a block sees, its own rows last. No gradient passes.

        A window keeps window - 1 rows of the context.
        Shapes: (B, rows, G, E) each; returns (B, G, T, E), valid until the next call.
        """
        rows, slots = context[0].shape[1], block[0].shape[1]
        skipped = 0 if window is None else max(0, rows + 1 - window)
        middle = self.end + rows - skipped
        if window is not None:
            self.begin = max(self.begin, middle + 1 - window)
        if not self.buffers_BGTE or middle + slots > self.buffers_BGTE[0].shape[2]:
            middle -= self.begin
            self._move(middle + slots, block)
        for buffer_BGTE, new, own in zip(self.buffers_BGTE, context, block, strict=True):
            buffer_BGTE[:, :, self.end : middle] = new[:, skipped:].detach().transpose(1, 2)
            buffer_BGTE[:, :, middle : middle + slots] = own.detach().transpose(1, 2)
        self.end = middle
        key, value = (buffer_BGTE[:, :, self.begin : middle + slots] for buffer_BGTE in self.buffers_BGTE)
        return key, value

    def _move(self, size: int, like: Pair) -> None:
        """Move the kept rows to the front of buffers with room for a quarter more."""
        kept = self.end - self.begin
        shape = (like[0].shape[0], like[0].shape[2], size + size // 4 + 64, like[0].shape[3])
        fresh = [each.new_empty(shape) for each in like]
        for new, old in zip(fresh, self.buffers_BGTE, strict=False):
            new[:, :, :kept] = old[:, :, self.begin : self.end]
        self.buffers_BGTE, self.begin, self.end = fresh, 0, kept
