"""Files that are whole or absent, never half-written."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside, flush it to disk and move it into place.

    A file of that name is replaced, not changed: what was published by hard link keeps its content.
    """
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
