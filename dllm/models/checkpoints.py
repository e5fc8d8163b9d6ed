"""From what a person types as a checkpoint to the directory that holds one.

Owns the order in which a name is tried, and the way back from a checkpoint to the target it was trained for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm.errors import ModelError
from dllm.models.drafts.checkpoint import family_of

CONFIG, WEIGHTS, ADAPTER = "config.json", "*.safetensors", "adapter_config.json"
POINTERS = ("best", "latest", "LATEST", "LATEST.txt")
"""Links, or one-line files, that name a step, in the order in which a run's top directory is read."""
EXPORTS = (".", "checkpoint", "out/train/checkpoint", "consolidated", "model/consolidated", "model")
"""Where in a directory a checkpoint may lie: itself, a stage's output, a project's, a NeMo AutoModel step's."""


def resolve(name: str | Path, root: Path) -> Path:
    """Return the directory with config.json and weights that a name stands for.

    Tried in this order: a directory that is a checkpoint (an export or a training step), a stage's output (its
    `checkpoint/`), a project's folder (its `out/train/checkpoint/`), a step of NeMo AutoModel (its `consolidated/`), a
    run's top directory (its best step, else its latest), a Hugging Face id.

    Args:
        name: what was typed; relative paths start at the current directory, else at `root`.
        root: the project's folder.

    Raises:
        ModelError: nothing by that name holds a checkpoint.
    """
    given = Path(name).expanduser()
    for path in dict.fromkeys((given, root / given)):
        if path.is_dir():
            if (found := _inside(path)) is not None:
                return found
            if any((step / ADAPTER).is_file() for step in _steps(path)):
                return _refuse(name, "this is an adapter alone", "name out/train/checkpoint, where it is merged")
            expected = "expected config.json and model.safetensors, or a run's steps"
            return _refuse(name, "no checkpoint in this directory", expected)
    from dllm.models.targets import HUB_FILES, hub_snapshot, looks_like_hub_id

    if "/" in str(name) and looks_like_hub_id(str(name)):
        return hub_snapshot(str(name), None, HUB_FILES, where="checkpoint")
    return _refuse(name, "no such checkpoint", "name a directory, or models:/NAME@ALIAS for a registered one")


def is_draft(checkpoint: Path) -> bool:
    """Tell whether a checkpoint's config is a draft's."""
    try:
        raw = json.loads((checkpoint / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and ("dflash_config" in raw or family_of(raw) is not None)


def trained_for(checkpoint: Path) -> dict[str, Any] | None:
    """Read the target's identity from the run.json of the stage that made a checkpoint; None where there is none."""
    for folder in (checkpoint, checkpoint.parent):
        try:
            record = json.loads((folder / "run.json").read_text())
            target = record["identity"]["target"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return target if isinstance(target, dict) and "model" in target else None
    return None


def _inside(path: Path) -> Path | None:
    """Find the checkpoint that a directory is or holds."""
    places = (folder / part for folder in _steps(path) for part in EXPORTS)
    return next(filter(_holds_weights, places), None)


def _steps(path: Path) -> list[Path]:
    """List a directory and the steps that its pointers name."""
    pointed = (_follow(steps / pointer) for steps in (path, path / "checkpoints") for pointer in POINTERS)
    return [path, *(step for step in pointed if step is not None)]


def _follow(pointer: Path) -> Path | None:
    if pointer.is_dir():
        return pointer
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def _holds_weights(path: Path) -> bool:
    return (path / CONFIG).is_file() and any(path.glob(WEIGHTS))


def _refuse(name: str | Path, message: str, hint: str | None = None) -> Path:
    raise ModelError(message, where=str(name), hint=hint)
