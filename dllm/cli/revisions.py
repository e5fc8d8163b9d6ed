"""Results of another git revision or DVC experiment, copied out of DVC's cache: the working tree is not touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dllm.errors import DataError
from dllm.outside import one_line


def folder(name: str, root: Path, place: str) -> Path | None:
    """Return the folder of that name, as it is or in the project; None if it is to be read as a revision.

    Raises:
        DataError: the name can be neither.
    """
    for path in (Path(name), root / name):
        if name and path.is_dir():
            return path
    if name.startswith("-") or not name:
        raise DataError(f"{name!r} is no folder and no revision", hint=f"name a folder, or a revision with {place}")
    return None


def copy(name: str, root: Path, path: str, to: Path) -> Path:
    """Copy a file or folder that a stage has published at a revision, fetched from the remote if need be.

    Raises:
        DataError: the revision does not exist, or has no such file.
    """
    command = [sys.executable, "-m", "dvc", "get", str(root), path, "--rev", name, "--out", str(to)]
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode or not to.exists():
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(lines[0] if lines else f"`dvc get` ended with {done.returncode}", 250)
        raise DataError(
            f"no folder, and no git revision or DVC experiment with {path}: {reason}",
            where=name,
            hint="`git log -- dvc.lock` and `dvc exp list` name them; `dvc fetch` gets what only a remote has",
        )
    return to
