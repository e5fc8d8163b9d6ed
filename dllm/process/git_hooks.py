"""A hook of git starts its programs with variables that name its own repository, whichever folder they work in."""

from __future__ import annotations

import os

VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")


def leave_hook() -> None:
    """Remove those variables, for this process and its children: the project is in another repository, or may be."""
    for name in VARIABLES:
        os.environ.pop(name, None)
