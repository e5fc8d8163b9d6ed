"""Which model a target is: hashes of its weights and code, which fingerprints carry."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from dllm.config.params import Target
from dllm.digests import file_digest
from dllm.errors import ModelError
from dllm.models import builtin, hub
from dllm.models.targets import locate

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def identity(target: Target) -> dict[str, Any]:
    """Return the model's identity: name, hub commit (None if not from the hub), hashes of its weights and code."""
    path = locate(target)
    found = {
        "model": target.model,
        "revision": None if target.model.startswith(builtin.PREFIX) else hub.commit_of(path),
        "weights": weights_digest(path),
    }
    if target.trust_remote_code:
        code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.py"))]
        found["code"] = hashlib.sha256("\n".join(code).encode()).hexdigest()
    return found


def weights_digest(directory: Path) -> str:
    """Hash a model directory's config and weights into 64 hex digits.

    Raises:
        ModelError: the directory holds no weights.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        hint = None
        if any(any(directory.glob(f"*{suffix}")) for suffix in PICKLES):
            hint = "pickled weights are not read, since they can run code; save the model as safetensors"
        raise ModelError("no weights (*.safetensors)", where=str(directory), hint=hint)
    parts = [hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()]
    for file in files:
        stat = file.stat()
        parts.append(_file_digest(file, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    noted = file.parent / builtin.DIGEST_FILE
    if noted.is_file():
        return noted.read_text().strip()
    # In the hub's cache the blob of a large file is named by its sha256.
    blob = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    return file_digest(file)
