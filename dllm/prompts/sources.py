"""Prompt sources: from an entry of `prepare.sources` to rows, each with its place for error messages.

A source's name is a member of `SOURCES` (built in, or of an installed package), else a file or folder, else the id of
a dataset on the Hugging Face hub. `readers` parses the files.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts.readers import SUFFIXES, records
from dllm.registry import SOURCES
from dllm.tracking import provenance

CHAT_COLUMNS = ("messages", "conversations")
TOOLS_COLUMN = "tools"
REFERENCE_COLUMN = "reference"
_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


class SourceRow(NamedTuple):
    """One row, before its chat is parsed."""

    place: str
    """File and line, or what names the row otherwise."""
    chat: Any
    """Turns in OpenAI's or ShareGPT's form, or a bare string, as `turns.parse_chat` takes them."""
    tools: Any = None
    """Schemas of the tools that the assistant may call."""
    reference: Any = None
    """The correct result, where the source knows it."""


class PromptSource(Protocol):
    """A member of `SOURCES`."""

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return the files that are read, in order, each by a name that is unique in this source; may be empty.

        Raises:
            DataError: there is no such source.
        """
        ...

    def identity(self, source: Source) -> dict[str, Any]:
        """Return what determines the rows where no file does: ids, commits, fingerprints; may be empty."""
        ...

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Read the rows, in the same order at every call.

        Raises:
            DataError: a row cannot be read; it names the place.
        """
        ...


def label(source: Source) -> str:
    """Name a source in tables and rows."""
    return source.name if source.subset is None else f"{source.name}:{source.subset}"


def find(source: Source, root: Path) -> PromptSource:
    """Return what reads a source.

    Raises:
        DataError: the name can only be that of a file, and there is none; or it is close to a built-in one.
    """
    if source.name in SOURCES:
        member: PromptSource = SOURCES[source.name]
        return member
    if (root / Path(source.name).expanduser()).exists():
        return FILES
    if source.name.startswith((".", "/", "~")) or source.name.endswith(SUFFIXES) or source.name.count("/") > 1:
        raise DataError("no such file or folder", where=_key(source), hint="paths are relative to the project's folder")
    near = difflib.get_close_matches(source.name.lower().replace("_", ""), list(SOURCES), n=1, cutoff=0.7)
    if near and "/" not in source.name:
        raise DataError("no such source", where=_key(source), hint=f"did you mean {near[0]}?")
    return HUB


def inputs(source: Source, root: Path) -> dict[str, Path]:
    """Return the files a source is read from, by name; see `PromptSource.inputs`."""
    return find(source, root).inputs(source, root)


def identity(source: Source, root: Path) -> dict[str, Any]:
    """Return what determines a source's rows besides its files; see `PromptSource.identity`."""
    return find(source, root).identity(source)


def rows(source: Source, root: Path) -> Iterator[SourceRow]:
    """Read a source's rows in order; see `PromptSource.rows`."""
    return find(source, root).rows(source, root)


def input_digest(source: Source, root: Path) -> str:
    """Hash what a source holds into 64 hex digits: the bytes of its files in order, and its identity.

    Raises:
        DataError: there is no such source.
    """
    marks = [provenance.digest(path) for path in inputs(source, root).values()]
    marks += map(str, identity(source, root).values())
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


class FileSource:
    """A parquet, JSON or JSON Lines file, or all such files of a folder and its subfolders in order of path."""

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """List the files, by their path in the folder."""
        path = root / Path(source.name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and p.name[0] != ".")
            if not found:
                raise DataError(f"no {', '.join(SUFFIXES)} file in the folder", where=_key(source))
            return {file.relative_to(path).as_posix(): file for file in found}
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"cannot read this kind of file, only {', '.join(SUFFIXES)}", where=_key(source))
        return {path.name: path}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return nothing: the files are the identity."""
        return {}

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Read the rows of all files."""
        return _columns((row for path in self.inputs(source, root).values() for row in records(path)), source)


class HubSource:
    """A split of a dataset on the Hugging Face hub."""

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return nothing: the cache of `datasets` is no input of ours."""
        return {}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return the dataset's fingerprint (its files, subset and split determine it) and the commit it is from.

        Raises:
            DataError: the dataset cannot be loaded.
        """
        dataset = _load_dataset(source)
        commit = commit_of(dataset.info.download_checksums or ())
        return {"fingerprint": str(dataset._fingerprint), **({} if commit is None else {"commit": commit})}

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Load the split and read its rows."""
        dataset = _load_dataset(source)
        numbered = ((f"{label(source)} {source.split} row {number}", row) for number, row in enumerate(dataset, 1))
        return _columns(numbered, source)


FILES, HUB = FileSource(), HubSource()


def commit_of(urls: Iterable[str]) -> str | None:
    """Return the commit that a dataset's files were loaded from; None where the files do not come from the hub.

    Args:
        urls: addresses of the files, as `datasets` records them beside their checksums.
    """
    return next((found[1] for url in urls if (found := _COMMIT.match(url))), None)


def _load_dataset(source: Source) -> Any:
    # datasets takes 1.2 seconds to import; sources of files and built-in ones do without it.
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except (DatasetsError, OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(
            f"neither a built-in source ({', '.join(SOURCES)}) nor a file nor a dataset that can be loaded: {reason}",
            where=_key(source),
            hint="check the name, split, subset and revision, and that the Hugging Face hub can be reached",
        ) from None


def _columns(rows: Iterable[tuple[str, Any]], source: Source) -> Iterator[SourceRow]:
    for place, row in rows:
        chat = _chat(row, source.column, place)
        yield SourceRow(place, chat, row.get(TOOLS_COLUMN), row.get(REFERENCE_COLUMN))


def _chat(row: Any, column: str | None, place: str) -> Any:
    if not isinstance(row, dict):
        raise DataError(f"a row is a mapping of columns, got {type(row).__name__}", where=place)
    for name in CHAT_COLUMNS if column is None else (column,):
        if row.get(name) is not None:
            return row[name]
    expected = " nor ".join(CHAT_COLUMNS) if column is None else column
    raise DataError(
        f"no {expected} in the row, only {', '.join(map(str, row)) or 'nothing'}",
        where=place,
        hint="name the chat's column in prepare.sources[].column",
    )


def _key(source: Source) -> str:
    return f"prepare.sources: {source.name}"
