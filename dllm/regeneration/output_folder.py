"""The output folder of the standalone `regenerate`: one process at a time, untouched unless asked, manifest last.

It holds the shards, the rejected requests and the manifest for readers; `.lock`; and for each configuration
`.work/<fingerprint>/`, whose finished shards are the same files by hard link and take no space.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.digests import unsealed
from dllm.disk_faults import is_unreadable
from dllm.errors import StageError
from dllm.files import LOCK, lock_folder
from dllm.publishing import LINKED, place
from dllm.responses import shards
from dllm.workspace import Workspace

WORK = ".work"
PUBLISHED = "published"


@contextlib.contextmanager
def claim(folder: Path, resume: bool) -> Iterator[None]:
    """Lock an output folder, created where it is missing.

    Raises:
        StageError: another process holds it, it is no folder, or it holds something and `resume` is off, or files in
            place of the result that no earlier call has written.
    """
    if folder.exists() and not folder.is_dir():
        raise StageError("not a folder", where=str(folder), hint="name another --output-dir")
    if folder.exists() and not (folder / LOCK).exists():
        _check_free(folder, resume)  # before the lock: a folder that is refused gets no file of ours
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        _check_free(folder, resume)
        yield


def note_other_work(workspace: Workspace) -> None:
    """Print a line where the folder holds work, and none of it has this fingerprint."""
    if not workspace.work.exists() and any(workspace.works.glob("*")):
        line = "parameters, model or input differ from those of the work found here: starting anew beside it"
        print(f"regenerate: {line} ({workspace.works})", file=sys.stderr, flush=True)


def is_published(folder: Path, files: Mapping[str, Path]) -> bool:
    """Return whether the folder holds exactly these files already."""
    try:
        return all(
            (folder / name).samefile(path)
            if path.suffix in LINKED
            else (folder / name).read_bytes() == path.read_bytes()
            for name, path in files.items()
        )
    except OSError:
        return False


def publish(folder: Path, files: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish files beside what else the folder holds, in place of an older result; the manifest holds the records.

    While the files change there is no manifest, so that no reader takes a mixture for a result.

    Args:
        files: the last one is the manifest.
    """
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    for old in list(folder.iterdir()):
        if is_result_name(old.name) and old.name not in files:
            old.unlink()
    for name, path in files.items():
        place(path, folder / name)


def remove_finished_work(workspace: Workspace) -> None:
    """Remove the work of older results, now that this one is published; unfinished work stays."""
    (workspace.work / PUBLISHED).touch()
    for marker in workspace.works.glob(f"*/{PUBLISHED}"):
        if marker.parent != workspace.work:
            shutil.rmtree(marker.parent)


def is_result_name(name: str) -> bool:
    """Return whether publishing may write, or remove, a file of this name."""
    return name in (shards.MANIFEST, shards.REJECTED) or (name.startswith("shard-") and name.endswith(".parquet"))


def _check_free(folder: Path, resume: bool) -> None:
    is_begun = any((folder / WORK).glob("*/answers-*"))  # a call that failed before its first request leaves nothing
    found = sorted(path.name for path in folder.iterdir() if path.name != LOCK and (path.name != WORK or is_begun))
    if found and not resume:
        raise StageError(
            f"the output folder is not empty: it holds {found[0]}",
            where=str(folder),
            hint="add --resume to continue it, or name another --output-dir",
        )
    in_the_way = next(filter(is_result_name, found), None)
    if in_the_way and not is_begun and not _has_result(folder):
        what = f"nothing to resume here, and {in_the_way}, which `regenerate` has not written, would be replaced"
        raise StageError(what, where=str(folder), hint="name another --output-dir")


def _has_result(folder: Path) -> bool:
    """Return whether a manifest of ours is there, of this version or an older one."""
    try:
        return "shards" in unsealed((folder / shards.MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        if is_unreadable(error):
            raise
        return False
