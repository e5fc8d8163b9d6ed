"""Workspaces: a folder to work in that fits its inputs exactly, an MLflow run, and atomic publication.

Work happens in a folder named by a fingerprint of all that determines the result, so a killed call finds its own work
again and never that of another configuration. A stage of the pipeline and the standalone `regenerate` use the same
workspace; they differ in where it lies and how its results are published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from psutil import Process
from pydantic import BaseModel

from dllm.digests import file_digest, unsealed
from dllm.disk_faults import full_disk_in_one_line, is_unreadable
from dllm.files import lock_folder
from dllm.process import children as process
from dllm.process import signals
from dllm.publishing import HEADLINE, RUN, Publish, as_json, publish_tree, write_json
from dllm.tracking import provenance
from dllm.tracking.execution import Execution
from dllm.tracking.runs import NullTracker, Status, Tracker, flatten

SIDECAR = "stage.json"
"""In a work folder while its result is unfinished: the MLflow run, when it was started, and the seconds so far."""
START_GRACE_S = 10.0
"""From a signal to the end of a process that waits for MLflow to make its run."""


def fingerprint_of(made_of: Mapping[str, Any]) -> str:
    """Hash all that determines a result into 16 hex digits."""
    text = json.dumps(made_of, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Workspace:
    """A result in the making; `open` it to work."""

    name: str
    """The stage, in messages and in MLflow."""
    root: Path
    """The project's folder."""
    works: Path
    """Folder of the work folders, one per fingerprint."""
    out: Path
    """Where results are published."""
    made_of: Mapping[str, Any]
    """All that determines the result; `inputs` are digests by name, `identity` names models and servers."""
    sections: Sequence[BaseModel] = ()
    """Settings that the MLflow run records."""
    experiment: str | None = None
    """The MLflow experiment; None leaves no run."""
    run_name: str | None = None
    """Of the MLflow run; None takes `name`."""
    constants: set[str] = field(default_factory=set)
    """Keys of metrics that are sizes and settings: parameters in MLflow, which draws a chart of each metric."""
    execution: Execution | None = None
    """What the stage is part of; its MLflow run is nested in that of the execution."""
    publisher: Publish = publish_tree
    resume_hint: str | None = None
    """How to resume, for the message after a signal; None names the work folder."""
    is_main: bool = True
    """False for ranks above 0: same paths, no MLflow, no lock, no publishing."""
    tracker: Tracker = field(default_factory=NullTracker)
    record: dict[str, Any] = field(default_factory=dict)
    """run.json as far as it is known."""
    _began: float = field(default_factory=time.monotonic)
    _before: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the result."""
        return fingerprint_of(self.made_of)

    @property
    def work(self) -> Path:
        """Scratch that outlives a kill; only calls with this fingerprint use it."""
        return self.works / self.fingerprint

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every input by its name."""
        return dict(self.made_of["inputs"])

    @property
    def seconds(self) -> float:
        """Time spent on this result, killed calls included, up to ten seconds before each kill."""
        return float(self._before.get("seconds", 0.0)) + time.monotonic() - self._began

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the work folder and the MLflow run, and close both with the status of what happened.

        Raises:
            StageError: another process holds the work folder.
            ServerError: MLflow is out of reach.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.is_main:
            yield
            return
        with lock_folder(self.work):
            yield from self._tracked()

    def save_seconds(self) -> None:
        """Record the time spent so far, for the call after a kill."""
        write_json(self.work / SIDECAR, {**self._before, "seconds": round(self.seconds, 3)})

    def publish(
        self,
        files: Mapping[str, Path],
        metrics: Mapping[str, Any],
        *,
        step: int = 0,
        headline: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish the results: the files, metrics.json, headline.json and run.json. Ranks above 0 do nothing.

        Numbers among the metrics go to the MLflow run too, at `step`.

        Args:
            files: name in the published folder (it may hold `/`) to a file in work.
            metrics: the content of metrics.json.
            step: position of the figures on the MLflow run's axis.
            headline: the content of headline.json, the few metrics that DVC shows; None writes none.

        Raises:
            StageError: a file is missing or the disk is full.
        """
        if not self.is_main:
            return
        run = {**self.record, "status": "finished", "seconds": round(self.seconds, 3)}
        run["outputs"] = {name: file_digest(path) for name, path in files.items() if path.is_file()}
        records = {"metrics.json": metrics} | ({} if headline is None else {HEADLINE: headline})
        run["outputs"] |= {name: hashlib.sha256(as_json(record)).hexdigest() for name, record in records.items()}
        with full_disk_in_one_line(self.out):
            self.publisher(self.out, files, {**records, RUN: run})
        self.log(metrics, step)
        self.tracker.log_headline(_figures(headline or {}))

    def log(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Send the numbers among the metrics to the MLflow run.

        Left out are a breakdown in one part, which repeats them, and tables by numbers (throughput by concurrency):
        each would be a chart with one bar.
        """
        figures = _figures(metrics)
        repeated = {f"{key}.{only}." for key, parts in metrics.items() if _is_one_part(parts) for only in parts}
        for key in [key for key in figures if any(key.startswith(prefix) for prefix in repeated)]:
            if figures[key] == figures.get(key.split(".", 2)[2]):
                del figures[key]
        sizes = {key: figures.pop(key) for key in self.constants & figures.keys()}
        if sizes:
            self.tracker.log_params({self.name: sizes})
        rows = [key for key in figures if any(part.isdigit() for part in key.split("."))]
        self.tracker.log_metrics({key: value for key, value in figures.items() if key not in rows}, step)

    def _tracked(self) -> Iterator[None]:
        sidecar = self.work / SIDECAR
        before = _read_json(sidecar)
        started = before.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
        bystanders = process.children()
        with signals.uninterrupted(START_GRACE_S):  # a run that was made is known to the next call
            if self.experiment is not None:
                from dllm.tracking.mlflow_runs import (  # 2 seconds; other ranks need not wait
                    MlflowTracker,
                    StageTracker,
                )

                name, run_id = self.run_name or self.name, before.get("mlflow_run_id")
                if self.execution is None:
                    self.tracker = MlflowTracker(self.root, self.experiment, name, run_id, self.work)
                else:
                    self.tracker = StageTracker(self.execution, run_id, self.work)
            run_id = self.tracker.run_id
            self._before = {"mlflow_run_id": run_id, "started": started, "seconds": before.get("seconds") or 0.0}
            write_json(sidecar, self._before)
        try:
            with signals.on_stop(lambda: self._stop("KILLED", bystanders)):
                signals.check()
                self.record = self._describe(started)
                yield
        except BaseException as stopped:
            is_killed = isinstance(stopped, KeyboardInterrupt) or (
                isinstance(stopped, SystemExit) and stopped.code in signals.EXIT_CODES
            )
            self._stop("KILLED" if is_killed else "FAILED", bystanders)
            raise
        with signals.uninterrupted():  # what is published reads FINISHED
            try:
                self.tracker.finish("FINISHED")
            finally:  # after the end is on disk: killed in between, the next call ends the same run
                sidecar.unlink(missing_ok=True)  # a forced rerun is a new MLflow run

    def _stop(self, status: Status, bystanders: set[Process]) -> None:
        """Close what is unfinished, so that the next call resumes it."""
        if status == "KILLED":
            hint = self.resume_hint or f"the next call resumes from {self.work}"
            print(f"{self.name}: stopped; {hint}", file=sys.stderr, flush=True)
        process.stop_children(spare=bystanders)
        with contextlib.suppress(OSError):  # a full disk costs the time's record, never the status
            self.save_seconds()
        self.tracker.finish(status)

    def _describe(self, started: str) -> dict[str, Any]:
        git = provenance.git_state(self.root)
        record = {
            **self.made_of,
            "fingerprint": self.fingerprint,
            "recipe": self.experiment,
            "git": git,
            "libraries": provenance.library_versions(),
            "mlflow_run_id": self.tracker.run_id,
            "mlflow_experiment_id": self.tracker.experiment_id,
            "started": started,
            "host": provenance.host(),
        }
        for section in self.sections:
            values = section.model_dump(mode="json", by_alias=True)
            self.tracker.log_params({type(section).__name__.lower(): values})
        tags = {
            "dllm.stage": self.name,
            "dllm.fingerprint": self.fingerprint,
            "dllm.params": str(record["params"]),
            "dllm.git_dirty": str(git["dirty"]),
            **{f"dllm.input.{key}": value for key, value in self.digests.items()},
            **{f"dllm.identity.{key}": str(value) for key, value in flatten(record["identity"]).items()},
        }
        if git["commit"]:
            tags["mlflow.source.git.commit"] = str(git["commit"])
        else:
            tags["dllm.no_git_commit"] = str(git["reason"])
        self.tracker.set_tags(tags)
        return record


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    flat = flatten(metrics).items()
    return {key: value for key, value in flat if isinstance(value, int | float) and not isinstance(value, bool)}


def _is_one_part(parts: Any) -> bool:
    return isinstance(parts, Mapping) and len(parts) == 1 and all(isinstance(part, Mapping) for part in parts.values())


def _read_json(path: Path) -> dict[str, Any]:
    """Read the sidecar; empty where it is not there, torn or damaged."""
    try:
        found = unsealed(path.read_bytes())
    except (OSError, ValueError) as error:
        if is_unreadable(error):
            raise
        return {}
    is_right = {
        "mlflow_run_id": lambda value: isinstance(value, str) and value.isalnum(),
        "started": lambda value: isinstance(value, str),
        "seconds": lambda value: isinstance(value, int | float) and 0 <= value < 1 << 40,
    }
    return {key: found[key] for key, check in is_right.items() if found.get(key) is not None and check(found[key])}
