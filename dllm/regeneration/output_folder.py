"""The folder a standalone regeneration leaves: one process at a time, untouched unless asked, whole at the end.

Owns what lies in it: shards, refused requests and the manifest (last) for readers; `.lock`; and for each configuration
`.work/<fingerprint>/`, whose finished shards are the same files by hard link and cost no space.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dllm.errors import StageError
from dllm.files import LOCK, atomic_link, atomic_write, lock_folder
from dllm.regeneration import core as answering
from dllm.regeneration.core import Answered
from dllm.responses import shards

WORK = ".work"
PUBLISHED = "published"


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Hold an output folder, made where it is missing.

    Raises:
        StageError: another process holds it, it is no folder, or it holds something and `resume` is off.
    """
    if folder.exists() and not folder.is_dir():
        raise StageError("not a folder", where=str(folder), hint="name another --output-dir")
    if (folder / LOCK).exists():  # its owner's complaint comes before ours
        with lock_folder(folder):
            _check_free(folder, resume)
    elif folder.exists():
        _check_free(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        _check_free(folder, resume)
        yield


def _check_free(folder: Path, resume: bool) -> None:
    is_begun = any((folder / WORK).glob("*/answers-*"))  # a call that failed before it asked leaves nothing to protect
    found = sorted(path.name for path in folder.iterdir() if path.name != LOCK and (path.name != WORK or is_begun))
    if found and not resume:
        raise StageError(
            f"the output folder is not empty: it holds {found[0]}",
            where=str(folder),
            hint="add --resume to go on with it, or name another --output-dir",
        )


def work_folder(folder: Path, fingerprint: str) -> Path:
    """Return the place of a configuration's work, new or left by an earlier call; say so where others lie beside it."""
    work = folder / WORK / fingerprint
    others = [path.name for path in (folder / WORK).glob("*") if path != work]
    if others and not work.exists():
        line = "parameters, model or input are not those of the work found here: starting anew beside it"
        print(f"regenerate: {line} ({folder / WORK})", file=sys.stderr, flush=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


class Session:
    """Time spent on one result over all calls, on disk.

    Units: `seconds` counts killed calls too, up to ten seconds before each kill.
    """

    def __init__(self, work: Path) -> None:
        self._path = work / "session.json"
        self._began = time.monotonic()
        try:
            before = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            before = {}
        self.started: str = before.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
        self.mlflow_run_id: str | None = before.get("mlflow_run_id")
        self._before = float(before.get("seconds", 0.0))

    @property
    def seconds(self) -> float:
        """Time so far."""
        return self._before + time.monotonic() - self._began

    def save(self) -> None:
        """Write it down."""
        noted = {"started": self.started, "seconds": self.seconds, "mlflow_run_id": self.mlflow_run_id}
        atomic_write(self._path, json.dumps(noted).encode())


def published(folder: Path, fingerprint: str, answered: Answered) -> dict[str, Any] | None:
    """Return the folder's manifest where it is this very result, and whole; else None."""
    try:
        manifest = json.loads((folder / shards.MANIFEST).read_bytes())
        is_this = manifest["fingerprint"] == fingerprint and manifest["shards"] == answered.entries
        pairs = [(folder / entry["file"], answered.store.folder / entry["file"]) for entry in answered.entries]
        is_whole = (folder / shards.REJECTED).exists() and all(one.samefile(other) for one, other in pairs)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if is_this and is_whole else None


def publish(folder: Path, work: Path, answered: Answered, manifest: dict[str, Any]) -> None:
    """Put a whole result into the folder in place of an older one, and let go of older finished work.

    While the files change there is no manifest, so that no reader takes a mixture for a result.
    """
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    names = {entry["file"] for entry in answered.entries}
    for old in folder.glob("shard-*.parquet"):
        if old.name not in names:
            old.unlink()
    for name in sorted(names):
        atomic_link(answered.store.folder / name, folder / name)
    atomic_write(folder / shards.REJECTED, answering.rejections(answered))
    shards.write_manifest(folder, manifest)
    (work / PUBLISHED).touch()
    answering.forget_others(answered)
    for other in (folder / WORK).glob(f"*/{PUBLISHED}"):
        if other.parent != work:
            shutil.rmtree(other.parent)
