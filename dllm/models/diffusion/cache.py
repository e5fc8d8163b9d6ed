"""Keys and values of a canvas of fixed columns, any stretch of which can be written anew.

One cache serves prefix, dual and block caching: they differ only in which columns are written when, and how far
attention may look.

Shape suffixes: B batch, K columns, G key/value heads, E head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class CanvasCache:
    """What transformers' attention layers update and read, as if it were their own cache.

    Args:
        position_ids_BK: the canvas's positions.
    """

    is_compileable = False

    def __init__(self, position_ids_BK: Tensor) -> None:
        self._all_position_ids_BK = position_ids_BK
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self.write(0, position_ids_BK.shape[1])

    def write(self, begin: int, end: int, seen: int | None = None, rows: Tensor | None = None) -> CanvasCache:
        """Say which columns the next pass brings, that it looks at columns before `seen`, and of which rows it is.

        By default it looks at all columns and is of all rows. Shapes: rows int64, ascending.
        """
        self.begin, self.end, self.rows = begin, end, rows
        self.seen = self._all_position_ids_BK.shape[1] if seen is None else seen
        return self

    @property
    def position_ids_BK(self) -> Tensor:
        """Return the positions of the columns that the next pass looks at."""
        positions_BK = self._all_position_ids_BK[:, : self.seen]
        return positions_BK if self.rows is None else positions_BK[self.rows]

    def update(self, key_BGQE: Tensor, value_BGQE: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in a layer's new keys and values; return those of all columns that are looked at."""
        if layer_idx not in self._keys:
            _rows, heads, _columns, size = key_BGQE.shape
            batch, columns = self._all_position_ids_BK.shape
            self._keys[layer_idx] = key_BGQE.new_zeros(batch, heads, columns, size)
            self._values[layer_idx] = value_BGQE.new_zeros(batch, heads, columns, value_BGQE.shape[-1])
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows = slice(None) if self.rows is None else self.rows
        keys[rows, :, self.begin : self.end] = key_BGQE
        values[rows, :, self.begin : self.end] = value_BGQE
        return keys[rows, :, : self.seen], values[rows, :, : self.seen]

    def keep(self, rows: Tensor) -> CanvasCache:
        """Drop all rows but some. Shapes: rows int64 or bool over B."""
        self._all_position_ids_BK = self._all_position_ids_BK[rows]
        self._keys = {layer: keys[rows] for layer, keys in self._keys.items()}
        self._values = {layer: values[rows] for layer, values in self._values.items()}
        return self

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values. Shapes: (B, G, K, E) each."""
        return self._keys[index], self._values[index]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tell how many columns come before those of the next pass."""
        return self.begin
