"""A source of rows with columns: which of a row's columns hold its prompt, and what is said of rows without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts.chats.cells import CHATS
from dllm.prompts.chats.tools import shape
from dllm.prompts.chats.turns import Unusable
from dllm.prompts.files.readers import BadRow, Record
from dllm.prompts.protocol import SourceRow
from dllm.prompts.rows import layout
from dllm.prompts.rows.reading import Reading, UnusedColumn, read_row

GIVE_UP_ROWS = 1000
"""Rows without the chat's column after which a source is refused."""


class TableSource:
    """A source of rows with columns, one of which is the chat."""

    options = frozenset({"column", "ignore_columns"})

    def records(self, source: Source, root: Path, reading: Reading) -> Iterator[Record]:
        """Read the rows, each with its place."""
        raise NotImplementedError

    def rows(self, source: Source, root: Path, reading: Reading | None = None) -> Iterator[SourceRow]:
        """Read the rows' prompts; `reading` records what became of columns and files."""
        reading = Reading() if reading is None else reading
        return _prompts(self.records(source, root, reading), source, reading)


def _prompts(rows: Iterable[Record], source: Source, reading: Reading) -> Iterator[SourceRow]:
    """Read a prompt out of each row; what cannot be read is a BadRow.

    Raises:
        DataError: no row has the chat's column.
        UnusedColumn: a column belongs to the prompts, and cannot be used.
    """
    names = CHATS if source.column is None else (source.column,)
    without: DataError | None = None
    is_found = False
    splits: set[str | None] = set()
    for number, (place, row) in enumerate(rows, 1):
        if isinstance(row, BadRow):
            yield SourceRow(place, row)
            continue
        if not isinstance(row, dict):
            yield SourceRow(place, BadRow(f"a row is a mapping of columns, got {shape(row)}"))
            continue
        there = [name for name in names if name in row]
        if not (is_found and there):
            layout.refuse_wrapper(row, names, place)
        is_found = is_found or bool(there)
        if not there:
            without = without or layout.missing(row, names, place)
            if not is_found and number >= GIVE_UP_ROWS:
                raise without
            yield SourceRow(place, BadRow(without.message))
            continue
        column = layout.filled(row, there)
        if column is None:
            yield SourceRow(place, BadRow(f"{there[0]} is null"))
            continue
        layout.check_splits(row, splits, source, place)
        try:
            yield SourceRow(place, *read_row(row, column, source, place, reading))
        except Unusable as reason:
            yield SourceRow(place, reason)
        except UnusedColumn:
            raise
        except DataError as error:
            yield SourceRow(place, BadRow(error.message))
    if without is not None and not is_found:
        raise without
