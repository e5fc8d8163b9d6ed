"""Training checkpoints: whole or absent, and free of pickle.

A checkpoint is a directory step-000100 with the model's files, optimizer.safetensors and state.json. It is written
aside, synced and renamed, so a directory with that name is complete. `latest` and `best` are one-line files that
name one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from dllm.errors import ModelError, StageError
from dllm.files import atomic_folder, atomic_write

SCHEMA = 1


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

    def save(self, state: TrainState, optimizer: Mapping[str, Tensor], save_model: Callable[[Path], None]) -> Path:
        """Write a checkpoint, point `latest` (and `best`, if it is the best) at it, and drop old ones.

        Raises:
            StageError: the disk is full or refuses.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self.root / f"step-{state.step:06d}"
        if not final.exists():
            with atomic_folder(final) as aside:
                try:
                    save_model(aside)
                    save_file(dict(optimizer), aside / "optimizer.safetensors")
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

    def load(self, directory: Path) -> tuple[TrainState, dict[str, Tensor]]:
        """Read back a checkpoint's state and optimizer tensors.

        Raises:
            ModelError: a file is missing, damaged, or written by another version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            raw = json.loads((directory / "state.json").read_text())
            if raw.get("schema") != SCHEMA:
                raise ModelError("checkpoint of another version", where=str(directory), hint="delete it, start again")
            return TrainState(**raw), load_file(directory / "optimizer.safetensors")
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"checkpoint cannot be read: {error}",
                where=str(directory),
                hint="delete it; an older one takes its place",
            ) from None

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
        for doomed in self.root.glob(".*.doomed"):
            shutil.rmtree(doomed)
