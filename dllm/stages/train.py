"""Stage `train`: train with the method that `train.mode` names, as one rank or as one of several.

Joins method and training loop, and publishes the best checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.methods.method import Method, Publication, TrainContext
from dllm.models import target_identity
from dllm.models.precision import compute_dtype, name_of
from dllm.registry import METHODS
from dllm.stages import other_work
from dllm.stages.plots import training_points, write_plots
from dllm.stages.training_rows import announce, read_splits
from dllm.stages.workspace import Stage, open_stage
from dllm.training import journal
from dllm.training.batches import Example
from dllm.training.distributed import Join, Ranks
from dllm.training.loop import Loop
from dllm.training.strategy import Split
from dllm.workspace import fingerprint_of

HEADLINE = ("steps", "best_step")
"""Figures of headline.json, besides those of the held-out text."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Train, publish out/train/, and return its metrics.

    Raises:
        DataError: no training rows are left, or shards or features cannot be read.
        ModelError: a model is missing or does not fit.
        StageError: the gradient is not finite, or another rank was lost.
    """
    with Join() as ranks:
        identity = target_identity.identity(params.target)
        with open_stage(
            "train",
            params,
            sections=[params.target, params.train],
            determining=[params.target, other_work.determining(params.train, ranks.world)],
            inputs={"regenerate": root / "out" / "regenerate"},
            identity={"target": identity, "method": params.train.mode, **METHODS[params.train.mode].identity(params)},
            root=root,
            is_main=ranks.is_main,
        ) as stage:
            return _train(params, root, stage, ranks, identity)


def _train(params: Params, root: Path, stage: Stage, ranks: Ranks, identity: dict[str, Any]) -> dict[str, Any]:
    method: Method[Any] = METHODS[params.train.mode]
    train, heldout = read_splits(root / "out" / "regenerate", params.target, params.train)
    computed_in = compute_dtype(params.train.compute_dtype, ranks.device)
    if ranks.is_main:
        announce(params.target, params.train, train, heldout, ranks)
        inputs = {**stage.digests, "target": fingerprint_of({**identity, "target": params_digest(params.target)})}
        if line := other_work.note(stage.work, params.train, ranks.world, inputs):
            print(f"train: {line}", file=sys.stderr, flush=True)
        stage.record |= {"ranks": ranks.world, "computed_in": name_of(computed_in)}
    splits: dict[Split, list[Example]] = {"train": train.kept, "heldout": heldout.kept}
    ctx = TrainContext(params, params.train.method_settings, root, ranks, identity, splits, stage.work)
    strategy = method.build(ctx)
    loop = Loop(strategy, params.train, ranks, work=stage.work, tracker=stage.tracker, mfu_dtype=computed_in)
    outcome = loop.run()
    metrics = {
        **outcome.validation,
        "best_step": outcome.step,
        "steps": outcome.steps,
        "rows": len(train.kept),
        "rows_dropped": train.dropped,
        "rows_cut": train.cut,
        "tokens": outcome.tokens,
        strategy.predictions_name: outcome.predictions,
        "seconds": round(outcome.seconds, 3),
        **method.sizes(strategy),
    }
    stage.constants |= {"block_size", *method.sizes(strategy)}
    if ranks.is_main:
        _publish(stage, method.publish(ctx, strategy, outcome, stage.work), metrics, outcome.steps)
    return metrics


def _publish(stage: Stage, publication: Publication, metrics: dict[str, Any], step: int) -> None:
    log, picture, inputs = (stage.work / name for name in ("training.jsonl", "curves.png", "files.json"))
    records, curves = journal.read(log), {"loss": "loss", **publication.curves}
    journal.draw_curves(records, picture, publication.panels)
    stage.tracker.log_artifact(picture)
    # The list is there for every method, so that DVC has a folder to depend on.
    inputs.write_text(json.dumps(sorted(publication.evaluation)) + "\n")
    files = {f"checkpoint/{name}": path for name, path in publication.checkpoint.items()}
    files |= {f"evaluation/{name}": path for name, path in publication.evaluation.items()}
    files |= {"evaluation/files.json": inputs, "training.jsonl": log, "curves.png": picture}
    files |= write_plots("train", stage.work / "plots", training_points(records, curves))
    compared = [name for figure in curves.values() for name in (figure, f"val_{figure}")]
    points: dict[int, dict[str, float]] = {}
    for record in records:  # of training and of validation, which may be at the same step
        known = {name: record[name] for name in compared if record.get(name) is not None}
        points.setdefault(record["step"], {}).update(known)
    stage.tracker.log_curves(points)
    headline = {name: metrics.get(name) for name in (*(f"val_{figure}" for figure in curves.values()), *HEADLINE)}
    stage.publish({**files, **publication.beside}, metrics, step=step, headline=headline)
