"""How results reach `out/`: whole or not at all."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm.errors import StageError

LINKED = (".safetensors", ".parquet")
"""Formats written once and never changed in place: hard links to them are safe, and cost no time or space."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def publish_tree(out: Path, files: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `out` a folder of exactly these files and JSON records, in one step.

    A reader, or a kill at any moment, sees the old folder or the new one.

    Raises:
        StageError: one of the files is missing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_over in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(left_over)
    aside = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        for name, source in files.items():
            _place(source, aside / name)
        for name, record in records.items():
            write_json(aside / name, record)
        for folder in [aside, *(p for p in aside.rglob("*") if p.is_dir())]:
            _sync(folder)
        _swap(aside, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically; figures that are not finite become null."""
    text = json.dumps(_finite(record), indent=2, sort_keys=True, allow_nan=False, default=str)
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def _place(source: Path, goal: Path) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise StageError("a file to publish is missing", where=str(source))
    if source.suffix not in LINKED or not _link(source, goal):
        shutil.copyfile(source, goal)
    _sync(goal)


def _link(source: Path, goal: Path) -> bool:
    try:
        os.link(source.resolve(), goal)
    except OSError:  # another filesystem, or one without hard links
        return False
    return True


def _swap(new: Path, old: Path) -> None:
    if not old.exists():
        new.rename(old)
    elif not _exchange(new, old):  # where the system has no exchange: two renames, the old folder is kept until the end
        retired = old.parent / f".{old.name}.{uuid.uuid4().hex[:8]}"
        old.rename(retired)
        new.rename(old)
        shutil.rmtree(retired)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
