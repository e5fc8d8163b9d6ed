"""What a flow run leaves in Prefect: the acceptance curve and a summary, under keys that stay the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

STAGES = ("prepare", "regenerate", "train", "evaluate", "register")
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` opens MLflow when no server is named."""
FIGURES = ("tau_micro", "tau_macro", "speedup", "tokens_per_s_ar", "tokens_per_s_spec", "greedy_identical")


def publish(root: Path) -> None:
    """Write the table `acceptance-curve` and the text `summary` from the records under out/."""
    evaluated = _read(root, "evaluate", "metrics.json")
    create_table_artifact(
        table=curve(evaluated),
        key="acceptance-curve",
        description="Acceptance by offset in the block, held-out prompts.",
    )
    create_markdown_artifact(markdown=summary(root, evaluated), key="summary", description="The run in figures.")


def curve(evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay the curve out as rows, one an offset."""
    given = evaluated.get("conditional_acceptance_by_offset", [])
    return [
        {"offset": k, "accepted": reached, "accepted given k-1": given[k - 1] if k <= len(given) else None}
        for k, reached in enumerate(evaluated["acceptance_by_offset"], start=1)
    ]


def summary(root: Path, evaluated: dict[str, Any]) -> str:
    """Write the main figures, the registered version, and links to each stage's MLflow run."""
    registered = _read(root, "register", "metrics.json")
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {_show(evaluated[name])} |" for name in FIGURES if name in evaluated]
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
