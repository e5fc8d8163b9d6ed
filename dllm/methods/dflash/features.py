"""The target's features for training: from a cache on disk that all ranks fill together, or computed for each batch.

`dllm.models.taps` computes them.

Shape suffixes: S sequence, T tokens of many rows end to end, D hidden, F tapped features (taps * D).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dllm.disk_faults import is_unreadable
from dllm.errors import DataError
from dllm.files import atomic_path, open_lock
from dllm.models.taps import compute
from dllm.progress import Progress
from dllm.training.batches import Example
from dllm.training.distributed import Ranks
from dllm.training.strategy import Split

Part = Split | Literal["greedy"]
"""Examples that have features: of a split, or of `dllm.methods.dflash.greedy`."""

SCHEMA = 3
TOKENS_A_PART = 16_384
"""Tokens in one cache file: about 90 MB at 5 taps of 576, and the most that a kill can cost."""
HASHED_BYTES = 8 << 20
"""In one block of a file's digest."""
FILL_TOKENS = 2048
"""Tokens that the target runs over at one time while a cache is filled; one longer row is run alone."""
LOCK = ".lock"
"""In each cache's directory: held while a process reads it, and as old as the latest use."""


def cache_key(
    target: dict[str, Any], layer_ids: Sequence[int], dtype: str, rows: Sequence[Sequence[int]], with_last: bool = False
) -> str:
    """Hash everything that determines the features: the target's identity, taps, dtype and every token."""
    made_of = [SCHEMA, target, list(layer_ids), dtype, *(["last"] if with_last else [])]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(list(row)).encode())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of many rows in safetensors files of about TOKENS_A_PART tokens, each written atomically.

    A file's name holds a digest of its bytes and its place, which is checked when the file is first read: damaged
    features, or those of other rows, are never trained on.

    Args:
        directory: home of this cache; its name should be the `cache_key`.
        rows: token ids of every row, in a fixed order; row i of the cache is rows[i].
        with_last: keep the input of the target's head, too.
        dtype: on disk; by default the model's.
    """

    def __init__(
        self,
        directory: Path,
        rows: Sequence[Sequence[int]],
        with_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.directory, self.rows, self.with_last, self.dtype = directory, rows, with_last, dtype
        # Rows of similar length in one part need little padding when the target runs over them.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        self.parts: list[list[int]] = []
        tokens = TOKENS_A_PART
        for index in order:
            if tokens + len(rows[index]) > TOKENS_A_PART:
                self.parts.append([])
                tokens = 0
            self.parts[-1].append(index)
            tokens += len(rows[index])
        self._place = {row: (part, at) for part, members in enumerate(self.parts) for row, at in self._starts(members)}
        self._open: dict[int, Any] = {}

    def missing(self) -> list[int]:
        """List the parts that are not on disk yet."""
        there = {path.name.split("-")[1] for path in self.directory.glob("part-*-*.safetensors")}
        return [part for part in range(len(self.parts)) if f"{part:05d}" not in there]

    def fill(self, part: int, model: Any, layer_ids: Sequence[int], batch_tokens: int = FILL_TOKENS) -> int:
        """Compute one part, write it, and return its number of tokens."""
        members = self.parts[part]
        done: list[Tensor] = []
        while len(done) < len(members):
            width = len(self.rows[members[-1]])
            batch = members[len(done) : len(done) + max(1, batch_tokens // width)]
            done += compute(model, layer_ids, [self.rows[row] for row in batch], self.with_last)
        features_TF = torch.cat(done)
        features_TF = features_TF.to(self.dtype or features_TF.dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        data = save({"features": features_TF.contiguous()})
        name = f"part-{part:05d}"
        digest = _digest(f"{self.directory.name}/{name}", data)
        with atomic_path(self.directory / f"{name}-{digest}.safetensors") as aside:
            aside.write_bytes(data)
        return len(features_TF)

    def read(self, row: int) -> Tensor:
        """Return the features of a row. Shapes: (S, F).

        Raises:
            DataError: its part is missing or damaged.
        """
        part, at = self._place[row]
        if part not in self._open:
            path = self._path(part)
            check_part(path)
            try:
                self._open[part] = safe_open(path, "pt").get_slice("features")
            except (OSError, RuntimeError, ValueError) as error:
                raise _damaged(path, str(error)) from None
        features_SF = self._open[part][at : at + len(self.rows[row])]
        if len(features_SF) != len(self.rows[row]):
            raise _damaged(self._path(part), "it has fewer tokens than its rows")
        return features_SF

    def _starts(self, members: list[int]) -> Iterator[tuple[int, int]]:
        at = 0
        for row in members:
            yield row, at
            at += len(self.rows[row])

    def _path(self, part: int) -> Path:
        found = sorted(self.directory.glob(f"part-{part:05d}-*.safetensors"))
        return found[0] if found else self.directory / f"part-{part:05d}.safetensors"


def check_part(path: Path) -> None:
    """Compare a file of a cache with the digest in its name.

    Raises:
        DataError: it is missing, damaged, or has been moved here from another place.
    """
    name, _, expected = path.stem.rpartition("-")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _digest(f"{path.parent.name}/{name}", data)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        if is_unreadable(error):
            raise
        raise _damaged(path, str(error)) from None
    if found != expected:
        raise _damaged(path, f"damaged, or of other rows: sha256 {found}, expected {expected}")


def _digest(place: str, data: bytes | mmap.mmap) -> str:
    """Hash a file's place and its blocks, several at the same time: a GPU fills a part in half a second."""

    def digest_of(at: int) -> bytes:
        with memoryview(data) as view:
            return hashlib.sha256(view[at : at + HASHED_BYTES]).digest()

    with ThreadPoolExecutor() as pool:
        blocks = pool.map(digest_of, range(0, len(data), HASHED_BYTES))
        return hashlib.sha256(b"".join([place.encode(), *blocks])).hexdigest()[:16]


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"feature cache cannot be read: {' '.join(why.split())}",
        where=str(path),
        hint="delete that file and run the stage again",
    )


