"""What a forced flow run has begun: a suspension, a retry or a kill does not make it begin again.

A run starts from scratch once. `work/forced.json` says which run did so, and which stages it has finished since. Of a
checkout, `work/` is `work/forced/<flow run>/` of the project: it outlives the checkout, and goes when the run succeeds.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dllm.digests import read_sealed, sealed
from dllm.files import atomic_write
from dllm.stages import workspace

FOLDER = Path("work", "forced")
"""Work of forced runs in checkouts, by flow run."""
LOCK = "dvc.lock"


class Forced:
    """The progress of one forced run.

    Args:
        root: the folder that its stages run in.
        run: the flow run's id.
        keep_lock: whether to keep dvc.lock with the work, since `root` does not outlive a suspension.
    """

    def __init__(self, root: Path, run: str, *, keep_lock: bool) -> None:
        self._root, self._run, self._keeps_lock = root, run, keep_lock
        self._note = root / "work" / "forced.json"
        self._finished: list[str] = []

    def begin(self, stages: Sequence[str]) -> None:
        """Remove all work of these stages, unless this run has done so: then go on from what it has finished.

        Raises:
            StageError: a process works there.
        """
        note = read_sealed(self._note) or {}
        if note.get("run") == self._run:
            self._finished = list(note["finished"])
            kept = self._note.with_name(LOCK)
            if self._keeps_lock and kept.is_file():
                shutil.copyfile(kept, self._root / LOCK)
            return
        for stage in stages:
            workspace.forget(self._root, stage)
        self._write()

    def is_due(self, stage: str) -> bool:
        """Return whether this run has yet to finish the stage."""
        return stage not in self._finished

    def finished(self, stage: str) -> None:
        """Note that the stage has been finished."""
        if self._keeps_lock:  # first: the results that a note speaks of are those of this file
            atomic_write(self._note.with_name(LOCK), (self._root / LOCK).read_bytes())
        self._finished.append(stage)
        self._write()

    def _write(self) -> None:
        atomic_write(self._note, sealed({"run": self._run, "finished": self._finished}))
