"""Results on disk: a folder of files and JSON records that appears whole, without secrets, sealed by its run.json."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dllm.digests import sealed
from dllm.errors import StageError
from dllm.files import atomic_folder, atomic_link, atomic_path, atomic_write
from dllm.secrets import hide_in

RUN = "run.json"
"""How a result was made, and the digest of each published file."""
HEADLINE = "headline.json"
"""The few metrics that `dvc metrics` and `dvc exp show` print; metrics.json has all of them."""
LINKED = (".safetensors", ".parquet")
"""Formats written once and never changed in place: hard links to them are safe, and cost no time or space."""

Publish = Callable[[Path, Mapping[str, Path], Mapping[str, Mapping[str, Any]]], None]
"""Takes the folder, files by their name in it, and JSON records by name."""


def publish_tree(
    out: Path, files: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]], *, link: bool = True
) -> None:
    """Make `out` a folder of exactly these files and JSON records, in one step; run.json is sealed.

    Args:
        link: as in `place`.

    Raises:
        StageError: one of the files is missing.
    """
    with atomic_folder(out) as aside:
        for name, source in files.items():
            place(source, aside / name, link=link)
        for name, record in records.items():
            atomic_write(aside / name, sealed(hide_in(_finite(record))) if name == RUN else as_json(record))


def place(source: Path, path: Path, *, link: bool = True) -> None:
    """Link or copy a file to a path, atomically.

    Args:
        link: share the bytes of formats that are written once, where the disk can.

    Raises:
        StageError: the file is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        raise StageError("a file to publish is missing", where=str(source))
    if source.suffix in LINKED and link:
        atomic_link(source, path)
    else:
        with atomic_path(path) as aside:
            shutil.copyfile(source, aside)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically, without secrets; figures that are not finite become null."""
    atomic_write(path, as_json(record))


def as_json(record: Mapping[str, Any]) -> bytes:
    """Return the bytes that `write_json` writes."""
    text = json.dumps(hide_in(_finite(record)), indent=2, sort_keys=True, allow_nan=False, default=str)
    return f"{text}\n".encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
