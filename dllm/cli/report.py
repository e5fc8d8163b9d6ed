"""The table at the end of a run, from the records the stages left under out/.

Owns how the figures are shown; computes none of them. A figure a stage did not leave shows as a dash.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import DataError, StageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ORDER = ("prepare", "regenerate", "train", "evaluate", "register")
WIDTH = 100
"""Columns a table may take; a wider terminal leaves the rest empty."""
DASH = "–"
Records = dict[str, dict[str, Any]]
Lines = Iterator[tuple[str, str]]


def print_report(root: Path, console: "Console | None" = None) -> None:
    """Print what every finished stage under `root/out` found.

    Raises:
        StageError: no stage has finished yet.
        DataError: a record is not JSON.
    """
    from rich.console import Console

    metrics, runs = read_records(root, "metrics.json"), read_records(root, "run.json")
    if not metrics:
        raise StageError("no stage has run yet", where=str(root / "out"), hint="start with `make run` or `dvc repro`")
    console = console or Console()
    # Rich takes 80 columns where there is no terminal, such as in a pipe.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    recipe = next((run["recipe"] for run in runs.values() if "recipe" in run), root.name)
    console.print(_table(f"dllm: {recipe}", metrics, runs, root))


def read_records(root: Path, file: str) -> Records:
    """Read one file, metrics.json or run.json, of each stage that left it.

    Raises:
        DataError: the file is not a JSON object.
    """
    found = {}
    for stage in ORDER:
        path = root / "out" / stage / file
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError("not a JSON object", where=str(path), hint=f"run the stage again: `dvc repro -sf {stage}`")
        found[stage] = record
    return found


def _table(title: str, metrics: Records, runs: Records, root: Path) -> "Table":
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left", width=WIDTH)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", overflow="fold")
    for part in (_data(metrics), _training(metrics), _decoding(metrics), _places(metrics, root)):
        for name, value in part:
            table.add_row(name, value)
        table.add_section()
    if offsets := _curve(metrics):
        table.add_row("by offset in the block", _curve_table(offsets))
        table.add_section()
    if ways := metrics.get("evaluate", {}).get("decodings"):
        table.add_row("held-out, share right", _ways_table(ways))
        table.add_section()
    table.add_row("stages", _stages(runs))
    return table


def _data(metrics: Records) -> Lines:
    found = metrics.get("regenerate", {})
    yield "prompts regenerated", f"{_count(found.get('prompts'))} ({_count(found.get('rows'))} answers)"
    yield "tokens regenerated", _count(found.get("tokens"))


def _training(metrics: Records) -> Lines:
    found = metrics.get("train", {})
    is_draft = "params" not in found
    name, size = ("draft parameters", "draft_params") if is_draft else ("parameters", "params")
    yield name, _count(found.get(size))
    yield "optimizer steps", f"{_count(found.get('steps'))} (best at {_count(found.get('best_step'))})"
    if is_draft:
        yield "draft_acc, held-out text", _number(found.get("val_draft_acc"), 3)
    else:
        yield "masked_acc, held-out text", _number(found.get("val_masked_acc"), 3)


def _decoding(metrics: Records) -> Lines:
    found = metrics.get("evaluate", {})
    if "nelbo" in found:
        yield from _diffusion(found)
        return
    yield "τ micro, held-out prompts", _number(found.get("tau_micro"), 2)
    yield "τ macro, held-out prompts", _number(found.get("tau_macro"), 2)
    yield "tokens/s autoregressive", _number(found.get("tokens_per_s_ar"), 1)
    yield "tokens/s speculative", _number(found.get("tokens_per_s_spec"), 1)
    yield "speculative / autoregressive", f"{_number(found.get('speedup'), 2)} ×"
    same = found.get("greedy_identical")
    yield "same ids as greedy, float32", DASH if same is None else "yes" if same is True else f"NO ({same})"


def _diffusion(found: dict[str, Any]) -> Lines:
    yield "bound on held-out answers", f"{_number(found['nelbo'], 4)} ± {_number(found['nelbo_se'], 4)} nats a token"
    if "ar_nll" in found:
        yield "autoregressive, same weights", f"{_number(found['ar_nll'], 4)} nats a token"


def _places(metrics: Records, root: Path) -> Lines:
    found = metrics.get("register", {})
    name, version = found.get("model_name"), found.get("version")
    aliases = ", ".join(f"@{alias}" for alias in found.get("aliases", []))
    yield "registered", f"{name} version {version} {aliases}" if version else DASH
    yield "champion?", found.get("verdict") or DASH
    plots = sorted(path.relative_to(root) for stage in ORDER for path in (root / "out" / stage).glob("*.png"))
    yield "plots", ", ".join(map(str, plots)) or DASH
    yield "look closer", "`make ui` opens MLflow (runs, models) and Prefect (flows)"


def _curve(metrics: Records) -> list[tuple[Any, Any, Any]]:
    """Line up, by offset, guesses on text and in decoding; None where a stage left none."""
    train, evaluate = metrics.get("train", {}), metrics.get("evaluate", {})
    reached = evaluate.get("acceptance_by_offset") or []
    given = evaluate.get("conditional_acceptance_by_offset") or []
    guessed: list[Any] = []
    while (figure := train.get(f"val_draft_acc_k{len(guessed) + 1}")) is not None:
        guessed.append(figure)
    length = max(len(guessed), len(reached), len(given))
    padded = [[*column, *[None] * (length - len(column))] for column in (guessed, given, reached)]
    return list(zip(*padded, strict=True))


def _curve_table(offsets: list[tuple[Any, Any, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("k", "draft_acc_k", "accepted given k-1", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for offset, (guessed, given, reached) in enumerate(offsets, start=1):
        bar = "█" * round(20 * (reached or 0))
        table.add_row(str(offset), _number(guessed, 3), _number(given, 3), _number(reached, 3), bar)
    return table


def _ways_table(ways: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("way", no_wrap=True)
    columns = {
        "words_exact": ("words", 3),
        "answers_exact": ("answers", 3),
        "answers_right": ("final answer", 3),
        "tokens_per_pass": ("tokens a pass", 2),
        "tokens_per_s": ("tokens/s", 1),
    }
    if all(way.get("answers_right") is None for way in ways):  # no source knows its right answers
        del columns["answers_right"]
    for name, _ in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for way in ways:
        table.add_row(way["way"], *(_number(way.get(key), digits) for key, (_, digits) in columns.items()))
    return table


def _stages(runs: Records) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("MLflow run", no_wrap=True)
    table.add_column("commit", no_wrap=True)
    for stage in ORDER:
        run = runs.get(stage, {})
        git = run.get("git") or {}
        commit = (git.get("commit") or DASH)[:8] + (" + edits" if git.get("dirty") else "")
        table.add_row(stage, _number(run.get("seconds"), 1), str(run.get("mlflow_run_id") or DASH)[:12], commit)
    total = sum(run.get("seconds") or 0 for run in runs.values())
    table.add_row("all", _number(total, 1), "", "")
    return table


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else DASH


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else DASH
