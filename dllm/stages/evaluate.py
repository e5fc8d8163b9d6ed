"""Stage `evaluate`: measure the trained checkpoint on held-out data, in the way of the method that trained it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dllm.config.params import Params
from dllm.methods.method import EvaluateContext, Method
from dllm.models import targets
from dllm.prompts import sets
from dllm.registry import METHODS
from dllm.stages.plots import write_plots
from dllm.stages.records import read_record, trained_method
from dllm.stages.workspace import open_stage
from dllm.workspace import RUN

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
    trained = root / "out" / "train" / RUN
    name = trained_method({"train": read_record(root, "train", RUN)} if trained.is_file() else {}) or params.train.mode
    method: Method[Any] = METHODS[name]
    inputs = {key: root / path for key, path in method.reads.items()}
    asked = params.evaluate.sets or []
    read = {f"set {number} {entry.name}": sets.identity(entry, root) for number, entry in enumerate(asked)}
    with open_stage(
        "evaluate",
        params,
        sections=[params.target, params.evaluate],
        inputs={**inputs, "checkpoint": root / "out" / "train" / "checkpoint"},
        identity={"target": targets.identity(params.target), "method": name, **read},
        root=root,
    ) as stage:
        found = method.evaluate(EvaluateContext(params, root, stage.work, stage.tracker))
        stage.tracker.log_artifact(found.picture)
        stage.constants |= SIZES
        files = {PICTURE: found.picture, **found.files, **write_plots("evaluate", stage.work / "plots", found.plots)}
        stage.publish(files, found.metrics, headline=found.headline)
        for folder in found.scratch:
            shutil.rmtree(folder)
        return found.metrics
