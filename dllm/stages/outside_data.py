"""Files of prompts outside `data/`: DVC watches that folder alone, so `make run` and flows ask here for changes.

Those of `prepare.sources`, which `prepare` reads, and those of `evaluate.sets`, which `evaluate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dllm.config.params import Params, Source
from dllm.errors import DllmError
from dllm.prompts import sets, sources
from dllm.prompts.protocol import label
from dllm.publishing import RUN
from dllm.stages.records import read_record
from dllm.tracking.provenance import digest

WATCHED = "data"
RECORD = "outside"
"""In run.json of `prepare`: size in bytes and time of change in ns of each of these files."""

NOTE = f"outside {WATCHED}/, where DVC sees no changes: `make run` looks for them, `dvc repro` needs `--force prepare`"


def source_names(params: Params, root: Path) -> list[str]:
    """Name the sources that read such files."""
    return [source.name for source in params.prepare.sources if _unwatched(source, root)]


def files(params: Params, root: Path) -> dict[str, Path]:
    """Return the files that the sources are read from and DVC does not watch, by source and name.

    Raises:
        DataError: there is no such source.
    """
    return {
        f"{label(source)}/{name}": path
        for source in params.prepare.sources
        for name, path in _unwatched(source, root).items()
    }


def stamps(found: Mapping[str, Path]) -> dict[str, list[int]]:
    """Return size in bytes and time of change in ns of each file: where both are as before, it is not read again."""
    return {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in found.items()}


def changed(params: Params, root: Path) -> list[str]:
    """Name the files that `prepare` has read otherwise or not at all, or that are gone; none where it has not run."""
    try:
        made: dict[str, Any] = read_record(root, "prepare", RUN)
        now = files(params, root)
        before, digests = made.get(RECORD, {}), made.get("inputs", {})
        different = [
            name
            for name, stamp in stamps(now).items()
            if before.get(name) != stamp and digests.get(name) != digest(now[name])
        ]
        return sorted({*different, *(before.keys() - now.keys())})
    except (DllmError, OSError):
        return []  # a whole source is gone: who has pulled the results needs none, and the stage names it when it runs


def changed_sets(params: Params, root: Path) -> list[str]:
    """Name the sets whose files `evaluate` has read otherwise; none where it has not run."""
    try:
        made = read_record(root, "evaluate", RUN)["identity"]
        keys = {set_key(number, entry): entry for number, entry in enumerate(params.evaluate.sets or [])}
        known = {key: entry for key, entry in keys.items() if key in made and _unwatched(entry, root, sets.find)}
        return [entry.name for key, entry in known.items() if sets.identity(entry, root) != made[key]]
    except (DllmError, OSError, KeyError, TypeError):
        return []


def set_key(number: int, entry: Source) -> str:
    """Name a set among what determines an evaluation."""
    return f"set {number} {entry.name}"


def _unwatched(source: Source, root: Path, find: Callable[[Source, Path], Any] = sources.find) -> dict[str, Path]:
    if find(source, root) is not sources.FILES:  # built in, or from the hub at a commit
        return {}
    watched = (root / WATCHED).resolve()
    found = sources.FILES.inputs(source, root)
    return {name: path for name, path in found.items() if not path.resolve().is_relative_to(watched)}
