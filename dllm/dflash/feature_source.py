"""The target's features for training, from a cache that all ranks fill together or from the target itself.

Shape suffixes: S sequence, F tapped features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dllm.data.collate import Example
from dllm.dflash.features import FeatureCache, cache_key, compute
from dllm.progress import Progress
from dllm.training.distribution import Ranks
from dllm.training.strategy import Split


class OnlineFeatures:
    """Run the target over every batch."""

    def __init__(self, target: Any, layer_ids: Sequence[int], splits: Mapping[Split, Sequence[Example]]) -> None:
        self.target, self.layer_ids, self.splits = target, layer_ids, splits

    def features(self, split: Split, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split. Shapes: one (S, F) tensor a row."""
        return compute(self.target, self.layer_ids, [self.splits[split][row].input_ids for row in rows])


class CachedFeatures:
    """Read features that the target left on disk.

    Args:
        root: directory of all caches.
        splits: the examples to have features for.
        identity: which target it is.
        layer_ids: its tapped layers.
        dtype: what it computes in.
    """

    def __init__(
        self,
        root: Path,
        splits: Mapping[Split, Sequence[Example]],
        *,
        identity: dict[str, Any],
        layer_ids: Sequence[int],
        dtype: str,
    ) -> None:
        self.layer_ids = layer_ids
        rows = [example.input_ids for split in ("train", "heldout") for example in splits[split]]
        self.offsets: dict[Split, int] = {"train": 0, "heldout": len(splits["train"])}
        self.cache = FeatureCache(root / cache_key(identity, layer_ids, dtype, rows), rows)

    def features(self, split: Split, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split. Shapes: one (S, F) tensor a row."""
        return [self.cache.read(self.offsets[split] + row) for row in rows]

    def fill(self, target: Any, ranks: Ranks) -> None:
        """Write what is missing, each rank its share; what an earlier call wrote is kept.

        Raises:
            StageError: another rank failed.
        """
        while True:
            missing = self.cache.missing()
            if not ranks.max(len(missing)):  # also a barrier: nobody writes before all have looked
                return
            mine = missing[ranks.rank :: ranks.world]
            tokens = sum(len(self.cache.rows[row]) for part in mine for row in self.cache.parts[part])
            with Progress("target features", tokens, "tokens", shown=ranks.is_main) as bar:
                for part in mine:
                    bar.update(self.cache.fill(part, target, self.layer_ids))
            ranks.barrier()
