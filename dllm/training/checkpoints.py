"""Training checkpoints: whole or absent, and free of pickle.

A checkpoint is a directory step-000100 with the model's files, optimizer.safetensors and state.json. It is written
aside, synced and renamed, so a directory with that name is complete. state.json is sealed and lists the digest of every
other file, so damaged or foreign bytes are never trained on. `latest` and `best` are one-line files that name a
checkpoint, for readers other than the run itself.

Where weights are sharded over ranks, each rank writes its own shard of the weights and of the optimizer state, and no
rank ever has a whole model at a save. Shards are cut along the first dimension, in the order of ranks, so any number of
ranks can read them: a tensor is its shards' concatenation.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm.digests import check_files, file_digest, is_sealed, sealed, unsealed
from dllm.disk_faults import is_disk_full, is_unreadable
from dllm.errors import ModelError, StageError
from dllm.files import atomic_folder, atomic_write

SCHEMA = 2
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
AGAIN = "delete this checkpoint; an older one takes its place"


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

    def save_shard(
        self,
        step: int,
        optimizer: Mapping[str, Tensor],
        rank: int,
        world: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write this rank's shards, for `save` to move into the checkpoint of that step.

        Every rank calls it, and rank 0 calls `save` once all of them have returned.

        Args:
            optimizer: this rank's shard of each tensor; what is equal on all ranks comes from rank 0 alone.
            weights: the same of the weights.

        Raises:
            StageError: a shard cannot be written.
        """
        folder = self._shards(step)
        if (self.root / _name(step)).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for kind, tensors in (("optimizer", optimizer), ("weights", weights or {})):
            file = folder / _shard_name(kind, rank, world)
            _save(tensors, file)
            with file.open("rb") as written:
                os.fsync(written.fileno())
            _digest_of(file).write_text(file_digest(file))

    def save(
        self,
        state: TrainState,
        optimizer: Mapping[str, Tensor],
        save_model: Callable[[Path], None] | None = None,
        shards: int = 0,
    ) -> Path:
        """Write a checkpoint, point `latest` (and `best`, if it is the best) at it, and drop old ones.

        Args:
            optimizer: whole tensors; unused where there are shards.
            save_model: writes the whole weights; None where they come as shards.
            shards: number of ranks that wrote their state by `save_shard`.

        Raises:
            StageError: the disk is full or refuses.
        """
        final = self.root / _name(state.step)
        if not final.exists():
            with atomic_folder(final) as aside:
                try:
                    if save_model is not None:
                        save_model(aside)
                except SafetensorError as error:
                    raise _unwritable(error, final) from None
                if not shards:
                    _save(optimizer, aside / OPTIMIZER)
                digests = {path.relative_to(aside).as_posix(): file_digest(path) for path in _files(aside)}
                digests |= self._move_shards(state.step, shards, aside)
                (aside / STATE).write_bytes(sealed({**asdict(state), "shards": shards, "files": digests}))
        self._point("latest", final.name)
        if state.best_step == state.step:
            self._point("best", final.name)
        self._prune(state.best_step)
        return final

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return next(reversed(self._complete()), None)

    def at(self, step: int) -> Path:
        """Return the checkpoint of a step.

        Raises:
            ModelError: there is none.
        """
        path = self.root / _name(step)
        if not (path / STATE).exists():
            raise ModelError("the run's best checkpoint is missing", where=str(path), hint="delete the run's folder")
        return path

    def load(
        self, directory: Path, rank: int = 0, world: int = 1
    ) -> tuple[TrainState, Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """Check a checkpoint, and read back its state, optimizer tensors, and weights where they are sharded.

        Sharded tensors are put together one at a time, on access.

        Args:
            rank: all ranks load together, and each checks the digests of its share of the files; the caller waits for
                all of them before it uses a tensor.
            world: number of ranks.

        Raises:
            ModelError: a file is missing, damaged, of another checkpoint, or written by another version.
        """
        record = read_state(directory)
        names = sorted(record["files"])[rank::world]
        check_files(directory, {name: record["files"][name] for name in names}, error=ModelError, hint=AGAIN)
        shards = record.pop("shards")
        del record["files"]
        try:
            state = TrainState(**record)
            if shards:
                return state, _Sharded(directory, "optimizer", shards), _Sharded(directory, "weights", shards)
            return state, load_file(directory / OPTIMIZER), None
        except (OSError, TypeError, SafetensorError) as error:
            raise ModelError(f"checkpoint cannot be read: {error}", where=str(directory), hint=AGAIN) from None

    def weights(self, directory: Path) -> Mapping[str, Tensor] | None:
        """Check a checkpoint's weights, and return them where they are sharded.

        Raises:
            ModelError: a file is missing, damaged, or of another checkpoint.
        """
        record = read_state(directory)
        files = {name: digest for name, digest in record["files"].items() if not name.startswith("optimizer")}
        check_files(directory, files, error=ModelError, hint=AGAIN)
        return _Sharded(directory, "weights", record["shards"]) if record["shards"] else None

    def _shards(self, step: int) -> Path:
        return self.root / f".shards-{step:06d}"

    def _move_shards(self, step: int, world: int, folder: Path) -> dict[str, str]:
        digests: dict[str, str] = {}
        for kind in ("optimizer", "weights"):
            for name in (_shard_name(kind, rank, world) for rank in range(world)):
                file = self._shards(step) / name
                digests[name] = _digest_of(file).read_text()
                file.rename(folder / name)
        return digests

    def _complete(self) -> list[Path]:
        found = (p for p in self.root.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / STATE).exists())
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _point(self, name: str, target: str) -> None:
        atomic_write(self.root / name, f"{target}\n".encode())

    def _prune(self, best_step: int | None) -> None:
        spared = {*self._complete()[-self.keep :], self.root / _name(best_step or 0)}
        for path in self._complete():
            if path not in spared:
                path.rename(self.root / f".{path.name}.doomed")  # so that a half-deleted one is never taken for whole
        for unneeded in (*self.root.glob(".*.doomed"), *self.root.glob(".shards-*")):
            shutil.rmtree(unneeded)


