"""The table at the end of a run, from the records that the stages left under out/.

Owns the layout; computes no figure. A figure that a stage did not leave shows as a dash.
"""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.errors import StageError
from dllm.methods import figures
from dllm.methods.figures import DASH, Row, count, number
from dllm.methods.method import Method
from dllm.registry import METHODS
from dllm.stages import STAGES
from dllm.stages.records import Records, read_records, trained_method

WIDTH = 100
"""Columns of the table; a wider terminal leaves the rest empty."""


def print_report(root: Path, console: Console | None = None) -> None:
    """Print the figures of every finished stage under `root/out`.

    Raises:
        StageError: no stage has finished yet.
        DataError: a record is not JSON.
    """
    metrics, runs = read_records(root, "metrics.json"), read_records(root, "run.json")
    if not metrics:
        raise StageError("no stage has run yet", where=str(root / "out"), hint="start with `make run` or `dvc repro`")
    console = console or Console()
    # Rich takes 80 columns where there is no terminal, such as in a pipe.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    recipe = next((run["recipe"] for run in runs.values() if "recipe" in run), root.name)
    console.print(_report(f"dllm: {recipe}", metrics, runs, root))


def _report(title: str, metrics: Records, runs: Records, root: Path) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", width=WIDTH)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", overflow="fold")
    name = trained_method(runs) or ""  # runs of older versions do not name theirs
    method: Method | None = METHODS[name] if name in METHODS else None  # noqa: SIM401 (a registry has no get)
    for part in (_data(metrics), method.rows(metrics) if method else (), _places(metrics, root)):
        for label, value in part:
            table.add_row(label, value)
        table.add_section()
    for found in method.tables(metrics) if method else ():
        table.add_row(found.title, _inner(found))
        table.add_section()
    table.add_row("stages", _stages(runs))
    return table


def _data(metrics: Records) -> Iterator[Row]:
    found, trained = metrics.get("regenerate", {}), metrics.get("train", {})
    yield "prompts regenerated", f"{count(found.get('prompts'))} ({count(found.get('rows'))} responses)"
    yield "tokens regenerated", count(found.get("tokens"))
    cut = found.get("cut_share")
    lengths = f"{number(found.get('tokens_per_response'), 1)}, {DASH if cut is None else f'{cut:.0%}'} cut by the limit"
    yield "tokens per response", lengths
    yield "optimizer steps", f"{count(trained.get('steps'))} (best at {count(trained.get('best_step'))})"


def _places(metrics: Records, root: Path) -> Iterator[Row]:
    found = metrics.get("register", {})
    name, version = found.get("model_name"), found.get("version")
    aliases = ", ".join(f"@{alias}" for alias in found.get("aliases", []))
    yield "registered", f"{name} version {version} {aliases}" if version else DASH
    yield "champion?", found.get("verdict") or DASH
    plots = sorted(path.relative_to(root) for stage in STAGES for path in (root / "out" / stage).glob("*.png"))
    yield "plots", ", ".join(map(str, plots)) or DASH
    yield "more", "`make ui` opens MLflow (runs, models) and Prefect (flows)"
    yield "in a shell", "`. infra/env.sh` puts its python, dvc and prefect on the path"


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
