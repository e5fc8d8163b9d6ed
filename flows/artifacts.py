"""What a flow run shows in Prefect: progress bars, then tables of figures and a summary.

Keys are the same in each run, so that Prefect lists them as versions of one artifact.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from dllm.errors import DllmError
from dllm.outside import markdown
from dllm.registry import METHODS
from dllm.secrets import HIDDEN, hide, hide_in
from dllm.stages.records import Records, read_records, trained_method
from dllm.tracking.address import page
from dllm.tracking.execution import ELSEWHERE, REPORT

MLFLOW_TOML = Path(__file__).resolve().parents[1] / "mlflow.toml"
"""Has the address of MLflow while `make ui` runs; see infra/gate.py."""
PICTURE_BYTES = 500_000
"""Larger pictures are not stored in Prefect's database."""

NUMBER = r"(\d+(?:\.\d+)?(?:e\+\d+)?)"
PROGRESS = re.compile(rf"[\w -]+: {NUMBER}/{NUMBER} ")
"""The start of a line that `dllm.progress.Progress` prints where it knows the total."""
UPDATE_EVERY_S = 5.0
"""Each update is a request to the server."""
SILENCE_S = 60.0
"""Pause after a request that the server did not answer, so that a bar does not delay the work."""


class ProgressBar:
    """A progress bar under one key, updated from the progress lines that a child prints; other lines are ignored.

    Args:
        key: lower-case letters, digits and dashes.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._id: UUID | None = None
        self._next = 0.0
        self._latest = ""

    def show(self, line: str) -> None:
        """Update the bar from a line, unless it was updated within UPDATE_EVERY_S."""
        if share(line) is not None:
            self._latest = line
            if time.monotonic() >= self._next:
                self.catch_up()

    def catch_up(self) -> None:
        """Update the bar from the latest line."""
        done = share(self._latest)
        line, self._latest = markdown(self._latest), ""
        if done is None:
            return
        self._next = time.monotonic() + UPDATE_EVERY_S
        try:
            if self._id is None:
                self._id = cast(UUID, create_progress_artifact(done * 100, key=self.key, description=line))
            else:
                update_progress_artifact(self._id, done * 100, description=line)
        except httpx.HTTPError:
            self._next = time.monotonic() + SILENCE_S


def share(line: str) -> float | None:
    """Parse the fraction done, from 0 to 1, from a progress line; None for other lines."""
    found = PROGRESS.match(line)
    if found is None:
        return None
    done, total = map(float, found.groups())
    return min(1.0, done / total) if total else None


def publish(root: Path, is_registered: bool = True) -> str:
    """Write the method's tables, its picture and the text `summary`, and return what came out in one sentence.

    Args:
        root: the folder whose out/ has the records.
        is_registered: whether the checkpoint was registered.
    """
    metrics, runs = read_records(root, "metrics.json"), read_records(root, "run.json")
    if not is_registered:  # those there are of another run
        metrics.pop("register", None)
        runs.pop("register", None)
    method = METHODS[str(trained_method(runs))]
    score = method.score(metrics["evaluate"])
    figure = f"{score.name} {abs(score.value):.3f}"
    registered = metrics.get("register")
    said = str(registered["verdict"]) if registered else f"{figure}, not registered"
    said = said if figure in said else f"{said}, {figure}"
    for table in method.tables(metrics):
        rows = [
            {key: markdown(value) if isinstance(value, str) else value for key, value in hide_in(dict(row)).items()}
            for row in table.rows
        ]
        create_table_artifact(table=rows, key=table.key, description=table.description)
    picture = root / "out" / "evaluate" / "evaluation.png"
    if picture.is_file() and picture.stat().st_size <= PICTURE_BYTES:
        # Prefect takes an address: this one holds the picture, so that a page needs no other server.
        data = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{data}", key="evaluation", description=markdown(said))
    text = f"{markdown(said)}\n\n{summary(method.rows(metrics), registered, runs, _known(root, runs))}"
    create_markdown_artifact(markdown=hide(text), key="summary", description="Main figures of the run.")
    return said


def _known(root: Path, runs: Records) -> set[str] | None:
    from dllm.tracking.mlflow_runs import known_runs  # MLflow takes 2 seconds to import

    with contextlib.suppress(DllmError):  # a store that cannot be used fails no flow
        return known_runs(root, [str(run["mlflow_run_id"]) for run in runs.values()])
    return None


def summary(
    rows: Iterable[tuple[str, str]],
    registered: Mapping[str, Any] | None,
    runs: Records,
    known: Collection[str] | None = None,
) -> str:
    """Format the main figures, the registered version, and links to the MLflow run of each stage.

    Args:
        known: the runs that the store in use has, the only ones to be linked; None links all.
    """
    figures = list(rows)
    if registered:
        aliases = " ".join(f"@{alias}" for alias in registered["aliases"])
        version = f"{registered['model_name']} version {registered['version']} {aliases}"
        figures.append(("registered", version))
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {markdown(label)} | {markdown(str(value))} |" for label, value in figures]
    if "register" in runs and _is_here(runs["register"], known):
        lines += ["", f"[Report]({_link(runs['register'], str(REPORT))}): curves, lineage, sample responses."]
    lines += ["", "| stage | MLflow run | seconds |", "|---|---|---|"]
    for stage, run in runs.items():
        name = markdown(str(run["mlflow_run_id"])[:12])
        link = f"[{name}]({_link(run)})" if _is_here(run, known) else f"{name}, {ELSEWHERE}"
        lines.append(f"| {markdown(stage)} | {link} | {markdown(str(run['seconds']))} |")
    return "\n".join(lines)


def _is_here(run: Mapping[str, Any], known: Collection[str] | None) -> bool:
    return known is None or str(run["mlflow_run_id"]) in known


def _link(run: Mapping[str, Any], artifact: str = "") -> str:
    uri = hide(os.environ.get("MLFLOW_TRACKING_URI", "")).replace(f"{HIDDEN}@", "")
    base = uri.rstrip("/") if uri.startswith("http") else local_ui()
    return page(base, str(run["mlflow_experiment_id"]), str(run["mlflow_run_id"]), artifact)


def local_ui() -> str:
    """Return where `make ui` shows MLflow: the address that it listens at, or will by MLFLOW_PORT."""
    try:
        return str(tomllib.loads(MLFLOW_TOML.read_text())["url"])
    except (OSError, ValueError, KeyError):
        return f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT') or 5000}"