class OnlineFeatures:
    """Run the target over every batch."""

    def __init__(
        self,
        target: Any,
        layer_ids: Sequence[int],
        splits: Mapping[Part, Sequence[Example]],
        with_last: bool = False,
    ) -> None:
        self.target, self.layer_ids, self.splits, self.with_last = target, layer_ids, splits, with_last

    def features(self, split: Part, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split. Shapes: one (S, F) tensor per row."""
        ids = [self.splits[split][row].input_ids for row in rows]
        return compute(self.target, self.layer_ids, ids, self.with_last)


class CachedFeatures:
    """Read features from the cache on disk, which is locked against deletion meanwhile.

    Args:
        root: directory of all caches.
        splits: the examples that need features.
        identity: the target's.
        layer_ids: its tapped layers.
        dtype: the target's, in which they are stored, whatever it computes in.
        with_last: keep the input of its head, too.
    """

    def __init__(
        self,
        root: Path,
        splits: Mapping[Part, Sequence[Example]],
        *,
        identity: dict[str, Any],
        layer_ids: Sequence[int],
        dtype: str,
        with_last: bool = False,
    ) -> None:
        self.layer_ids = layer_ids
        rows: list[Sequence[int]] = []
        self.offsets: dict[Part, int] = {}
        for part, examples in splits.items():
            self.offsets[part] = len(rows)
            rows += [example.input_ids for example in examples]
        directory = root / cache_key(identity, layer_ids, dtype, rows, with_last)
        self.cache = FeatureCache(directory, rows, with_last, getattr(torch, dtype))
        self._lock = _use(self.cache.directory)

    def features(self, split: Part, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some rows of a split. Shapes: one (S, F) tensor per row."""
        return [self.cache.read(self.offsets[split] + row) for row in rows]

    def fill(self, target: Any, ranks: Ranks) -> None:
        """Compute the missing parts, each rank its share.

        Raises:
            StageError: another rank failed.
        """
        while True:
            missing = self.cache.missing()
            if not ranks.max(len(missing)):  # also a barrier: no rank writes before all have looked
                return
            mine = missing[ranks.rank :: ranks.world]
            tokens = sum(len(self.cache.rows[row]) for part in mine for row in self.cache.parts[part])
            with Progress("target features", tokens, "tokens", shown=ranks.is_main) as bar:
                for part in mine:
                    bar.update(self.cache.fill(part, target, self.layer_ids))
            ranks.barrier()


def forget_old(root: Path, keep: int = 2) -> None:
    """Delete caches that no process reads, except those used last.

    Args:
        root: directory of all caches.
        keep: how many stay.
    """
    by_age = sorted(root.glob(f"*/{LOCK}"), key=lambda lock: lock.lstat().st_mtime_ns)
    for lock in by_age[:-keep]:
        with contextlib.suppress(BlockingIOError), open_lock(lock) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)


def _use(directory: Path) -> IO[str]:
    directory.mkdir(parents=True, exist_ok=True)
    stream = open_lock(directory / LOCK)
    fcntl.flock(stream, fcntl.LOCK_SH)
    os.utime(stream.fileno())
    return stream
