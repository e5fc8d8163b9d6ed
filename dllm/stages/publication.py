"""How results reach `out/`: whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm.errors import StageError
from dllm.files import atomic_folder, atomic_link, atomic_write

LINKED = (".safetensors", ".parquet")
"""Formats written once and never changed in place: hard links to them are safe, and cost no time or space."""


def publish_tree(out: Path, files: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `out` a folder of exactly these files and JSON records, in one step.

    Raises:
        StageError: one of the files is missing.
    """
    with atomic_folder(out) as aside:
        for name, source in files.items():
            _place(source, aside / name)
        for name, record in records.items():
            write_json(aside / name, record)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically; figures that are not finite become null."""
    text = json.dumps(_finite(record), indent=2, sort_keys=True, allow_nan=False, default=str)
    atomic_write(path, f"{text}\n".encode())


def _place(source: Path, goal: Path) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise StageError("a file to publish is missing", where=str(source))
    if source.suffix in LINKED:
        atomic_link(source, goal)
    else:
        shutil.copyfile(source, goal)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
