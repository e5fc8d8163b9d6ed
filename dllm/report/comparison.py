"""Several runs side by side: their figures in the terminal, and a page with their curves over one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.errors import ConfigError
from dllm.report import page

MOST = 6
"""Runs in one comparison; more columns are not legible."""


def compare(folders: Sequence[Path], to: Path, console: Console | None = None) -> None:
    """Print the figures of runs side by side, and write the page.

    Args:
        folders: each holds the out/ of a run; the first is what others are compared with.
        to: the page.
        console: where to print.

    Raises:
        ConfigError: fewer than two folders, or too many.
        StageError: a folder holds no finished stage.
        DataError: a record is not JSON.
    """
    if not 2 <= len(folders) <= MOST:
        raise ConfigError(f"compare takes 2 to {MOST} runs, got {len(folders)}", hint="name the folders that hold out/")
    runs = [page.Run.read(folder.resolve(), label) for folder, label in zip(folders, _labels(folders), strict=True)]
    table = Table(show_edge=False, title_justify="left")
    table.add_column("figure")
    for run in runs:
        table.add_column(run.label, overflow="fold")
    for label, values in page.beside([run.rows() for run in runs]):
        same = len(set(values)) == 1
        table.add_row(label, *values, style="dim" if same else None)
    (console or Console()).print(table)
    page.write(runs, to, " against ".join(run.label for run in runs))
    print(f"compare: {to}")


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parents as it takes to tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts[-1:])} ({number})" for number, parts in enumerate(whole, 1)]