def read_state(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json: the fields of `TrainState`, `files` with their digests, the number of `shards`.

    Raises:
        ModelError: it is missing, damaged, of another step, or written by another version.
    """
    path = directory / STATE
    try:
        data = path.read_bytes()
        record = unsealed(data)
    except (OSError, ValueError) as error:
        if is_unreadable(error):
            raise
        raise ModelError(f"checkpoint is damaged: {error}", where=str(path), hint=AGAIN) from None
    if record.get("schema") != SCHEMA or not is_sealed(data):
        raise ModelError("checkpoint of another version", where=str(directory), hint="delete it, start again")
    if directory.name != _name(record["step"]):
        raise ModelError(f"it holds the checkpoint of step {record['step']}", where=str(directory), hint=AGAIN)
    return record


class _Sharded(Mapping[str, Tensor]):
    """The tensors of a sharded checkpoint, each concatenated on access.

    Raises:
        SafetensorError, OSError: a shard is missing or damaged.
    """

    def __init__(self, directory: Path, kind: str, world: int) -> None:
        files = [safe_open(directory / _shard_name(kind, rank, world), framework="pt") for rank in range(world)]
        self._files: dict[str, list[Any]] = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                self._files.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        shards = [file.get_tensor(name) for file in self._files[name]]
        return torch.cat(shards) if len(shards) > 1 else shards[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        raise _unwritable(error, file) from None


def _unwritable(error: Exception, where: Path) -> Exception:
    return error if is_disk_full(error) else StageError(f"checkpoint cannot be written: {error}", where=str(where))


def _shard_name(kind: str, rank: int, world: int) -> str:
    return f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _digest_of(file: Path) -> Path:
    return file.with_suffix(".sha256")
