"""Which GPUs of NVIDIA this machine has, and which of them this process may use."""

from __future__ import annotations

import os
import re
import subprocess


def has_gpu() -> bool:
    """Return whether `nvidia-smi` lists a GPU of this machine."""
    return bool(_gpus())


def visible_gpus() -> dict[int, str]:
    """Map the GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves to their UUIDs, by their index here."""
    gpus, chosen = _gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    words = [word.strip() for word in chosen.split(",") if word.strip()]
    return {
        index: uuid
        for index, uuid in gpus.items()
        if any(word == str(index) or uuid.startswith(word) for word in words)
    }


def _gpus() -> dict[int, str]:
    """Map the index of each GPU to its UUID."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = [] if found.returncode else found.stdout.splitlines()
    matches = [match for line in lines if (match := re.match(r"GPU (\d+):(?:.*UUID: ([^)\s]+))?", line))]
    return {int(match[1]): match[2] or "" for match in matches}
