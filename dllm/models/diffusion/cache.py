"""Keys and values of a canvas of fixed columns, any range of which a pass can replace.

One cache serves prefix, dual and block caching, which differ only in the columns that a pass replaces and in those that
it attends to.

Shape suffixes: B batch, K columns, G key/value heads, E head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class CanvasCache:
    """A cache for the attention layers of transformers, in place of their own.

    Args:
        position_ids_BK: the canvas's positions.
    """

    is_compileable = False

    def __init__(self, position_ids_BK: Tensor) -> None:
        self._all_position_ids_BK = position_ids_BK
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self.next_pass(0, position_ids_BK.shape[1])

    def next_pass(self, begin: int, end: int, seen: int | None = None, rows: Tensor | None = None) -> CanvasCache:
        """Set the columns and rows that the next pass replaces, and that it attends to columns before `seen`.

        By default it attends to all columns and is of all rows. Shapes: rows int64, ascending.
        """
        self.begin, self.end, self.rows = begin, end, rows
        self.seen = self._all_position_ids_BK.shape[1] if seen is None else seen
        return self

    @property
    def position_ids_BK(self) -> Tensor:
        """Return the positions of the columns that the next pass attends to."""
        positions_BK = self._all_position_ids_BK[:, : self.seen]
        return positions_BK if self.rows is None else positions_BK[self.rows]

    def update(self, key_BGQE: Tensor, value_BGQE: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Replace keys and values of a layer; return those of all columns that the pass attends to."""
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
        """Return how many columns come before those of the next pass."""
        return self.begin
