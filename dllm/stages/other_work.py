"""Other work of the stage `train`: what lies beside the folder of this run, and what starting anew would cost.

The work folder is named by what determines the result, and of the batch that is the global batch alone. So a run is
resumed at any number of ranks, as long as batch_size * grad_accumulation * ranks stays the same. Where it does not, or
where another setting differs, one line says what lies there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.config.params import Train
from dllm.digests import read_sealed, sealed
from dllm.errors import ModelError
from dllm.files import atomic_write
from dllm.tracking.runs import flatten
from dllm.training.checkpoints import Checkpoints, read_state
from dllm.workspace import SIDECAR

FILE = "determining.json"
GLOBAL_BATCH = "global batch"
NAMED = 3
"""Differing keys that the line names."""


@dataclass(frozen=True)
class _Found:
    """Unfinished work beside this one."""

    folder: Path
    settings: Mapping[str, Any]
    differing: list[str]
    step: int
    seconds: float


def global_batch(train: Train, world: int) -> int:
    """Return the rows of one optimizer step, over all ranks and micro-batches."""
    return train.batch_size * train.grad_accumulation * world


def determining(train: Train, world: int) -> Train:
    """Replace the split of the global batch, which affects rounding only, by that of one rank without accumulation."""
    return train.model_copy(update={"batch_size": global_batch(train, world), "grad_accumulation": 1, "nproc": 1})


def note(work: Path, train: Train, world: int, inputs: Mapping[str, str]) -> str | None:
    """Note what determines this run in its work folder.

    Args:
        work: the run's folder.
        train: its settings.
        world: its number of ranks.
        inputs: digests of what it reads, and of the target.

    Returns:
        A line on a change of the number of ranks, or on the unfinished work that comes nearest; None where there is
        none.
    """
    own = {**flatten(determining(train, world).model_dump(mode="json", exclude_none=True)), **inputs}
    own[GLOBAL_BATCH] = own.pop("batch_size")
    before = read_sealed(work / FILE) or {}
    atomic_write(work / FILE, sealed({"settings": own, "world": world}))
    newest = Checkpoints(work / "checkpoints", 1).latest()
    if newest is not None:
        began = before.get("world", world)
        if began == world:
            return None
        return f"resuming at {newest.name} a run of {_ranks(began)} on {_ranks(world)}: equal up to rounding"
    found = [each for folder in sorted(work.parent.glob("*")) if (each := _unfinished(folder, own)) is not None]
    if not found:
        return None
    return _line(min(found, key=lambda each: (len(each.differing), -each.step)), own, train, world)


def _unfinished(folder: Path, own: Mapping[str, Any]) -> _Found | None:
    settings = (read_sealed(folder / FILE) or {}).get("settings")
    newest = Checkpoints(folder / "checkpoints", 1).latest()
    if not isinstance(settings, dict) or newest is None or not (folder / SIDECAR).exists():
        return None
    try:
        state = read_state(newest)
    except ModelError:
        return None
    differing = sorted(key for key in {*settings, *own} if settings.get(key) != own.get(key))
    return _Found(folder, settings, differing, int(state["step"]), float(state["seconds"]))


def _line(found: _Found, own: Mapping[str, Any], train: Train, world: int) -> str:
    named = [_difference(key, found.settings.get(key), own.get(key)) for key in found.differing[:NAMED]]
    more = len(found.differing) - len(named)
    what = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    cost = f"{found.step} steps of training ({found.seconds / 60:.1f} min)"
    line = f"starting at step 0; the unfinished {found.folder} holds {cost}, and differs in {what}"
    if found.differing != [GLOBAL_BATCH]:
        return line
    accumulation, left = divmod(int(found.settings[GLOBAL_BATCH]), train.batch_size * world)
    product = "train.batch_size * train.grad_accumulation * ranks"
    way = f"set train.grad_accumulation to {accumulation}" if not left else f"choose them so that {product} is the same"
    return f"{line} ({product}); to resume it, {way}"


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(here, str) and len(here) > 40:  # a digest says nothing to a reader
        return f"{key}"
    name = key if key == GLOBAL_BATCH else f"train.{key}"
    return f"{name} ({there} there, {here} here)"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"
