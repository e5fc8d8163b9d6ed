"""Several runs side by side: their figures in the terminal, and a page with their curves over one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.report import page


def compare(runs: Sequence[page.Run], to: Path, console: Console | None = None) -> None:
    """Print the figures of runs side by side, and write the page.

    Args:
        runs: the first is what others are compared with; their labels differ.
        to: the page.
        console: where to print.
    """
    table = Table(show_edge=False, title_justify="left")
    table.add_column("figure", no_wrap=True)
    for run in runs:
        table.add_column(run.label, overflow="fold")
    for label, values in page.beside([run.rows() for run in runs]):
        same = len(set(values)) == 1
        table.add_row(label, *values, style="dim" if same else None)
    (console or Console()).print(table)
    page.write(runs, to, " against ".join(run.label for run in runs))


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with as many parents as it takes to tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole), default=0) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts[-1:])} ({number})" for number, parts in enumerate(whole, 1)]
