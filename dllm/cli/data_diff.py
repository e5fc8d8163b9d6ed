"""The verb `data diff`: two folders of responses, or those of two git revisions or DVC experiments, side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm.cli import revisions
from dllm.methods.figures import DASH
from dllm.outside import one_line
from dllm.responses.diff import diff

RESPONSES = "out/regenerate"


def print_diff(a: str, b: str, root: Path, as_json: bool) -> None:
    """Print what changed from A to B as a table, or as one JSON object.

    Raises:
        DataError: one is neither a folder of responses nor a revision that has them, or its data is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="dllm-diff-") as scratch:
        older, newer = (_folder(name, root, Path(scratch) / str(number)) for number, name in enumerate((a, b)))
        found = diff(older, newer, Path(scratch))
    if as_json:
        print(json.dumps({"from": a, "to": b, **found}))
    else:
        Console(soft_wrap=True).print(_table(a, b, found))


def _folder(name: str, root: Path, to: Path) -> Path:
    return revisions.folder(name, root, RESPONSES) or revisions.copy(name, root, RESPONSES, to)


def _table(a: str, b: str, found: Mapping[str, Any]) -> Table:
    table = Table(title=f"{RESPONSES}: {a} to {b}", title_justify="left")
    for column in ("", a, b, "change"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    rows, one, other = found["rows"], found["a"], found["b"]
    table.add_row("rows", f"{one['rows']:,}", f"{other['rows']:,}", _change(one["rows"], other["rows"]))
    for name in ("added", "removed", "changed", "same"):
        prompts = found["prompts"].get(name, [])
        label = {"changed": "response changed", "same": "response the same"}.get(name, name)
        share = f" ({rows[name] / one['rows']:.1%})" if name == "changed" and one["rows"] else ""
        table.add_row(f"  {label}", "", ", ".join(prompts), f"{rows[name]:,}{share}")
    table.add_section()
    table.add_row("tokens", f"{one['tokens']:,}", f"{other['tokens']:,}", _change(one["tokens"], other["tokens"]))
    for name in ("mean", "median", "p95", "max"):
        values = one["length"][name], other["length"][name]
        table.add_row(f"  per response, {name}", *map(_number, values), _change(*values))
    for part in ("ends", "flags", "splits"):
        table.add_section()
        for name in sorted({*one[part], *other[part]}):
            values = one[part].get(name, 0), other[part].get(name, 0)
            table.add_row(f"{part.removesuffix('s')} {name}", *map(_number, values), _change(*values))
    table.add_section()
    for key, values in found["settings"].items():
        table.add_row(key, *(one_line(str(value), 60) for value in values), "differs")
    return table


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:,}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == after:
        return ""
    return f"{round(after - before, 2):+,}"
