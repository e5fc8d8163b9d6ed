"""Stage `evaluate`: measure the trained checkpoint on held-out data, in the way of the method that trained it.

Any other checkpoint is measured by the same work, into a folder of its own: it is no stage of DVC then.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dllm.config.params import Params
from dllm.errors import StageError
from dllm.methods.method import EvaluateContext, Method
from dllm.models import checkpoints, target_identity
from dllm.outside import one_line
from dllm.prompts import sets
from dllm.publishing import RUN
from dllm.registry import METHODS
from dllm.stages.outside_data import set_key
from dllm.stages.plots import write_plots
from dllm.stages.records import read_record, trained_method
from dllm.stages.workspace import Stage, open_stage

PICTURE = "evaluation.png"
"""Name of the picture in out/evaluate/, the same for every method: dvc.yaml names it."""

SIZES = {"block_size", "draft_layers", "draft_params", "params", "trained_params", "threads"}
"""What among the metrics describes the model and the machine."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Evaluate out/train/checkpoint, publish out/evaluate/, and return the metrics.

    Raises:
        DataError: there is no held-out data that fits the model, or a prompt set cannot be loaded.
        ModelError: a model is missing or cannot be read, or the checkpoint is not the one that the run in
            out/train/run.json made.
    """
    record = read_record(root, "train", RUN) if (root / "out" / "train" / RUN).is_file() else {}
    name = trained_method({"train": record}) or params.train.mode
    checkpoint = root / "out" / "train" / "checkpoint"
    with _open(params, root, name, checkpoint) as stage:
        return _measure(params, root, name, checkpoint, stage)


def run_on(checkpoint: str, params: Params, root: Path, to: Path) -> tuple[Method[Any], dict[str, Any]]:
    """Evaluate any checkpoint on this project's held-out data, and publish into a folder.

    Args:
        checkpoint: as in `dllm.models.checkpoints.find`.
        params: which target, prompts and settings; the method is the checkpoint's own, else that of `train.mode`.
        root: the project's folder, in which prepare has run (and train, where the method reads what it left).
        to: new or empty.

    Returns: the method, and the metrics.

    Raises:
        StageError: the folder is not empty.
        DataError, ModelError: as in `run`; or the checkpoint is not to be had, or for another commit of the target.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StageError("the output folder is not empty", where=str(to), hint="name another by --to")
    found = checkpoints.find(checkpoint, root, params.target.trust_remote_code)
    checkpoints.require_same_revision(found, params.target)
    record = checkpoints.run_record(found)
    trained_for = (record.get("identity", {}).get("target") or {}).get("model", params.target.model)
    if trained_for != params.target.model:
        told = f"{checkpoint} was trained for {trained_for}, and is measured with {params.target.model} of params.yaml"
        print(f"warning: {one_line(told)}", file=sys.stderr, flush=True)
    name = trained_method({"train": record}) or params.train.mode
    with _open(params, root, name, found, named=checkpoint, to=to) as stage:
        return METHODS[name], _measure(params, root, name, found, stage)


def _open(
    params: Params, root: Path, name: str, checkpoint: Path, named: str | None = None, to: Path | None = None
) -> AbstractContextManager[Stage]:
    method: Method[Any] = METHODS[name]
    asked = params.evaluate.sets or []
    read = {set_key(number, entry): sets.identity(entry, root) for number, entry in enumerate(asked)}
    own = {} if named is None else {"checkpoint": named}
    return open_stage(
        "evaluate",
        params,
        sections=[params.target, params.evaluate],
        inputs={**{key: root / path for key, path in method.reads.items()}, "checkpoint": checkpoint},
        identity={"target": target_identity.identity(params.target), "method": name, **read, **own},
        root=root,
        aside=to,
        run_name=None if named is None else f"evaluate {named}",
    )


def _measure(params: Params, root: Path, name: str, checkpoint: Path, stage: Stage) -> dict[str, Any]:
    method: Method[Any] = METHODS[name]
    found = method.evaluate(EvaluateContext(params, root, stage.work, stage.tracker, checkpoint))
    stage.tracker.log_artifact(found.picture)
    stage.constants |= SIZES
    files = {PICTURE: found.picture, **found.files, **write_plots("evaluate", stage.work / "plots", found.plots)}
    stage.publish(files, found.metrics, headline=found.headline)
    for folder in found.scratch:
        shutil.rmtree(folder)
    return found.metrics
