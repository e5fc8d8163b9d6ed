"""Runs in MLflow: the tracker that writes one.

MLflow takes 2 seconds to import, so this module, `delivery`, `store` and `model_registry` are imported only where a run
or a registered model is used.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import posixpath
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dllm.errors import DllmError, ServerError
from dllm.secrets import hide
from dllm.tracking import delivery
from dllm.tracking.address import home, is_local, tracking_uri
from dllm.tracking.execution import Execution
from dllm.tracking.run_journal import Record, RunJournal, is_open, journal_path
from dllm.tracking.runs import DatasetInput, Status, flatten
from dllm.tracking.store import FAULTS, cause_of, connect, experiment_of, faults_in_one_line, has_run
from dllm.tracking.system_metrics import PREFIX, SystemMetrics

PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
OF_BOTH = ("mlflow.source.git.commit", "dllm.git_dirty", "dllm.no_git_commit", "dllm.model", "dllm.verdict")
"""Tags that a stage's run shares with the one around it."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
NAME_CHARS = 250
CURVES = "curves"
"""What the curves of an execution are called before a slash: MLflow draws them as a group of charts."""
RETRY_AFTER_S = 5.0
SHARE_OF_TIME = 20.0
"""A try that fails after t seconds is followed by a pause of at least this many t: a store that hangs costs a stage at
most a twentieth of its time."""


