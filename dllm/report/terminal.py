"""The table at the end of a run, from the records that the stages left under out/.

Owns the layout; computes no figure. A figure that a stage did not leave shows as a dash.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.methods import figures
from dllm.methods.figures import DASH, number
from dllm.report import facts
from dllm.stages import STAGES
from dllm.stages.records import Records

WIDTH = 100
"""Columns of the table; a wider terminal leaves the rest empty."""


def print_report(root: Path, console: Console | None = None) -> None:
    """Print the figures of every finished stage under `root/out`.

    Raises:
        StageError: no stage has finished yet.
        DataError: a record is not JSON.
    """
    metrics, runs = facts.records(root)
    console = console or Console()
    # Rich takes 80 columns where there is no terminal, such as in a pipe.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(_report(f"dllm: {facts.recipe(runs, root)}", metrics, runs, root))


def _report(title: str, metrics: Records, runs: Records, root: Path) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", width=WIDTH)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", overflow="fold")
    method = facts.method(runs)
    shown = method.rows(metrics) if method else ()
    for part in (facts.data(metrics), shown, [*facts.registered(metrics), *facts.places(root)]):
        for label, value in part:
            table.add_row(label, value)
        table.add_section()
    for found in method.tables(metrics) if method else ():
        table.add_row(found.title, _inner(found))
        table.add_section()
    table.add_row("stages", _stages(runs))
    return table


def _inner(found: figures.Table) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    first, *others = found.rows[0]
    table.add_column(first, justify="right" if isinstance(found.rows[0][first], int) else "left", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    if found.bar:
        table.add_column("", no_wrap=True)
    for row in found.rows:
        cells = [number(row[name], found.digits[name]) if name in found.digits else str(row[name]) for name in row]
        bar = ["█" * round(20 * (row[found.bar] or 0))] if found.bar else []
        table.add_row(*cells, *bar)
    return table


def _stages(runs: Records) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("MLflow run", no_wrap=True)
    table.add_column("commit", no_wrap=True)
    for stage in STAGES:
        run = runs.get(stage, {})
        git = run.get("git") or {}
        commit = (git.get("commit") or DASH)[:8] + (" + edits" if git.get("dirty") else "")
        table.add_row(stage, number(run.get("seconds"), 1), str(run.get("mlflow_run_id") or DASH)[:12], commit)
    total = sum(run.get("seconds") or 0 for run in runs.values())
    table.add_row("all", number(total, 1), "", "")
    return table
