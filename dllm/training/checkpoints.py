"""Training checkpoints: whole or absent, and free of pickle.

A checkpoint is a directory step-000100 with the model's files, optimizer.safetensors and state.json. It is written
aside, synced and renamed, so a directory with that name is complete. `latest` and `best` are one-line files that
name one.

Where weights are sharded over ranks, each rank writes its own shard of the optimizer state, and an index stands in
place of optimizer.safetensors. Shards are cut along the first dimension, in the order of ranks, so any number of ranks
can read them: a tensor is its shards' concatenation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm.errors import ModelError, StageError
from dllm.files import atomic_folder, atomic_write

SCHEMA = 1
OPTIMIZER = "optimizer.safetensors"
INDEX = "optimizer.safetensors.index.json"


@dataclass
class TrainState:
    """Where a run stands, beside its weights and optimizer state.

    Sample order, anchors, learning rate and random numbers all follow from the step, so the step is all they need.
    Units: seconds of wall clock, over all calls that took part.
    """

    step: int = 0
    seconds: float = 0.0
    interval: list[float] = field(default_factory=list)
    """Sums since the last log line."""
    interval_seconds: float = 0.0
    totals: list[float] = field(default_factory=list)
    """Sums since the run began."""
    best_step: int | None = None
    best_score: list[float] = field(default_factory=list)
    best_validation: dict[str, float] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA


class Checkpoints:
    """The checkpoints of one run, newest and best kept.

    Args:
        root: directory that holds them.
        keep: newest ones to keep; the best stays besides.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def save_shard(self, step: int, optimizer: Mapping[str, Tensor], rank: int, world: int) -> None:
        """Write this rank's shard of the optimizer state, for `save` to move into the checkpoint of that step.

        Every rank calls it, and rank 0 calls `save` once all of them have returned.

        Args:
            optimizer: local shards; tensors without dimensions are equal on all ranks.

        Raises:
            StageError: the shard cannot be written.
        """
        folder = self._shards(step)
        if (self.root / f"step-{step:06d}").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _shard_name(rank, world)
        try:
            save_file(dict(optimizer), file)
        except SafetensorError as error:
            raise StageError(f"checkpoint cannot be written: {error}", where=str(file)) from None
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def save(
        self,
        state: TrainState,
        optimizer: Mapping[str, Tensor],
        save_model: Callable[[Path], None],
        shards: int = 0,
    ) -> Path:
        """Write a checkpoint, point `latest` (and `best`, if it is the best) at it, and drop old ones.

        Args:
            optimizer: whole tensors; unused where there are shards.
            shards: number of ranks that wrote the optimizer state by `save_shard`.

        Raises:
            StageError: the disk is full or refuses.
        """
        final = self.root / f"step-{state.step:06d}"
        if not final.exists():
            with atomic_folder(final) as aside:
                try:
                    save_model(aside)
                    if shards:
                        self._move_shards(state.step, shards, aside)
                    else:
                        save_file(dict(optimizer), aside / OPTIMIZER)
                except SafetensorError as error:
                    raise StageError(f"checkpoint cannot be written: {error}", where=str(final)) from None
                (aside / "state.json").write_text(json.dumps(asdict(state)))
        self._point("latest", final.name)
        if state.best_step == state.step:
            self._point("best", final.name)
        self._prune()
        return final

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return self._pointed("latest") or next(reversed(self._complete()), None)

    def best(self) -> Path | None:
        """Return the best checkpoint, or None."""
        return self._pointed("best")

    def load(self, directory: Path) -> tuple[TrainState, Mapping[str, Tensor]]:
        """Read back a checkpoint's state and whole optimizer tensors; sharded ones are read one at a time, on access.

        Raises:
            ModelError: a file is missing, damaged, or written by another version.
        """
        try:
            raw = json.loads((directory / "state.json").read_text())
            if raw.get("schema") != SCHEMA:
                raise ModelError("checkpoint of another version", where=str(directory), hint="delete it, start again")
            state = TrainState(**raw)
            if (directory / INDEX).exists():
                return state, _Sharded(directory)
            return state, load_file(directory / OPTIMIZER)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"checkpoint cannot be read: {error}",
                where=str(directory),
                hint="delete it; an older one takes its place",
            ) from None

    def _shards(self, step: int) -> Path:
        return self.root / f".shards-{step:06d}"

    def _move_shards(self, step: int, world: int, folder: Path) -> None:
        for rank in range(world):
            name = _shard_name(rank, world)
            (self._shards(step) / name).rename(folder / name)
        (folder / INDEX).write_text(json.dumps({"shards": [_shard_name(rank, world) for rank in range(world)]}))

    def _complete(self) -> list[Path]:
        found = (p for p in self.root.glob("step-*") if (p / "state.json").exists())
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _pointed(self, name: str) -> Path | None:
        pointer = self.root / name
        path = self.root / pointer.read_text().strip() if pointer.exists() else None
        return path if path is not None and (path / "state.json").exists() else None

    def _point(self, name: str, target: str) -> None:
        atomic_write(self.root / name, f"{target}\n".encode())

    def _prune(self) -> None:
        spared = {*self._complete()[-self.keep :], self._pointed("latest"), self._pointed("best")}
        for path in self._complete():
            if path not in spared:
                path.rename(self.root / f".{path.name}.doomed")  # so that a half-deleted one is never taken for whole
        for unneeded in (*self.root.glob(".*.doomed"), *self.root.glob(".shards-*")):
            shutil.rmtree(unneeded)


class _Sharded(Mapping[str, Tensor]):
    """The optimizer tensors of a sharded checkpoint, each concatenated on access.

    Raises:
        SafetensorError, OSError: a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        self._files = [safe_open(directory / name, framework="pt") for name in index["shards"]]
        self._names = list(self._files[0].keys())
        if any(set(file.keys()) != set(self._names) for file in self._files):
            raise ValueError("shards of the optimizer state hold different tensors")

    def __getitem__(self, name: str) -> Tensor:
        shards = [file.get_tensor(name) for file in self._files]
        return torch.cat(shards) if shards[0].ndim else shards[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shard_name(rank: int, world: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{world:05d}.safetensors"