class MlflowTracker:
    """An MLflow run, new or resumed.

    A store that cannot be reached stops a stage before it starts. Once work is under way, what it misses waits in the
    run's journal, and is sent when it is back, at the end, at the next start, or by `python -m dllm track sync`.

    Args:
        root: the project's folder; the default store lies in it.
        experiment: the experiment's name (the recipe).
        name: the run's name (the stage).
        run_id: a run to go on with; a new one is made where it is None or the store has lost it.
        work: the folder that the stage works in, locked by the caller; nobody else has a live run for it.
        parent: the run in which a new one is nested.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI is not the address of a store.
        ServerError: the store is out of reach.
        StageError: its file is damaged.
    """

    def __init__(
        self,
        root: Path,
        experiment: str,
        name: str,
        run_id: str | None = None,
        work: Path | None = None,
        parent: MlflowTracker | None = None,
    ) -> None:
        self.uri = tracking_uri(root)
        self._client = connect(self.uri, root)
        self._is_away = self._is_gone = False
        self._retry_at = 0.0
        self._sending = threading.RLock()
        with faults_in_one_line(self.uri):
            self.experiment_id = experiment_id(self._client, self.uri, root, experiment)
            self.resumed = run_id is not None and self._exists(run_id)
            if run_id is None or not self.resumed:
                tags = {delivery.PROJECT: delivery.project_id(root), delivery.WORK: str(work or ""), **_whose()}
                if parent is not None:
                    tags[PARENT] = parent.run_id
                run_id = str(self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id)
                # It becomes the name of a file, and one that is held already would be waited for.
                if not _RUN_ID.fullmatch(run_id) or (parent is not None and run_id == parent.run_id):
                    hint = "check that the address is that of an MLflow server, without a cache before it"
                    raise ServerError(f"the server gave a new run the id {run_id[:80]!r}", where=self.uri, hint=hint)
            self.run_id: str = run_id
        self._journal = RunJournal.wait_for(journal_path(root, self.run_id))
        if not self._journal.head:
            self._journal.begin(store=delivery.store_name(root, self.uri), stage=name, work=str(work or ""))
        if self.resumed:
            self._journal.add(status="RUNNING")
        if parent is None:
            with contextlib.suppress(DllmError, *FAULTS):  # else at the next start
                delivery.close_orphans(self._client, root, [self.experiment_id], own=(self.run_id, work))
                delivery.synchronize(root, self._client)
        self._send()

    def experiment_of(self, run_id: str) -> str | None:
        """Return the experiment of another run; None where this run's store does not have it."""
        with faults_in_one_line(self.uri):
            return experiment_of(self._client, run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self._add({"metrics": {_name(key): float(value) for key, value in metrics.items()}, "step": step})

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._add({"params": {_name(key): str(value) for key, value in flatten(params).items()}})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._add({"tags": {_name(key): str(value) for key, value in tags.items()}})

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        if inputs:
            self._add({"inputs": [asdict(each) for each in inputs]})

    def log_headline(self, metrics: Mapping[str, float]) -> None: ...

    def log_curves(self, points: Mapping[int, Mapping[str, float]]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        with self._sending:
            self._journal.keep_file(path, folder)
            self._send()

    def log_table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        # MLflow's own log_table appends to a table that is there: sent twice, it would hold all rows twice.
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_text(json.dumps({"columns": list(columns), "data": rows}, default=str))
            with self._sending:
                self._journal.keep_file(path, None, table=name)
                self._send()

    def finish(self, status: Status) -> None:
        with self._sending:  # a signal may end the process from a thread, while the main thread sends
            self._finish(status)

    def _add(self, *records: Record) -> None:
        with self._sending:  # system metrics come from a thread
            if not self._journal.is_closed:
                for record in records:
                    self._journal.add(**record)
                self._send()

    def _finish(self, status: Status, *, is_away: bool = False) -> None:
        if self._is_gone:
            self._journal.remove()
        if self._is_gone or self._journal.is_closed:
            self._journal.close()
            return
        self._journal.read()
        with contextlib.suppress(OSError):  # the disk is full: the next synchronization finds no end, and says KILLED
            self._journal.add(status=status)
        if not is_away:
            self._retry_at = 0.0
            self._send()
            if left := len(self._journal.pending):
                _warn(f"MLflow has missed {left} records of this run; `python -m dllm track sync` sends them")
        self._journal.close()

    def _send(self) -> None:
        with self._sending:
            self._send_pending()

    def _send_pending(self) -> None:
        began = time.monotonic()
        if self._is_gone or began < self._retry_at or not self._journal.pending:
            return
        count = len(self._journal.pending)
        try:
            refused = delivery.send(self._client, self.uri, self._journal)
        except delivery.Gone:
            self._is_gone = True
            self._journal.took(count)
            _warn(f"MLflow has lost this run, the stage goes on without it ({self.uri})")
        except (DllmError, *FAULTS) as error:
            now = time.monotonic()
            self._retry_at = now + max(RETRY_AFTER_S, SHARE_OF_TIME * (now - began))
            if not self._is_away:
                cause = error.message if isinstance(error, DllmError) else cause_of(error)
                _warn(f"MLflow is away, the stage goes on and its records are sent later: {cause} ({self.uri})")
            self._is_away = True
        else:
            for line in refused:
                _warn(f"{line} ({self.uri})")
            if self._is_away:
                print(f"MLflow is back: {count} records sent", file=sys.stderr, flush=True)
            self._is_away = False

    def _exists(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != delivery.GONE:
                raise
            return False


class StageTracker(MlflowTracker):
    """The run of a stage, nested in that of its execution, which has the status of its latest stage.

    Args:
        execution: the execution that the stage is part of.
        run_id, work: as for a run without one.
    """

    def __init__(self, execution: Execution, run_id: str | None, work: Path) -> None:
        root, experiment = execution.root, execution.params.recipe
        self._store = delivery.store_name(root, tracking_uri(root))
        known = execution.run_id(self._store)
        if known is not None and is_open(journal_path(root, known)):
            known = None  # another stage of the same configuration works, and would be waited for
        self.parent = MlflowTracker(root, experiment, execution.name, known, work)
        found = {stage: self.parent.experiment_of(run) for stage, run in execution.earlier.items()}
        experiments = {stage: experiment for stage, experiment in found.items() if experiment is not None}
        self._execution = execution = replace(execution, experiments=experiments)
        self._note("RUNNING", run_id or "")  # first, so that a process killed meanwhile leaves one run, not two
        super().__init__(root, experiment, execution.stage_name, run_id, work, self.parent)
        self._note("RUNNING", self.run_id)
        if not self.parent.resumed:
            self.parent.log_params(execution.params.model_dump(mode="json", by_alias=True, exclude_none=True))
        self.parent.set_tags({**execution.tags("pipeline"), **execution.links, NOTE: self._description()})
        self.set_tags({PARENT: self.parent.run_id, **execution.tags(execution.stage)})
        self._system = SystemMetrics(self.log_metrics, self._journal.next_step(PREFIX))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        super().set_tags(tags)
        if shared := {key: value for key, value in tags.items() if key in OF_BOTH}:
            self.parent.set_tags(shared)

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        super().log_inputs(inputs)
        self.parent.log_inputs(inputs)

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        self.parent.log_metrics({f"{self._execution.stage}.{key}": value for key, value in metrics.items()})

    def log_curves(self, points: Mapping[int, Mapping[str, float]]) -> None:
        named = ((step, {f"{CURVES}/{key}": value for key, value in at.items()}) for step, at in points.items())
        self.parent._add(*({"metrics": at, "step": step} for step, at in named))

    def finish(self, status: Status) -> None:
        self._system.stop()
        super().finish(status)
        with self.parent._sending:
            if not self.parent._journal.is_closed:
                with contextlib.suppress(OSError):  # the disk is full
                    self._note(status, self.run_id)
                    self.parent._journal.add(tags={NOTE: self._description()})
            self.parent._finish(status, is_away=self._is_away)

    def _note(self, status: str, run_id: str) -> None:
        self._execution.note(self.parent.run_id, self._store, run_id, status)

    def _description(self) -> str:
        return self._execution.describe(self.parent.experiment_id)


def known_runs(root: Path, run_ids: Iterable[str]) -> set[str]:
    """Return which of these runs the project's store has.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI is not the address of a store.
        ServerError: the store is out of reach.
    """
    uri = tracking_uri(root)
    client = connect(uri, root)
    with faults_in_one_line(uri):
        return {run_id for run_id in run_ids if has_run(client, run_id)}


def experiment_id(client: MlflowClient, uri: str, root: Path, name: str) -> str:
    """Return the id of an experiment, made where there is none.

    Raises:
        ServerError: it is deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        # Resolved, since that of a checkout is a link to the project's.
        place = ((home(root) / "mlartifacts").resolve() / name).as_uri() if is_local(uri) else None
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another stage was quicker
                raise
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise ServerError(
            f"MLflow experiment {name!r} is deleted",
            where=uri,
            hint="restore it with `mlflow experiments restore`, or give the recipe another name",
        )
    return str(found.experiment_id)


def _name(key: str) -> str:
    """Return a key as MLflow takes it: one that it refuses would cost all that is sent with it."""
    return posixpath.normpath(_NOT_IN_NAMES.sub("_", key)).lstrip("./")[:NAME_CHARS] or "_"


def _whose() -> dict[str, str]:
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        return {"mlflow.user": getpass.getuser()}
    return {}


def _warn(text: str) -> None:
    print(f"warning: {hide(' '.join(text.split()))}", file=sys.stderr, flush=True)
