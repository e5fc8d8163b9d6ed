"""One MLflow run per stage, nested in that of the execution: metrics, parameters, tables, files, and the final status.

Only the main rank tracks; the others hold a `NullTracker`. Ids travel explicitly: no global active run. `mlflow_runs`
holds what needs MLflow, which takes 2 seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]
REGISTERED = "models:/"
"""What a reference to a registered model starts with; `model_registry` resolves it."""


@dataclass(frozen=True)
class DatasetInput:
    """Data that a run reads."""

    name: str
    digest: str
    """DVC's, of the file or folder; at most 36 characters."""
    source: str
    """Its path in the project."""
    context: str
    """What it is used for, such as `training`."""


class Tracker(Protocol):
    """What a stage logs while it runs."""

    @property
    def experiment_id(self) -> str | None:
        """Id of the experiment in MLflow, or None if nothing is tracked."""
        ...

    @property
    def run_id(self) -> str | None:
        """Id of the run in MLflow, or None if nothing is tracked."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step; of two values of one metric at one step the first is kept."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become dotted keys."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """Log what the run reads."""

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        """Log the figures by which whole executions are compared, on the run around this one."""

    def log_curves(self, points: Mapping[int, Mapping[str, float]]) -> None:
        """Log curves by which whole executions are compared, by step, on the run around this one."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a small file as an artifact."""

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Log a table under a name such as `acceptance.json`."""

    def finish(self, status: Status) -> None:
        """Close the run."""


class NullTracker:
    """Tracks nothing: for ranks above 0, and for tests."""

    run_id: str | None = None
    experiment_id: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None: ...
    def log_headline(self, metrics: Mapping[str, float]) -> None: ...
    def log_curves(self, points: Mapping[int, Mapping[str, float]]) -> None: ...
    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...
    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None: ...
    def finish(self, status: Status) -> None: ...


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
