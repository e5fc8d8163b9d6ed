"""Stage `register`: the trained checkpoint becomes a version in the MLflow registry, champion or challenger.

It changes the registry, so it is a verb and a task of the flow, and not a stage of DVC. Registering the same bytes
again makes no second version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.errors import StageError
from dllm.files import lock_folder
from dllm.methods.figures import DASH
from dllm.methods.method import Method
from dllm.publishing import publish_tree
from dllm.registry import METHODS
from dllm.stages.records import check_published, read_record, read_records, trained_method
from dllm.stages.workspace import open_stage
from dllm.tracking import model_registry, places, provenance
from dllm.tracking.address import tracking_uri
from dllm.tracking.execution import REPORT


def run(params: Params, root: Path, report: Callable[[Path], Path] | None = None) -> dict[str, Any]:
    """Register out/train/checkpoint with its evaluation; return name, version, aliases and verdict.

    Args:
        params: all of params.yaml.
        root: the project's folder.
        report: writes the page of the run that `root/out` holds, which MLflow then keeps; None writes none.

    Raises:
        ConfigError: the store is a folder, and MLflow a server.
        ServerError: MLflow cannot be reached.
        ModelError: the checkpoint is not the one that the run in out/train/run.json made.
        StageError: the checkpoint or its evaluation is missing, the evaluation is of another checkpoint, another call
            registers the same bytes, or what is registered here would be deleted with the folder.
    """
    root = root.absolute()
    places.check(root, params.register_.store)
    checkpoint = root / "out" / "train" / "checkpoint"
    trained, evaluated = (read_record(root, stage, "run.json") for stage in ("train", "evaluate"))
    found = read_record(root, "evaluate", "metrics.json")
    digest = provenance.digest(checkpoint)
    check_published(root, checkpoint, digest)
    if evaluated["inputs"]["checkpoint"] != digest:
        hint = "run `dvc repro evaluate`"
        raise StageError("the evaluation is of another checkpoint", where="out/evaluate/run.json", hint=hint)
    method: Method[Any] = METHODS[trained_method({"evaluate": evaluated}) or params.train.mode]
    try:
        score = method.score(found)
    except KeyError as error:
        hint = "run `dvc repro -sf evaluate`"
        raise StageError(f"the evaluation has no {error}", where="out/evaluate/metrics.json", hint=hint) from None
    store = places.chosen(params.register_.store, tracking_uri(root))
    folder = places.folder_in(store, root, digest)
    lock = root / "dvc.lock"
    tags = {
        "dllm.git_commit": str(trained["git"]["commit"]),
        "dllm.git_dirty": str(trained["git"]["dirty"]),
        "dllm.dvc_lock": provenance.digest(lock) if lock.is_file() else "none",
        "dllm.params": params_digest(params),
        "dllm.data_digest": trained["inputs"]["regenerate"],
        "dllm.evaluate_run": str(evaluated["mlflow_run_id"]),
    }
    figures = [(label, value) for label, value in method.rows(read_records(root, "metrics.json")) if value != DASH]
    work = (root / "work").resolve() / "register" / digest[:16]
    work.mkdir(parents=True, exist_ok=True)
    with lock_folder(work):  # of two calls at once each would find no version of these bytes, and make one
        staged = folder or root / "work" / "register" / f"upload-{digest[:16]}"
        _keep(staged, checkpoint, digest, trained, link=folder is None)
        done = model_registry.register(
            root,
            params.register_.model_name,
            digest=digest,
            tau=score.value,
            score_name=score.name,
            interval=score.interval,
            heldout_digest=found["heldout_digest"],
            target=json.dumps(evaluated["identity"]["target"], sort_keys=True),
            tags=tags,
            run_id=trained["mlflow_run_id"],
            store=store,
            folder=staged,
            experiment=params.recipe,
            score_key=score.key,
            figures=figures,
        )
        if folder is None:
            shutil.rmtree(staged)
    new = "new" if done.is_new else "same bytes as before"
    print(f"register: {done.name} version {done.version} ({new}); {done.verdict}", flush=True)
    standing = {
        "model_name": done.name,
        "version": done.version,
        "aliases": list(done.aliases),
        "uri": done.uri,
        "digest": digest,
        score.key: score.value,
    }
    return _record(params, root, {"checkpoint": checkpoint}, standing, done.verdict, report)


def _record(
    params: Params,
    root: Path,
    inputs: dict[str, Path],
    standing: dict[str, Any],
    verdict: str,
    report: Callable[[Path], Path] | None,
) -> dict[str, Any]:
    """Record the standing of the version in out/register/ and MLflow, unless it is recorded already."""
    if (root / "out" / "register" / "metrics.json").is_file():
        recorded = read_record(root, "register", "metrics.json")
        if {**recorded, "verdict": None} == {**standing, "verdict": None}:
            return recorded
    sections = [params.register_]
    with open_stage("register", params, sections=sections, inputs=inputs, identity=standing, root=root) as stage:
        model = f"{standing['model_name']}/{standing['version']}"
        stage.tracker.set_tags({"dllm.model": model, "dllm.verdict": verdict})
        metrics = {**standing, "verdict": verdict}
        stage.publish({}, metrics)
        if report is not None:
            stage.tracker.log_artifact(report(root), REPORT.parent.name)
    return metrics


def _keep(kept: Path, checkpoint: Path, digest: str, trained: dict[str, Any], *, link: bool) -> None:
    """Copy the checkpoint to where later runs do not touch it: what damages out/train must not damage this one."""
    if not kept.is_dir() or provenance.digest(kept) != digest:
        files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
        publish_tree(kept, files, {"run.json": trained}, link=link)
