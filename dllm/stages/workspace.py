"""Workspaces of the pipeline: a stage works in `work/<stage>/<fingerprint>/` and publishes into `out/<stage>/`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.disk_faults import full_disk_in_one_line
from dllm.errors import DllmError
from dllm.files import lock_folder
from dllm.process import signals
from dllm.publishing import RUN
from dllm.stages import STAGES
from dllm.stages.records import check_published, read_record
from dllm.stages.schema import SCHEMA
from dllm.tracking.execution import Execution
from dllm.tracking.provenance import digest, dvc_digest
from dllm.tracking.run_journal import is_behind
from dllm.tracking.runs import DatasetInput
from dllm.workspace import Workspace

NAMES = {"regenerate": "responses"}
"""What inputs are called as datasets, where not by their own name."""
CONTEXTS = {"train": "training", "evaluate": "evaluation"}
"""What a stage's datasets are used for, in MLflow's words."""

__all__ = ["Stage", "Workspace", "close", "digest", "forget", "open_stage"]


@dataclass
class Stage(Workspace):
    """The workspace of one stage."""

    params: Params = field(kw_only=True)


@contextmanager
def open_stage(
    name: str,
    params: Params,
    *,
    sections: Sequence[BaseModel],
    determining: Sequence[BaseModel] | None = None,
    inputs: Mapping[str, Path] | None = None,
    identity: Mapping[str, Any] | None = None,
    root: Path,
    is_main: bool = True,
    aside: Path | None = None,
    run_name: str | None = None,
) -> Iterator[Stage]:
    """Open a stage's work and MLflow run, and close both with the status of what happened.

    Args:
        name: the stage.
        params: all of params.yaml; only `sections` are recorded.
        sections: the parts of it that the stage reads.
        determining: what of them determines the result, and counts for the fingerprint; None takes `sections`.
        inputs: name to the file or folder read; the narrower the path, the fewer reruns.
        identity: ids, revisions and digests of models and servers that determine the result.
        root: the project's folder.
        is_main: False for ranks above 0: same paths, no MLflow, no lock, no publishing.
        aside: publish into this folder instead, in a run of its own that is no part of an execution.
        run_name: of that MLflow run.

    Raises:
        StageError: an input is missing, another process works on the same thing, or the disk is full.
        DataError, ModelError: an input is not what the stage before has published.
        ServerError: MLflow is out of reach.
        SystemExit: 128 + n after signal n (SIGTERM, SIGINT, SIGHUP); the run then reads KILLED.
    """
    root = root.absolute()
    with signals.handled(), full_disk_in_one_line(root):
        signals.check()
        made_of = {
            "stage": name,
            "schema": SCHEMA[name],
            "params": params_digest(*(sections if determining is None else determining)),
            "inputs": {key: _digest_of_input(root, path) for key, path in (inputs or {}).items()},
            "identity": dict(identity or {}),
        }
        works = (root / "work").resolve() / name  # of a checkout, a link to the project's
        out = aside or root / "out" / name
        stage = Stage(
            name, root, works, out, made_of, sections, params.recipe, run_name, is_main=is_main, params=params
        )
        if is_main and aside is None:
            stage.execution = Execution(root, params, name, STAGES, _earlier(root, name))
        with stage.open():
            if is_main:
                stage.tracker.log_inputs(_datasets(root, name, inputs or {}))
            yield stage


def _digest_of_input(root: Path, path: Path) -> str:
    found = digest(path)
    check_published(root, path.absolute(), found)
    return found


def _earlier(root: Path, name: str) -> dict[str, str]:
    found = {}
    for stage in STAGES[: STAGES.index(name)]:
        with contextlib.suppress(DllmError):
            found[stage] = str(read_record(root, stage, RUN).get("mlflow_run_id") or "")
    return {stage: run_id for stage, run_id in found.items() if run_id}


def _datasets(root: Path, name: str, inputs: Mapping[str, Path]) -> list[DatasetInput]:
    return [
        DatasetInput(NAMES.get(key, key), dvc_digest(root, path), _in_project(root, path), CONTEXTS.get(name, name))
        for key, path in inputs.items()
        if key != "checkpoint"
    ]


def _in_project(root: Path, path: Path) -> str:
    path = path.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def forget(root: Path, name: str) -> None:
    """Remove all work of a stage, so that its next call starts from nothing.

    Raises:
        StageError: a process works there.
    """
    for work in (root.absolute() / "work" / name).glob("*"):
        with lock_folder(work):
            shutil.rmtree(work)


def close(root: Path) -> list[str]:
    """Send what a project's MLflow runs have missed; mark as KILLED those whose processes were killed outright.

    Returns:
        The ids of the runs that were marked.

    Raises:
        ServerError: MLflow is out of reach.
    """
    root = root.absolute()
    if not is_behind(root):
        return []
    from dllm.tracking.delivery import synchronize  # MLflow takes 2 seconds to import

    return synchronize(root).closed
