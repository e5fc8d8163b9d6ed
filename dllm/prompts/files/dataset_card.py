"""Which files of a folder are of which split, as the README.md of a dataset on the hub says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.config.load import read_yaml
from dllm.errors import ConfigError

CARD = "README.md"
_MAX_CHARS = 1 << 18
"""Most characters of a card that are read: its head, which says this, is short."""
_GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|\{[^{}]*\}")


def splits(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the splits of the files that the card assigns, by name; none where there is no card that can be read.

    Raises:
        ConfigError: the card has several configurations with files of their own, and says of none that it is meant.
    """
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
    assigned = []
    for pattern, split in _patterns(head, str(path)):
        with contextlib.suppress(re.error):
            assigned.append((re.compile(_regex(pattern)), split))
    found = {name: next((split for form, split in assigned if form.fullmatch(name)), None) for name in names}
    return {name: each for name, each in found.items() if each}


def _patterns(head: Any, where: str) -> Iterator[tuple[str, str]]:
    """Find patterns of files with their split, in the order of the card."""
    configs = head.get("configs") if isinstance(head, Mapping) else None
    found = [each for each in (configs if isinstance(configs, list) else ()) if isinstance(each, Mapping)]
    found = [each for each in found if each.get("data_files")]
    if len(found) > 1:
        meant = [each for each in found if each.get("default") is True or each.get("config_name") == "default"]
        if not meant:
            named = ", ".join(str(each.get("config_name"))[:40] for each in found[:5])
            hint = "name a file, or the folder of one of them, as the source"
            raise ConfigError(f"{CARD} has several configurations: {named}", where=where, hint=hint)
        found = meant[:1]
    for config in found:
        folder = config.get("data_dir")
        for pattern, split in _entries(config["data_files"]):
            parts = [folder.strip("./") if isinstance(folder, str) else "", pattern.removeprefix("./").rstrip("/")]
            yield "/".join(filter(None, parts)), split


def _entries(files: Any) -> Iterator[tuple[str, str]]:
    """Find patterns with their split in each form of `data_files`; without a name it is `train`, as in `datasets`."""
    if isinstance(files, Mapping):
        files = [{"split": split, "path": paths} for split, paths in files.items()]
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if isinstance(pattern, str) and isinstance(split, str):
                yield pattern, split


def _regex(pattern: str) -> str:
    """Translate a pattern as fsspec reads it: `**` crosses folders, `{a,b}` is either; a folder means all below it."""
    parts, at = [], 0
    for mark in _GLOB.finditer(pattern):
        parts.append(re.escape(pattern[at : mark.start()]))
        at, text = mark.end(), mark[0]
        if text.startswith("{"):
            parts.append(f"(?:{'|'.join(_regex(each).removesuffix('(?:/.*)?') for each in text[1:-1].split(','))})")
        elif text.startswith("["):
            inner = text[1:-1].replace("\\", r"\\").replace("[", r"\[")
            parts.append(f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]")
        else:
            parts.append({"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}[text])
    below = "" if at else "(?:/.*)?"
    return "".join([*parts, re.escape(pattern[at:])]) + below
