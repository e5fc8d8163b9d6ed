"""The report of a run, or of several side by side, as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dllm import __version__
from dllm.files import atomic_write
from dllm.methods.figures import DASH, Table, number
from dllm.outside import visible
from dllm.prompts.files.arrow import read_table
from dllm.report import drawings, facts
from dllm.secrets import hide
from dllm.stages import STAGES
from dllm.stages.records import Records
from dllm.training.journal import read as read_training

FILE = Path("out", "report", "index.html")
SAMPLES = 6
WORST = 8


@dataclass(frozen=True)
class Run:
    """What the stages of one run left under its out/.

    Args:
        label: names it beside others.
        root: the folder that holds its out/.
    """

    label: str
    root: Path
    metrics: Records
    runs: Records

    @classmethod
    def read(cls, root: Path, label: str = "") -> Run:
        """Read the records of a run.

        Raises:
            StageError: no stage has finished there.
            DataError: a record is not JSON.
        """
        metrics, runs = facts.records(root)
        return cls(label or facts.recipe(runs, root), root, metrics, runs)

    def rows(self) -> list[tuple[str, str]]:
        """Return the labels and values of its figures."""
        method = facts.method(self.runs)
        parts = (facts.data(self.metrics), method.rows(self.metrics) if method else (), facts.registered(self.metrics))
        return [row for part in parts for row in part]

    def tables(self) -> list[Table]:
        """Return the tables of its method."""
        method = facts.method(self.runs)
        return list(method.tables(self.metrics)) if method else []


def write(runs: Sequence[Run], path: Path, title: str) -> None:
    """Write the page of one run, or of several side by side."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.finalize = lambda value: visible(value) if type(value) is str else value
    page = environment.get_template("page.html").render(
        title=title,
        version=__version__,
        runs=runs,
        figures=beside([run.rows() for run in runs]),
        drawings=[drawing for drawing in _drawings(runs) if drawing],
        tables=[(run, table) for run in runs for table in run.tables()],
        cell=_cell,
        lineage=[(run, _lineage(run)) for run in runs],
        samples=[(run, _samples(run.root)) for run in runs],
        worst=[(run, _worst(run.root)) for run in runs],
        params=[(run, _params(run.root)) for run in runs],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, hide(page).encode(errors="replace"))


def write_report(root: Path) -> Path:
    """Write the page of the run that `root/out` holds, and return its path.

    Raises:
        StageError: no stage has finished there.
        DataError: a record is not JSON.
    """
    run, path = Run.read(root), root / FILE
    write([run], path, f"dllm: {run.label}")
    return path


def beside(columns: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, list[str]]]:
    """Join the rows of several runs by their labels, in the order of the first; a dash where a run has none."""
    known = [dict(column) for column in columns]
    labels = dict.fromkeys(label for column in columns for label, _ in column)
    return [(label, [values.get(label, DASH) for values in known]) for label in labels]


def _drawings(runs: Sequence[Run]) -> list[str]:
    alone = len(runs) == 1
    records = {
        "" if alone else run.label: read_training(file)
        for run in runs
        if (file := run.root / "out" / "train" / "training.jsonl").is_file()
    }
    accepted: dict[str, list[drawings.Series]] = {"acceptance_by_offset": [], "conditional_acceptance_by_offset": []}
    for run in runs:
        found = run.metrics.get("evaluate", {})
        found = found.get("walked") or found
        for name, series in accepted.items():
            points = [(k, value) for k, value in enumerate(found.get(name) or [], 1) if value is not None]
            series.append(drawings.Series(run.label, points))
    titles = ("Accepted, by offset in the block", "Accepted, given that all before it were")
    return [
        *(
            drawings.lines(title, "offset (draft tokens after the anchor)", series, percent=True)
            for title, series in zip(titles, accepted.values(), strict=True)
        ),
        *drawings.training(records),
    ]


def _cell(table: Table, name: str, value: Any) -> str:
    return number(value, table.digits[name]) if name in table.digits else DASH if value is None else str(value)


def _lineage(run: Run) -> list[Mapping[str, str]]:
    """Return, for each stage, what it read, what it wrote and from which code."""
    rows: list[Mapping[str, str]] = []
    for stage in STAGES:
        record = run.runs.get(stage, {})
        git = record.get("git") or {}
        inputs = (f"{name} {str(digest)[:12]}" for name, digest in (record.get("inputs") or {}).items())
        rows.append(
            {
                "stage": stage,
                "read": ", ".join(inputs) or DASH,
                "files written": str(len(record.get("outputs") or {}) or DASH),
                "fingerprint": str(record.get("fingerprint") or DASH),
                "commit": (git.get("commit") or DASH)[:8] + (" + edits" if git.get("dirty") else ""),
                "MLflow run": str(record.get("mlflow_run_id") or DASH)[:12],
                "started": str(record.get("started") or DASH).replace("T", " ")[:19],
                "seconds": number(record.get("seconds"), 1),
            }
        )
    return rows


def _samples(root: Path) -> list[Mapping[str, Any]]:
    try:
        found = json.loads((root / "out" / "evaluate" / "samples.json").read_text(encoding="utf-8"))["samples"]
        return list(found[:SAMPLES])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _worst(root: Path) -> list[Mapping[str, str]]:
    """Return the prompts with the shortest acceptance length."""
    path = root / "out" / "evaluate" / "prompts.parquet"
    rows = read_table(path).to_pylist() if path.is_file() else []
    worst = sorted((row for row in rows if row.get("tau") is not None), key=lambda row: row["tau"])[:WORST]
    keep = ("prompt_id", "source", "tokens", "rounds", "tau")
    return [{k: number(row[k], 2) if k == "tau" else str(row[k]) for k in keep if k in row} for row in worst]


def _params(root: Path) -> str:
    path = root / "params.yaml"
    return path.read_text(errors="replace") if path.is_file() else ""
