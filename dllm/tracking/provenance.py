"""Provenance of a result: commit, library versions, machine, and content digests."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from dllm.digests import file_digest, folder_digests, tree_digest
from dllm.errors import StageError

LIBRARIES = ("dllm", "torch", "transformers", "mlflow", "dvc", "prefect", "numpy", "pyarrow")
RECORDS = ("run.json", "metrics.json")
"""Records of how a result was made, left out of its digest: times and hosts differ from run to run."""


def digest(path: Path) -> str:
    """Hash a file's bytes, or a folder's file names and bytes, into 64 hex digits.

    A folder's own run.json and metrics.json (`RECORDS`) are left out: the same thing made twice has the same digest.

    Raises:
        StageError: there is nothing at the path.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        raise StageError("input is missing", where=str(path), hint="run the stage that makes it, or `dvc repro`")
    return tree_digest(folder_digests(path, RECORDS))


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a working copy, and whether tracked files other than dvc.lock differ from it.

    Both are None outside git, without git, or before the first commit.
    """
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None, None
    return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock"))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect results, without importing them."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def host() -> dict[str, str | int]:
    """Describe the machine."""
    return {"name": platform.node(), "cpus": os.cpu_count() or 1, "machine": platform.machine()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
