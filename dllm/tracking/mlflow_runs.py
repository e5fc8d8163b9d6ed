"""Runs in MLflow: the tracker that writes one, and the closing of those whose processes are gone.

MLflow takes 2 seconds to import, so this module and `model_registry` are imported only where a run or a registered
model is used.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from dllm.errors import ServerError
from dllm.tracking.runs import Status, flatten, is_local, tracking_uri

RETRY_AFTER_S = 60.0
PARAM_CHARS = 6000
PARAMS_A_CALL = 100


class MlflowTracker:
    """An MLflow run, new or resumed.

    A store that cannot be reached stops a stage before it starts. Once work is under way, a failing call costs its own
    record and one warning, not the work; the stage's own files hold the same figures.

    Args:
        root: the project's folder; the default store lies in it.
        experiment: the experiment's name (the recipe).
        name: the run's name (the stage).
        run_id: a run to go on with; a new one is made where it is None or the store has lost it.

    Raises:
        ServerError: the store is out of reach.
    """

    def __init__(self, root: Path, experiment: str, name: str, run_id: str | None = None) -> None:
        self.uri = tracking_uri(root)
        self._client = connect(self.uri)
        self._silent_until = 0.0
        self.run_id: str = self._resume(run_id) or self._create(root, experiment, name)
        self.experiment_id = str(self._client.get_run(self.run_id).info.experiment_id)
        self.resumed = self.run_id == run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        rows = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._try("log_batch", self.run_id, metrics=rows)

    def log_params(self, params: Mapping[str, Any]) -> None:
        if self.resumed:  # MLflow refuses to change a parameter, and a resumed run has the same ones by fingerprint
            return
        rows = [Param(key, str(value)[:PARAM_CHARS]) for key, value in flatten(params).items()]
        for first in range(0, len(rows), PARAMS_A_CALL):
            self._try("log_batch", self.run_id, params=rows[first : first + PARAMS_A_CALL])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._try("log_batch", self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._try("log_artifact", self.run_id, str(path), folder)

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        self._try("log_table", self.run_id, dict(columns), name)

    def finish(self, status: Status) -> None:
        self._silent_until = 0.0
        self._try("set_terminated", self.run_id, status)

    def _resume(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise unreachable(self.uri, error) from None
        return run_id

    def _create(self, root: Path, experiment: str, name: str) -> str:
        try:
            experiment_id = self._experiment_id(root, experiment)
            return str(self._client.create_run(experiment_id, run_name=name).info.run_id)
        except MlflowException as error:
            raise unreachable(self.uri, error) from None

    def _experiment_id(self, root: Path, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            place = (root / "mlartifacts" / experiment).absolute().as_uri() if is_local(self.uri) else None
            try:
                return self._client.create_experiment(experiment, artifact_location=place)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another stage was quicker
                    raise
            found = self._client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            raise ServerError(
                f"MLflow experiment {experiment!r} is deleted",
                where=self.uri,
                hint="restore it with `mlflow experiments restore`, or give the recipe another name",
            )
        return str(found.experiment_id)

    def _try(self, call: str, *arguments: Any, **named: Any) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            getattr(self._client, call)(*arguments, **named)
        except (MlflowException, OSError) as error:
            if isinstance(error, OSError) and is_local(self.uri):
                raise
            self._silent_until = time.monotonic() + RETRY_AFTER_S
            line = " ".join(str(error).split())[:300]
            print(f"warning: MLflow {call} failed, the stage goes on without it: {line} ({self.uri})", file=sys.stderr)


def connect(uri: str) -> MlflowClient:
    """Open a client and check that the store responds.

    Raises:
        ServerError: it does not.
    """
    # MLflow's own defaults retry a dead server for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise unreachable(uri, error) from None
    return client


def unreachable(uri: str, error: Exception) -> ServerError:
    """Return the one-line error for an MLflow that does not respond."""
    cause = " ".join(str(error).split())
    hint = "check MLFLOW_TRACKING_URI, or unset it to track into ./mlflow.db"
    if is_local(uri):
        hint = "check that the file can be written and that its disk is not full"
    return ServerError(f"MLflow out of reach: {cause[:200]}", where=uri, hint=hint)


def close_left_open(root: Path, run_ids: list[str]) -> list[str]:
    """Mark as KILLED the runs that are still RUNNING though their processes are gone; return their ids.

    Raises:
        ServerError: the store is out of reach.
    """
    client = connect(tracking_uri(root))
    closed = []
    for run_id in run_ids:
        try:
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "KILLED")
                closed.append(run_id)
        except MlflowException:
            continue  # the store has lost the run: nothing is left to close
    return closed
