"""Provenance of a result: commit, library versions, machine, and content digests."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from dllm.config.load import read_yaml
from dllm.digests import file_digest, folder_digests, tree_digest
from dllm.errors import StageError

LIBRARIES = ("dllm", "torch", "transformers", "mlflow", "dvc", "prefect", "numpy", "pyarrow")
LOCK = "dvc.lock"
RECORDS = ("run.json", "metrics.json", "headline.json")
"""Records of how a result was made, left out of its digest: times and hosts differ from run to run."""


def digest(path: Path) -> str:
    """Hash a file's bytes, or a folder's file names and bytes, into 64 hex digits.

    A folder's own records (`RECORDS`) are left out: the same thing made twice has the same digest.

    Raises:
        StageError: there is nothing at the path.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        raise StageError("input is missing", where=str(path), hint="run the stage that makes it, or `dvc repro`")
    return tree_digest(folder_digests(path, RECORDS))


def dvc_digest(root: Path, path: Path) -> str:
    """Return the digest under which DVC knows a file or folder of a project, in at most 36 characters.

    A folder's is that of dvc.lock, as long as its files add up to what is recorded there; otherwise the start of
    `digest` stands in for it.

    Raises:
        StageError: there is nothing at the path.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    try:
        stages = read_yaml((root / LOCK).read_text())["stages"]
        name = path.absolute().relative_to(root.absolute()).as_posix()
        out = next(out for stage in stages.values() for out in stage["outs"] if out["path"] == name)
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        if (out["nfiles"], out["size"]) == (len(sizes), sum(sizes)):
            return str(out["md5"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        pass
    return digest(path)[:36]


def git_state(root: Path) -> dict[str, str | bool | None]:
    """Describe the working copy: `commit`, and `dirty`, whether tracked files other than dvc.lock differ from it.

    Where there is no commit both are None, and `reason` says why in one word: `uninstalled` (git), `outside` (of any
    repository), `foreign` (another user's repository, which git does not read), `empty` (no commit yet), `untracked`
    (the folder, in the repository around it), `broken`, or `timeout`.
    """
    try:
        code, commit, error = _git(root, "rev-parse", "--verify", "HEAD")
        if code:
            return _no_commit(_reason(error))
        if not _git(root, "ls-tree", "--name-only", "HEAD", "./")[1]:
            return _no_commit("untracked")
        code, changes, _ = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":!dvc.lock")
    except OSError:
        return _no_commit("uninstalled")
    except subprocess.TimeoutExpired:
        return _no_commit("timeout")
    return {"commit": commit, "dirty": bool(changes) if code == 0 else None}


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


def _no_commit(reason: str) -> dict[str, str | bool | None]:
    return {"commit": None, "dirty": None, "reason": reason}


def _reason(error: str) -> str:
    """Find the word for what git printed."""
    reasons = {"dubious ownership": "foreign", "not a git repository (or any": "outside", "single revision": "empty"}
    return next((word for part, word in reasons.items() if part in error), "broken")


def _git(root: Path, *arguments: str) -> tuple[int, str, str]:
    environment = os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}  # words that `_reason` knows; only look
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, env=environment)
    return done.returncode, done.stdout.strip(), done.stderr
