"""What a prompt source is: files or an identity, and rows, each with its place for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dllm.config.params import Source

SPLIT = str(Source.model_fields["split"].default)
OPTIONS = frozenset({"split", "subset", "revision", "column", "ignore_columns", "size", "seed"})
"""Options of a source that not every kind of source has."""


class SourceRow(NamedTuple):
    """One row, before its chat is parsed."""

    place: str
    """File and line, or what names the row otherwise."""
    chat: Any
    """Turns in OpenAI's or ShareGPT's form, or a bare string, as `turns.parse_chat` takes them; a BadRow or `Unusable`
    where the row has no prompt."""
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


def path_of(source: Source, root: Path) -> Path:
    """Return the path that a source's name is, where it is one; a name such as `~old.jsonl` is no user's folder."""
    try:
        return root / Path(source.name).expanduser()
    except RuntimeError:
        return root / source.name


def key_of(source: Source) -> str:
    """Name a source's entry in params.yaml, for error messages."""
    return f"prepare.sources: {source.name}"
