"""Send records of a run to MLflow, and read back from a server what could not be sent again later."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException

from dllm.tracking import read_back
from dllm.tracking.address import is_local
from dllm.tracking.run_journal import OPEN, Record, RunJournal

Row = TypeVar("Row", Metric, Param)
METRICS_A_CALL = 500
PARAMS_A_CALL = 100
VALUE_CHARS = 6000
TAG_CHARS = 5000
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST")
"""Codes of records that the store will never take."""


def deliver(client: MlflowClient, uri: str, journal: RunJournal, batch: Sequence[Record]) -> None:
    """Send records, and read back from a server what cannot be sent once more later: files, and the end of a run."""
    first, run_id = batch[0], journal.run_id
    if is_local(uri):
        _send(client, journal, batch)
        return
    if "artifact" in first:  # MLflow's client writes where a reply says that the run's files are, and remembers it
        read_back.run_of(client, uri, run_id)
    if first.get("status") not in OPEN:
        points, params = read_back.missing(client, uri, run_id, journal.records())
        for point in points:
            with _refusals_passed():
                _send_points(client, run_id, [point])
        for key, value in params.items():
            with _refusals_passed():
                _send_params(client, run_id, {key: value})
    _send(client, journal, batch)
    if "artifact" in first and journal.file_of(first).is_file():
        read_back.check_artifact(client, uri, run_id, first)
    if "status" in first:
        read_back.check_status(client, uri, run_id, first["status"])


@contextlib.contextmanager
def _refusals_passed() -> Iterator[None]:
    """Pass over what the store refuses: that was reported when it was first sent."""
    try:
        yield
    except MlflowException as error:
        if not is_refusal(error):
            raise


def _send(client: MlflowClient, journal: RunJournal, batch: Sequence[Record]) -> None:
    run_id, first = journal.run_id, batch[0]
    if "metrics" in first:
        rows = [Metric(k, float(v), r["time"], r["step"]) for r in batch for k, v in r["metrics"].items()]
        _send_points(client, run_id, rows)
    elif "params" in first:
        _send_params(client, run_id, first["params"])
    elif "tags" in first:
        client.log_batch(run_id, tags=[RunTag(key, str(value)[:TAG_CHARS]) for key, value in first["tags"].items()])
    elif "inputs" in first:
        client.log_inputs(run_id, [_dataset(each) for each in first["inputs"]])
    elif "artifact" in first:
        if journal.file_of(first).is_file():
            client.log_artifact(run_id, str(journal.file_of(first)), first.get("folder"))
        if first.get("table"):
            _announce_table(client, run_id, str(first["table"]))
    elif first.get("status") == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    elif "status" in first:
        client.set_terminated(run_id, first["status"], end_time=first["time"])


def _send_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    for part in _parts(points, METRICS_A_CALL):
        client.log_batch(run_id, metrics=part)


def _send_params(client: MlflowClient, run_id: str, params: Mapping[str, object]) -> None:
    rows = [Param(key, str(value)[:VALUE_CHARS]) for key, value in params.items()]
    for part in _parts(rows, PARAMS_A_CALL):
        client.log_batch(run_id, params=part)


def _dataset(given: Mapping[str, str]) -> DatasetInput:
    source = json.dumps({"uri": given["source"]})
    dataset = Dataset(given["name"], given["digest"], source_type="local", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", given["context"])])


def _announce_table(client: MlflowClient, run_id: str, name: str) -> None:
    """Have MLflow's page show a file as a table."""
    tag = "mlflow.loggedArtifacts"
    known = json.loads(client.get_run(run_id).data.tags.get(tag, "[]"))
    if (entry := {"path": name, "type": "table"}) not in known:
        client.set_tag(run_id, tag, json.dumps([*known, entry]))


def is_refusal(error: MlflowException) -> bool:
    """Return whether the store itself refuses a record; a 400 without JSON is from a proxy before it, and may pass."""
    return error.error_code in REFUSED and (error.error_code != "BAD_REQUEST" or isinstance(error, RestException))


def _parts(rows: Sequence[Row], size: int) -> Iterable[list[Row]]:
    return (list(rows[first : first + size]) for first in range(0, len(rows), size))
