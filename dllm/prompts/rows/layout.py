"""Which column of a row holds its chat, which its split, and what is said of rows that have none or several."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts.chats.cells import CHATS
from dllm.prompts.files import folder
from dllm.prompts.rows.reading import UnusedColumn

SPLIT = "split"


def filled(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of the columns that holds something, else the first that is not null."""
    given = [name for name in names if row[name] is not None]
    return next((name for name in given if row[name] not in ([], "")), given[0] if given else None)


def missing(row: Mapping[str, Any], names: Sequence[str], place: str) -> DataError:
    """Return the error for a row without the chat's column."""
    # Spaces around a name would not be seen.
    columns = [one_line(name if name == name.strip() else repr(name), 60) for name in map(str, row)]
    shown = ", ".join(columns[:20]) + (" ..." if len(columns) > 20 else "")
    hint = "name the chat's column in prepare.sources[].column"
    if "instruction" in columns and names == CHATS:
        hint += ": instruction, to which input is joined"
    elif near := _near(names, columns):
        hint = f"did you mean {near}? {hint}"
    return DataError(f"no {' nor '.join(names)} in the row, only {shown or 'nothing'}", where=place, hint=hint)


def _near(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the column that is likely meant: of the usual names message_id is not."""
    cutoff = 0.6 if len(names) == 1 else 0.8
    folded = {column.lower(): column for column in columns}
    found = (difflib.get_close_matches(name.lower(), folded, 1, cutoff) for name in names)
    return next((folded[near[0]] for near in found if near), None)


def check_splits(row: Mapping[str, Any], seen: set[str | None], source: Source, place: str) -> None:
    """Refuse rows for evaluation among rows for training, as a column `split` tells them apart.

    Raises:
        UnusedColumn: rows of both were seen.
    """
    seen.add(folder.meaning_of(row.get(SPLIT)))
    others = sorted(seen & {"validation", "test"}, key=str)
    if others and folder.TRAIN in seen and SPLIT not in (source.ignore_columns or ()):
        what = f"the column {SPLIT} has rows of {folder.TRAIN} and of {others[0]}, and is not used"
        hint = f"keep the rows of one in the file, or name {SPLIT} in prepare.sources[].ignore_columns to take all"
        raise UnusedColumn(what, where=place, hint=hint)


def refuse_wrapper(row: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """Refuse a document whose rows lie in a list inside, of which each file has one.

    Raises:
        DataError: the row holds rows, or whole columns.
    """
    if _is_by_pandas(row, names):
        hint = "write it with orient='records', lines=True"
        raise DataError(
            "the file is one object that holds whole columns, as pandas' to_json writes", where=place, hint=hint
        )
    lists = [] if any(name in row for name in names) else _lists_of_rows(row, names)
    if lists:
        shown = ", ".join(one_line(name, 40) for name in lists[:5])
        hint = f"`jq -c '.{lists[0]}[]'` writes them an object a line"
        raise DataError(f"the file is one object, with rows in {shown}", where=place, hint=hint)


def _lists_of_rows(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        str(key)
        for key, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and any(name in value[0] for name in names)
    ]


def _is_by_pandas(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Return whether a row is a table as pandas writes it by columns, by index, or in parts."""
    by_number = [row, *(row[name] for name in names if isinstance(row.get(name), dict))]
    are_numbers = [bool(each) and all(str(key).isdigit() for key in each) for each in by_number]
    return {"columns", "index", "data"} <= set(row) or any(are_numbers)


def is_about_others(row: Any, column: str | None) -> bool:
    """Return whether the one row of a .json file describes the files beside it."""
    names = [name for name in (column, *CHATS) if name is not None]
    return isinstance(row, dict) and not any(name in row for name in names) and not _lists_of_rows(row, names)
