"""The name that the command line was called by: `dllm`, the script that pip installs, or `python -m dllm`."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPT = "dllm"


def is_script() -> bool:
    """Return whether the script was called: shells complete its verbs and options."""
    return Path(sys.argv[0]).name == SCRIPT


def program() -> str:
    """Return the name that usage and hints show."""
    return SCRIPT if is_script() else f"python -m {SCRIPT}"
