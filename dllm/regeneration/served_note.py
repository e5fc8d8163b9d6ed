"""The note beside responses: which model has generated them, and by which settings."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from dllm.disk_faults import is_unreadable
from dllm.files import atomic_write
from dllm.outside import parse_json
from dllm.secrets import hide_in

FILE = "served.json"
MODEL_KEYS = ("model", "model_path", "revision", "weight_version", "dtype", "quantization")
"""Keys of an engine's description that distinguish models."""

_log = logging.getLogger(__name__)


def write(work: Path, note: dict[str, Any]) -> None:
    """Write the note: the folder of the responses, the engine's description, and the digest of the settings or null."""
    atomic_write(work / FILE, json.dumps(hide_in(note), sort_keys=True, default=str).encode())


def read(work: Path) -> dict[str, Any] | None:
    """Read the note; None where there is none, or none that can be read."""
    try:
        found = parse_json((work / FILE).read_bytes())
        folder, settings = str(found["folder"]), found.get("settings")  # older versions wrote no settings
        if not re.fullmatch(r"answers-[0-9a-f]{8}", folder):
            return None
        return {"folder": folder, "served": dict(found["served"]), "settings": settings}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if is_unreadable(error):
            raise
        return None


def same_work(work: Path, settings: str, served: dict[str, Any]) -> list[Path]:
    """List the folders of responses beside some work that depend on the same settings and model."""
    notes = {other: _of_other(other) for other in sorted(work.parent.iterdir()) if other.is_dir() and other != work}
    return [
        other / note["folder"]
        for other, note in notes.items()
        if note and note["settings"] == settings and is_same_model(served, note["served"])
    ]


def _of_other(work: Path) -> dict[str, Any] | None:
    """Read the note of other work, which must not stop this one where it cannot be read."""
    try:
        return read(work)
    except OSError as error:
        _log.warning("%s: cannot be read; its responses are not used: %s", work, error.strerror)
        return None


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare the keys in both descriptions: a busy server may leave some out."""
    return all(one[key] == other[key] for key in MODEL_KEYS if key in one and key in other)


def name_of(served: dict[str, Any]) -> str:
    """Name the model that an engine describes."""
    return ", ".join(str(served[key]) for key in MODEL_KEYS if key in served)


def folder_of(served: dict[str, Any]) -> str:
    """Name the folder of its responses."""
    return f"answers-{hashlib.sha256(name_of(served).encode()).hexdigest()[:8]}"
