"""What a flow run shows in Prefect: bars while it works, then the acceptance curve and a summary.

Keys stay the same from run to run, so that Prefect lists them as versions of one thing.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

STAGES = ("prepare", "regenerate", "train", "evaluate", "register")
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` opens MLflow when no server is named."""
DRAFT_FIGURES = ("tau_micro", "tau_macro", "speedup", "tokens_per_s_ar", "tokens_per_s_spec", "greedy_identical")
LIKELIHOOD_FIGURES = ("nelbo", "nelbo_se", "masked_acc")
WRITING_FIGURES = (
    "answers_right",
    "words_exact",
    "words_unseen_exact",
    "parallel_words_exact",
    "parallel_tokens_per_pass",
    "parallel_tokens_per_s",
)
DECODING = ("way", "sampler", "words_exact", "answers_exact", "answers_right", "tokens_per_pass", "tokens_per_s")

NUMBER = r"(\d+(?:\.\d+)?(?:e\+\d+)?)"
PROGRESS = re.compile(rf"[\w -]+: {NUMBER}/{NUMBER} ")
"""The start of a line that `dllm.progress.Progress` prints where it knows the total."""
UPDATE_EVERY_S = 5.0
"""Each update is a request to the server."""
SILENCE_S = 60.0
"""After a server that did not answer: a bar is no reason to hold up the work."""


class ProgressBar:
    """A bar under one key, moved by the lines that a child prints; lines of other kinds leave it alone.

    Args:
        key: lower-case letters, digits and dashes.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._id: UUID | None = None
        self._next = 0.0
        self._latest = ""

    def show(self, line: str) -> None:
        """Move the bar to where the line says, unless it has only just moved."""
        if share(line) is not None:
            self._latest = line
            if time.monotonic() >= self._next:
                self.catch_up()

    def catch_up(self) -> None:
        """Move the bar to the last line it was shown."""
        line, self._latest = self._latest, ""
        done = share(line)
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
    """Read how far a line of progress is, from 0 to 1; None for lines that do not say."""
    found = PROGRESS.match(line)
    if found is None:
        return None
    done, total = map(float, found.groups())
    return min(1.0, done / total) if total else None


def publish(root: Path) -> None:
    """Write a table, `acceptance-curve` or `decodings`, and the text `summary` from the records under out/."""
    evaluated = _read(root, "evaluate", "metrics.json")
    key, description, table = figures(evaluated)
    create_table_artifact(table=table, key=key, description=description)
    create_markdown_artifact(markdown=summary(root, evaluated), key="summary", description="The run in figures.")


def figures(evaluated: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """Lay out what evaluate found: of a draft a row an offset, of a diffusion model a row a way of decoding.

    Returns: the table's key, what it shows, its rows.
    """
    if "decodings" in evaluated:
        rows = [{name: way[name] for name in DECODING} for way in evaluated["decodings"]]
        return "decodings", "Held-out prompts, decoded in each way.", rows
    given = evaluated.get("conditional_acceptance_by_offset", [])
    rows = [
        {"offset": k, "accepted": reached, "accepted given k-1": given[k - 1] if k <= len(given) else None}
        for k, reached in enumerate(evaluated["acceptance_by_offset"], start=1)
    ]
    return "acceptance-curve", "Acceptance by offset in the block, held-out prompts.", rows


def summary(root: Path, evaluated: dict[str, Any]) -> str:
    """Write the main figures, the registered version, and links to each stage's MLflow run."""
    registered = _read(root, "register", "metrics.json")
    lines = ["| figure | value |", "|---|---|"]
    shown = [name for name in DRAFT_FIGURES + LIKELIHOOD_FIGURES + WRITING_FIGURES if name in evaluated]
    lines += [f"| {name} | {_show(evaluated[name])} |" for name in shown]
    aliases = " ".join(f"@{alias}" for alias in registered["aliases"])
    lines += [f"| registered | {registered['model_name']} version {registered['version']} {aliases} |", ""]
    lines += ["| stage | MLflow run | seconds |", "|---|---|---|"]
    for stage in STAGES:
        run = _read(root, stage, "run.json")
        lines.append(f"| {stage} | [{run['mlflow_run_id'][:12]}]({_link(run)}) | {run['seconds']} |")
    return "\n".join(lines)


def _link(run: dict[str, Any]) -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    base = uri.rstrip("/") if uri.startswith("http") else LOCAL_UI
    return f"{base}/#/experiments/{run['mlflow_experiment_id']}/runs/{run['mlflow_run_id']}"


def _show(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _read(root: Path, stage: str, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((root / "out" / stage / name).read_text())
    return record
