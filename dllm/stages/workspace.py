"""What every stage promises: a place to work that fits its inputs exactly, an MLflow run, and whole results.

A stage works in `work/<stage>/<fingerprint>/` and publishes into `out/<stage>/` at the end. The fingerprint hashes all
that determines the result, so a killed stage finds its own work again and never another configuration's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.errors import StageError
from dllm.files import full_disk_in_one_line, lock_folder
from dllm.process import children as process
from dllm.process.signals import signals_exit
from dllm.stages.publication import publish_tree, write_json
from dllm.stages.schema import SCHEMA
from dllm.tracking import provenance
from dllm.tracking.provenance import digest
from dllm.tracking.runs import MlflowTracker, NullTracker, Status, Tracker, close_left_open, flatten

__all__ = ["Stage", "close", "digest", "forget", "open_stage"]

SIDECAR = "stage.json"


@dataclass
class Stage:
    """One stage under way."""

    name: str
    params: Params
    root: Path
    work: Path
    """Scratch that outlives a kill; only this configuration's calls ever see it."""
    out: Path
    fingerprint: str
    digests: dict[str, str]
    """Digest of every input by its name."""
    tracker: Tracker = field(default_factory=NullTracker)
    is_main: bool = True
    record: dict[str, Any] = field(default_factory=dict)
    """run.json as far as it is known."""
    _began: float = field(default_factory=time.monotonic)
    _seconds_before: float = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on this result, killed calls included."""
        return self._seconds_before + time.monotonic() - self._began

    def publish(self, files: Mapping[str, Path], metrics: Mapping[str, Any], *, step: int = 0) -> None:
        """Put the results into `out/<stage>/`, whole: the files, metrics.json and run.json.

        Single figures among the metrics go to the MLflow run too, at `step`. Ranks above 0 do nothing.

        Args:
            files: name inside out/<stage>/ (it may hold `/`) to a file in work.
            metrics: what metrics.json holds.
            step: where on the MLflow run's axis the figures stand.

        Raises:
            StageError: a file is missing or the disk is full.
        """
        if not self.is_main:
            return
        run = {**self.record, "status": "finished", "seconds": round(self.seconds, 3)}
        with full_disk_in_one_line(self.out):
            publish_tree(self.out, files, {"metrics.json": metrics, "run.json": run})
        figures = {
            key: value
            for key, value in flatten(metrics).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self.tracker.log_metrics(figures, step)


@contextmanager
def open_stage(
    name: str,
    params: Params,
    *,
    sections: Sequence[BaseModel],
    inputs: Mapping[str, Path] | None = None,
    identity: Mapping[str, Any] | None = None,
    root: Path,
    is_main: bool = True,
) -> Iterator[Stage]:
    """Open a stage's work and MLflow run, and close both with an honest status.

    Args:
        name: the stage.
        params: all of params.yaml; only `sections` count for the fingerprint.
        sections: the parts of it that determine the result.
        inputs: name to the file or folder read; the narrower the path, the fewer reruns.
        identity: ids, revisions and digests of models and servers that determine the result.
        root: the project's folder.
        is_main: False for ranks above 0: same paths, no MLflow, no lock, no publishing.

    Raises:
        StageError: an input is missing, another process works on the same thing, or the disk is full.
        ServerError: MLflow is out of reach.
        SystemExit: 143 after SIGTERM, 130 after SIGINT; the run then reads KILLED.
    """
    root = root.absolute()
    with signals_exit(), full_disk_in_one_line(root):
        if "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            process.die_with_parent()  # neither dvc nor torchrun takes its children along when it is killed outright
        digests = {key: digest(path) for key, path in (inputs or {}).items()}
        made_of = {
            "stage": name,
            "schema": SCHEMA[name],
            "params": params_digest(*sections),
            "inputs": digests,
            "identity": dict(identity or {}),
        }
        text = json.dumps(made_of, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        work = root / "work" / name / fingerprint
        work.mkdir(parents=True, exist_ok=True)
        stage = Stage(name, params, root, work, root / "out" / name, fingerprint, digests, is_main=is_main)
        if not is_main:
            yield stage
            return
        with lock_folder(work):
            yield from _tracked(stage, sections, made_of)


def forget(root: Path, name: str) -> None:
    """Throw away all work of a stage, so that its next call starts from nothing.

    Raises:
        StageError: a process works there.
    """
    for work in (root.absolute() / "work" / name).glob("*"):
        with lock_folder(work):
            shutil.rmtree(work)


def close(root: Path, name: str) -> list[str]:
    """Mark as KILLED the MLflow runs of a stage whose processes died before they could say so, and name them.

    Raises:
        ServerError: MLflow is out of reach.
    """
    open_runs = []
    for sidecar in (root.absolute() / "work" / name).glob(f"*/{SIDECAR}"):
        with contextlib.suppress(StageError), lock_folder(sidecar.parent):  # locked: its stage lives
            open_runs.append(json.loads(sidecar.read_text())["mlflow_run_id"])
    return close_left_open(root, open_runs)


def _tracked(stage: Stage, sections: Sequence[BaseModel], made_of: Mapping[str, Any]) -> Iterator[Stage]:
    sidecar = stage.work / SIDECAR
    before = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    stage._seconds_before = before.get("seconds", 0.0)
    started = before.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
    bystanders = process.children()
    tracker = MlflowTracker(stage.root, stage.params.recipe, stage.name, before.get("mlflow_run_id"))
    sitting = {"mlflow_run_id": tracker.run_id, "started": started, "seconds": stage._seconds_before}
    status: Status = "FAILED"
    try:
        write_json(sidecar, sitting)
        stage.tracker = tracker
        commit, dirty = provenance.git_state(stage.root)
        stage.record = {
            **made_of,
            "fingerprint": stage.fingerprint,
            "recipe": stage.params.recipe,
            "git": {"commit": commit, "dirty": dirty},
            "libraries": provenance.library_versions(),
            "mlflow_run_id": tracker.run_id,
            "mlflow_experiment_id": tracker.experiment_id,
            "started": started,
            "host": provenance.host(),
        }
        _describe(tracker, stage, sections)
        yield stage
        sidecar.unlink()  # done: a forced rerun is a new MLflow run
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt) as stopped:
        if isinstance(stopped, KeyboardInterrupt) or stopped.code in (130, 143):
            status = "KILLED"
            print(f"{stage.name}: stopped; the next call goes on from {stage.work}", file=sys.stderr, flush=True)
        raise
    finally:
        if status != "FINISHED":
            process.stop_children(spare=bystanders)
            with contextlib.suppress(OSError):  # a full disk costs the time's record, never the status
                write_json(sidecar, {**sitting, "seconds": round(stage.seconds, 3)})
        tracker.finish(status)


def _describe(tracker: MlflowTracker, stage: Stage, sections: Sequence[BaseModel]) -> None:
    for section in sections:
        tracker.log_params({type(section).__name__.lower(): section.model_dump(mode="json", by_alias=True)})
    tags = {
        "dllm.stage": stage.name,
        "dllm.fingerprint": stage.fingerprint,
        "dllm.params": stage.record["params"],
        "dllm.git_dirty": str(stage.record["git"]["dirty"]),
        **{f"dllm.input.{key}": value for key, value in stage.digests.items()},
        **{f"dllm.identity.{key}": str(value) for key, value in flatten(stage.record["identity"]).items()},
    }
    if commit := stage.record["git"]["commit"]:
        tags["mlflow.source.git.commit"] = commit
    if flow_run := os.environ.get("DLLM_FLOW_RUN"):
        tags["dllm.flow_run"] = flow_run
    tracker.set_tags(tags)
