"""Read back what a server holds of a run: something else may have said 200 in its place while records were sent.

A login page, a gateway, or the next program on the same port replies with JSON that MLflow's client takes for success.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from dllm.errors import ServerError
from dllm.tracking.run_journal import OPEN, Record

Point = tuple[str, int]
"""Name and step of a metric."""


def missing(
    client: MlflowClient, uri: str, run_id: str, records: Iterable[Record]
) -> tuple[list[Metric], dict[str, object]]:
    """Compare the points and parameters of a run's records with the store's; return those that it lacks.

    Raises:
        ServerError: what responds does not know the run.
    """
    run = run_of(client, uri, run_id)
    points: dict[Point, Metric] = {}
    params: dict[str, object] = {}
    for record in records:
        for key, value in record.get("metrics", {}).items():
            points.setdefault((key, record["step"]), Metric(key, float(value), record["time"], record["step"]))
        params |= record.get("params", {})
    for key in sorted({key for key, _ in points}):
        for point in client.get_metric_history(run_id, key):
            points.pop((key, point.step), None)
    return list(points.values()), {key: value for key, value in params.items() if key not in run.data.params}


def check_status(client: MlflowClient, uri: str, run_id: str, status: str) -> None:
    """Check that a run has the status that was sent, where it has ended.

    Raises:
        ServerError: it does not, or what responds does not know the run.
    """
    if status not in OPEN and (found := run_of(client, uri, run_id).info.status) != status:
        raise _no_mlflow(uri, f"it took the status {status} and says {found}")


def check_artifact(client: MlflowClient, uri: str, run_id: str, record: Mapping[str, object]) -> None:
    """Check that a file that was sent lies in the run.

    Raises:
        ServerError: it does not.
    """
    folder, name = record.get("folder"), posixpath.basename(str(record["artifact"]))
    path = posixpath.join(str(folder), name) if folder else name
    if all(each.path != path for each in client.list_artifacts(run_id, str(folder) if folder else None)):
        raise _no_mlflow(uri, f"it took {path} and does not have it")


def run_of(client: MlflowClient, uri: str, run_id: str) -> Run:
    """Return a run as the store has it.

    Raises:
        ServerError: what responds does not know it, and reports no error.
    """
    run = client.get_run(run_id)
    if run.info.run_id != run_id:
        raise _no_mlflow(uri, "it was asked for a run, and returns none")
    return run


def _no_mlflow(uri: str, why: str) -> ServerError:
    return ServerError(f"what responds is no MLflow server: {why}", where=uri, hint="see what listens at that address")
