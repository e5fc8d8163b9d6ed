"""Send what run journals hold to the MLflow store: each point once, whatever was away or killed meanwhile."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dllm.errors import DllmError, StageError
from dllm.files import lock_folder
from dllm.secrets import hide
from dllm.tracking import sqlite_store
from dllm.tracking.address import home, sqlite_path, tracking_uri
from dllm.tracking.run_journal import OPEN, Record, RunJournal, journal_path, journals
from dllm.tracking.sending import METRICS_A_CALL, deliver, is_refusal
from dllm.tracking.store import FAULTS, cause_of, connect, faults_in_one_line, unreachable

LOCK_PATIENCE_S = 2.0
PROJECT, WORK = "dllm.project", "dllm.work"
"""Tags by which a run is found whose process was killed before it could note the run's id."""
OWN = "mlflow.db"
GONE = "RESOURCE_DOES_NOT_EXIST"


@dataclass
class Report:
    """What a synchronization did."""

    sent: dict[str, int] = field(default_factory=dict)
    """Records sent, by run."""
    closed: list[str] = field(default_factory=list)
    """Runs marked as KILLED: their processes were gone."""
    refused: list[str] = field(default_factory=list)
    """What the store will never take, one line each."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Records that wait for another store, by its address."""


class Gone(Exception):
    """The store has lost the run."""


def send(client: MlflowClient, uri: str, journal: RunJournal) -> list[str]:
    """Send the pending records of a run, oldest first; return what the store refuses for good, one line each.

    Raises:
        Gone: the store has lost the run.
        DllmError, or one of `FAULTS`: the store is away; the records stay pending.
    """
    refused: list[str] = []
    if journal.pending and (path := sqlite_path(uri)) is not None:
        sqlite_store.probe(path, LOCK_PATIENCE_S)
    if journal.in_doubt:
        _leave_out_taken(client, journal)
    while journal.pending:
        batch = _next_batch(journal.pending)
        journal.in_doubt = True
        try:
            deliver(client, uri, journal, batch)
        except MlflowException as error:
            if error.error_code == GONE or _is_deleted(client, journal.run_id, error):
                raise Gone from None
            if not is_refusal(error):
                raise
            if len(batch) > 1:
                refused += _send_one_by_one(client, uri, journal, batch)
                continue
            refused.append(f"MLflow refuses {_name(batch[0])}: {cause_of(error)}")
        journal.took(len(batch))
        journal.in_doubt = False
    return refused


def synchronize(root: Path, client: MlflowClient | None = None, *, everything: bool = False) -> Report:
    """Send what a project's runs have logged and the store has missed; mark as KILLED those whose processes are gone.

    Runs that a living process writes are left to it.

    Args:
        root: the project's folder.
        client: of the store; None connects where there is something to send.
        everything: look in the store, too, for runs of this project that no journal knows.

    Raises:
        DllmError: the store is away.
    """
    report, uri = Report(), tracking_uri(root)
    if everything:
        client = client or connect(uri, root)
        with faults_in_one_line(uri):
            experiments = [str(each.experiment_id) for each in client.search_experiments()]
            report.closed += close_orphans(client, root, experiments)
    place = hide(uri)
    for journal in journals(root):
        if journal.head.get("store") not in (place, store_name(root, uri)):
            if journal.pending:
                store = str(journal.head.get("store"))
                report.elsewhere[store] = report.elsewhere.get(store, 0) + len(journal.pending)
            continue
        if journal.status in OPEN:
            journal.add(status="KILLED")
            report.closed.append(journal.run_id)
        if not journal.pending:
            continue
        client = client or connect(uri, root)
        count = len(journal.pending)
        try:
            report.refused += send(client, uri, journal)
        except Gone:
            report.refused.append(f"MLflow has no run {journal.run_id} any more: its {count} records are dropped")
            journal.remove()
            continue
        except DllmError:
            raise
        except FAULTS as error:
            raise unreachable(uri, error) from None
        report.sent[journal.run_id] = count
    return report


def store_name(root: Path, uri: str) -> str:
    """Name a store in records, without secrets; the project's own by a name that stays when its folder is moved."""
    return OWN if sqlite_path(uri) == home(root) / "mlflow.db" else hide(uri)


def project_id(root: Path) -> str:
    """Name a project's folder on this machine in 16 hex digits."""
    return hashlib.sha256(f"{platform.node()}\0{root.absolute()}".encode(errors="surrogateescape")).hexdigest()[:16]


def close_orphans(
    client: MlflowClient, root: Path, experiment_ids: Iterable[str], own: tuple[str, Path | None] = ("", None)
) -> list[str]:
    """Mark as KILLED the RUNNING runs of a project that no journal and no living process knows; return their ids.

    Their processes were killed between making the run and noting its id.

    Args:
        own: the caller's run, which lives, and its work folder.
    """
    closed = []
    query = f"attributes.status = 'RUNNING' and tags.`{PROJECT}` = '{project_id(root)}'"
    for run in client.search_runs(list(experiment_ids), query):
        run_id, work = str(run.info.run_id), Path(run.data.tags.get(WORK, ""))
        if run_id == own[0] or journal_path(root, run_id).exists() or (work != own[1] and _is_worked_in(work)):
            continue
        client.set_terminated(run_id, "KILLED")
        closed.append(run_id)
    return closed


def _is_worked_in(work: Path) -> bool:
    try:
        if work.is_dir():
            with lock_folder(work):
                return False
    except StageError:
        return True
    return False


def _next_batch(pending: Sequence[Record]) -> list[Record]:
    """Take the first record, and the metrics after it where it is one."""
    batch: list[Record] = []
    points = 0
    for record in pending:
        points += len(record.get("metrics", ()))
        if "metrics" not in record or points > METRICS_A_CALL:
            break
        batch.append(record)
    return batch or list(pending[:1])


def _send_one_by_one(client: MlflowClient, uri: str, journal: RunJournal, batch: Sequence[Record]) -> list[str]:
    refused = []
    for record in batch:
        try:
            deliver(client, uri, journal, [record])
        except MlflowException as error:
            if not is_refusal(error):
                raise
            refused.append(f"MLflow refuses {_name(record)}: {cause_of(error)}")
        journal.took(1)
    journal.in_doubt = False
    return refused


def _leave_out_taken(client: MlflowClient, journal: RunJournal) -> None:
    """Remove from the pending metrics the points that the store holds: it may have taken them just before a kill.

    All else may be sent twice without harm.
    """
    keys = {key for record in journal.pending for key in record.get("metrics", ())}
    try:
        there = {(key, point.step) for key in keys for point in client.get_metric_history(journal.run_id, key)}
    except MlflowException as error:
        if error.error_code == GONE:
            raise Gone from None
        raise
    for record in journal.pending:
        if "metrics" in record:
            step = record["step"]
            record["metrics"] = {k: v for k, v in record["metrics"].items() if (k, step) not in there}


def _is_deleted(client: MlflowClient, run_id: str, error: MlflowException) -> bool:
    if not is_refusal(error):
        return False
    return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")


def _name(record: Record) -> str:
    kind = next(
        (kind for kind in ("metrics", "params", "tags", "inputs", "artifact", "status") if kind in record), "a record"
    )
    held = record.get(kind)
    return f"{kind} {', '.join(held) if isinstance(held, dict) else held}"[:200]
