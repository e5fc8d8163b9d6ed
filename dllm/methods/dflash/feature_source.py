"""The target's features for training, from a cache that all ranks fill together or from the target itself.

Shape suffixes: S sequence, F tapped features.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dllm.methods.dflash.features import FeatureCache, cache_key
from dllm.models.taps import compute
from dllm.progress import Progress
from dllm.training.batches import Example
from dllm.training.distributed import Ranks
from dllm.training.strategy import Split

LOCK = ".lock"
"""In each cache's directory: held while somebody reads it, and as old as the latest use."""


class OnlineFeatures:
    """Run the target over every batch."""

    def __init__(
        self,
        target: Any,
        layer_ids: Sequence[int],
        splits: Mapping[Split, Sequence[Example]],
        with_last: bool = False,
    ) -> None:
        self.target, self.layer_ids, self.splits, self.with_last = target, layer_ids, splits, with_last

    def features(self, split: Split, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split. Shapes: one (S, F) tensor a row."""
        ids = [self.splits[split][row].input_ids for row in rows]
        return compute(self.target, self.layer_ids, ids, self.with_last)


class CachedFeatures:
    """Read features that the target left on disk, and keep others from deleting them meanwhile.

    Args:
        root: directory of all caches.
        splits: the examples to have features for.
        identity: which target it is.
        layer_ids: its tapped layers.
        dtype: what it computes in.
        with_last: keep what it feeds its head, too.
    """

    def __init__(
        self,
        root: Path,
        splits: Mapping[Split, Sequence[Example]],
        *,
        identity: dict[str, Any],
        layer_ids: Sequence[int],
        dtype: str,
        with_last: bool = False,
    ) -> None:
        self.layer_ids = layer_ids
        rows = [example.input_ids for split in ("train", "heldout") for example in splits[split]]
        self.offsets: dict[Split, int] = {"train": 0, "heldout": len(splits["train"])}
        self.cache = FeatureCache(root / cache_key(identity, layer_ids, dtype, rows, with_last), rows, with_last)
        self._lock = _use(self.cache.directory)

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


def forget_old(root: Path, keep: int = 2) -> None:
    """Delete the features of configurations that nobody reads, but for those used last.

    Args:
        root: directory of all caches.
        keep: caches that stay, counted from the one used last.
    """
    by_age = sorted(root.glob(f"*/{LOCK}"), key=lambda lock: lock.stat().st_mtime_ns)
    for lock in by_age[:-keep]:
        with contextlib.suppress(BlockingIOError), lock.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)


def _use(directory: Path) -> IO[str]:
    directory.mkdir(parents=True, exist_ok=True)
    stream = (directory / LOCK).open("a")
    fcntl.flock(stream, fcntl.LOCK_SH)
    (directory / LOCK).touch()
    return stream
