"""Which files of a folder are of which split, as the README.md of a dataset on the hub says."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.config.load import read_yaml

CARD = "README.md"
_MAX_CHARS = 1 << 18
"""Most characters of a card that are read: its head, which says this, is short."""


def splits(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the splits of the files that the card assigns, by name; none where there is no card that can be read."""
    try:
        with (path / CARD).open(encoding="utf-8") as file:
            begin, _, rest = file.read(_MAX_CHARS).partition("---\n")
    except (OSError, UnicodeDecodeError):
        return {}
    if begin.strip("\ufeff \n"):
        return {}
    try:
        head = read_yaml(rest.partition("\n---")[0])
    except ValueError:
        return {}
    assigned = list(_patterns(head))
    return {
        name: split
        for name in names
        if (split := next((split for pattern, split in assigned if fnmatch.fnmatchcase(name, pattern)), None))
    }


def _patterns(head: Any) -> Iterator[tuple[str, str]]:
    """Find patterns of files with their split, in the order of the card."""
    configs = head.get("configs") if isinstance(head, Mapping) else None
    for config in configs if isinstance(configs, list) else ():
        entries = config.get("data_files") if isinstance(config, Mapping) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and isinstance(entry.get("split"), str):
                paths = entry.get("path")
                for pattern in paths if isinstance(paths, list) else [paths]:
                    if isinstance(pattern, str):
                        yield pattern.removeprefix("./"), entry["split"]
