"""Prompt sources: from an entry of `prepare.sources` to rows, each with its place for error messages.

A source's name is a member of `SOURCES` (built in, or of an installed package), else a file or folder, else the id of
a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.prompts.file_source import FileSource
from dllm.prompts.files.readers import kind_of
from dllm.prompts.hub_source import HubSource
from dllm.prompts.protocol import OPTIONS, PromptSource, SourceRow, key_of, path_of
from dllm.prompts.rows.reading import Reading
from dllm.prompts.rows.source import TableSource
from dllm.registry import SOURCES
from dllm.tracking import provenance

FILES, HUB = FileSource(), HubSource()
_PATTERN = re.compile(r"[*?\[{]")
_HUB_PATH = re.compile(r"(?:(?:www\.)?(?:huggingface|hf)\.co/)?datasets/[^/]+/")


def find(source: Source, root: Path) -> PromptSource:
    """Return what reads a source.

    Raises:
        DataError: the name can only be that of a file, and there is none; or it is close to a built-in one.
    """
    if source.name in SOURCES:
        member: PromptSource = SOURCES[source.name]
        return checked(member, source, "a built-in source")
    if path_of(source, root).exists():
        return checked(FILES, source, "files")
    if "://" in source.name:
        hint = "name a file, a folder, or a dataset of the Hugging Face hub as OWNER/NAME"
        raise DataError("an address is not read", where=key_of(source), hint=hint)
    if _PATTERN.search(source.name):
        hint = "name the folder, whose files are all read, or each file as a source of its own"
        raise DataError("no such file, and patterns are not read", where=key_of(source), hint=hint)
    if _HUB_PATH.match(source.name):
        raise DataError("no such folder", where=key_of(source), hint="a dataset of the hub is named OWNER/NAME")
    if source.name.startswith((".", "/", "~")) or kind_of(source.name) is not None or source.name.count("/") > 1:
        raise DataError(
            "no such file or folder", where=key_of(source), hint="paths are relative to the project's folder"
        )
    near = difflib.get_close_matches(source.name.lower().replace("_", ""), list(SOURCES), n=1, cutoff=0.7)
    if near and "/" not in source.name:
        raise DataError("no such source", where=key_of(source), hint=f"did you mean {near[0]}?")
    return checked(HUB, source, "a dataset of the hub")


def checked(found: PromptSource, source: Source, what: str) -> PromptSource:
    """Refuse options that would have no effect; a source without `options` takes all.

    Raises:
        ConfigError: there is one.
    """
    options = getattr(found, "options", frozenset(OPTIONS))
    for name in sorted(OPTIONS - options):
        value = getattr(source, name)
        if value != type(source).model_fields[name].default:
            hint = f"leave prepare.sources[].{name} out"
            raise ConfigError(f"{name} {value!r} does not apply to {what}", where=key_of(source), hint=hint)
    return found


def inputs(source: Source, root: Path) -> dict[str, Path]:
    """Return the files a source is read from, by name; see `PromptSource.inputs`."""
    return find(source, root).inputs(source, root)


def identity(source: Source, root: Path) -> dict[str, Any]:
    """Return what determines a source's rows besides its files; see `PromptSource.identity`."""
    return find(source, root).identity(source)


def rows(
    source: Source, root: Path, reading: Reading | None = None, found: PromptSource | None = None
) -> Iterator[SourceRow]:
    """Read a source's rows in order; see `PromptSource.rows`.

    Args:
        reading: records what became of columns and files, where the source has any.
        found: what reads the source, where it is known.
    """
    found = find(source, root) if found is None else found
    return found.rows(source, root, reading) if isinstance(found, TableSource) else found.rows(source, root)


def input_digest(source: Source, root: Path) -> str:
    """Hash what a source holds into 64 hex digits: the bytes of its files in order, and its identity.

    Raises:
        DataError: there is no such source.
    """
    marks = [provenance.digest(path) for path in inputs(source, root).values()]
    marks += map(str, identity(source, root).values())
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()
