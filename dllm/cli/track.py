"""The verb `track sync`: send to MLflow what it has missed."""

import sys
from pathlib import Path

import typer

from dllm.cli.options import Debug, Root
from dllm.tracking.run_journal import FOLDER

app = typer.Typer(help="Bring MLflow up to date with what the stages logged.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Have `sync` stay a verb of its own, though it is the only one."""


@app.command("sync")
def sync(root: Root = Path(), debug: Debug = False) -> None:
    """Send to MLflow what it has missed while it was away, and mark runs as KILLED whose processes are gone."""
    from dllm.tracking.delivery import OWN, synchronize  # MLflow takes 2 seconds to import

    root = root.resolve()
    report = synchronize(root, everything=True)
    for line in report.refused:
        print(f"warning: {line}", file=sys.stderr)
    for store, count in report.elsewhere.items():
        way = "unset MLFLOW_TRACKING_URI" if store == OWN else f"set MLFLOW_TRACKING_URI to {store}"
        print(f"warning: {count} records wait for another store: {way}", file=sys.stderr)
    sent, runs, closed = sum(report.sent.values()), len(report.sent), len(report.closed)
    print(f"track: {sent} records of {runs} runs sent, {closed} runs closed as KILLED ({root / FOLDER})")
