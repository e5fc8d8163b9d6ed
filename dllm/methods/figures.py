"""Figures as text: the rows and tables that a method gives to the report and to Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DASH = "–"
"""Shown in place of a figure that is not there."""
Row = tuple[str, str]
"""A label and a formatted value."""
Points = Sequence[tuple[float, float | None, str]]
"""Points of a plot: x, y, and the line that it is on."""
Records = Mapping[str, Mapping[str, Any]]
"""The metrics.json of each finished stage, by the name of the stage."""


@dataclass(frozen=True)
class Table:
    """A table of figures: every row has the same columns.

    Args:
        key: lower-case letters and dashes; names the table in Prefect.
        title: a few words.
        description: one sentence.
        rows: column name to value; None where there is none.
        digits: decimals of the columns that hold fractions.
        bar: the column, of values from 0 to 1, that is also drawn as a bar.
    """

    key: str
    title: str
    description: str
    rows: Sequence[Mapping[str, Any]]
    digits: Mapping[str, int] = field(default_factory=dict)
    bar: str | None = None


def by_number(record: Mapping[str, Any]) -> dict[str, Any]:
    """Order a record by its keys, which are numbers: JSON files are written in the order of their digits."""
    return dict(sorted(record.items(), key=lambda item: int(item[0])))


def count(value: Any) -> str:
    """Format an integer with commas; a dash for anything else."""
    return f"{value:,}" if isinstance(value, int) else DASH


def number(value: Any, digits: int) -> str:
    """Format a number with so many decimals; a dash for anything else."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else DASH
