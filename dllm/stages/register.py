"""Stage `register`: the trained checkpoint becomes a version in MLflow's registry, champion or challenger.

Changes the registry, so it is a verb and a task of the flow, and not a stage of DVC. Registering the same bytes again
makes no second version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.errors import StageError
from dllm.stages.workspace import open_stage
from dllm.tracking import model_registry, provenance
from dllm.workspace import publish_tree

SCORE = {True: "tau_micro", False: "score"}
"""What a draft, or else a diffusion model, is ranked by."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Register out/train/checkpoint with what out/evaluate found; return name, version, aliases and verdict.

    Raises:
        ServerError: MLflow is out of reach.
        StageError: the checkpoint or its evaluation is missing, or the evaluation is of another checkpoint.
    """
    root = root.absolute()
    checkpoint = root / "out" / "train" / "checkpoint"
    trained, evaluated = _record(root, "train", "run.json"), _record(root, "evaluate", "run.json")
    found = _record(root, "evaluate", "metrics.json")
    digest = provenance.digest(checkpoint)
    if evaluated["inputs"]["checkpoint"] != digest:
        hint = "run `dvc repro evaluate`"
        raise StageError("the evaluation is of another checkpoint", where="out/evaluate/run.json", hint=hint)
    _keep(root, checkpoint, digest, trained)
    lock, is_draft = root / "dvc.lock", "tau_micro" in found
    done = model_registry.register(
        root,
        params.register_.model_name,
        digest=digest,
        tau=found[SCORE[is_draft]],
        score_name="τ" if is_draft else found["score_is"],
        heldout_digest=found["heldout_digest"],
        target=json.dumps(evaluated["identity"]["target"], sort_keys=True),
        tags={
            "dllm.git_commit": str(trained["git"]["commit"]),
            "dllm.git_dirty": str(trained["git"]["dirty"]),
            "dllm.dvc_lock": provenance.digest(lock) if lock.is_file() else "none",
            "dllm.params": params_digest(params),
            "dllm.data_digest": trained["inputs"]["regenerate"],
            "dllm.evaluate_run": str(evaluated["mlflow_run_id"]),
        },
        run_id=trained["mlflow_run_id"],
    )
    new = "new" if done.is_new else "same bytes as before"
    print(f"register: {done.name} version {done.version} ({new}); {done.verdict}", flush=True)
    standing = {
        "model_name": done.name,
        "version": done.version,
        "aliases": list(done.aliases),
        "uri": done.uri,
        "digest": digest,
        SCORE[is_draft]: found[SCORE[is_draft]],
    }
    return _note(params, root, {"checkpoint": checkpoint}, standing, done.verdict)


def _note(
    params: Params, root: Path, inputs: dict[str, Path], standing: dict[str, Any], verdict: str
) -> dict[str, Any]:
    """Leave how the version stands in out/register/ and in MLflow, unless both say so already."""
    before = root / "out" / "register" / "metrics.json"
    if before.is_file():
        told: dict[str, Any] = _record(root, "register", "metrics.json")
        if {**told, "verdict": None} == {**standing, "verdict": None}:
            return told
    with open_stage(
        "register", params, sections=[params.register_], inputs=inputs, identity=standing, root=root
    ) as stage:
        stage.tracker.set_tags(
            {"dllm.model": f"{standing['model_name']}/{standing['version']}", "dllm.verdict": verdict}
        )
        metrics = {**standing, "verdict": verdict}
        stage.publish({}, metrics)
    return metrics


def _keep(root: Path, checkpoint: Path, digest: str, trained: dict[str, Any]) -> None:
    """Put the checkpoint where later runs do not touch it; hard links cost no room."""
    kept = model_registry.store_path(root, digest)
    if not kept.is_dir() or provenance.digest(kept) != digest:
        files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
        publish_tree(kept, files, {"run.json": trained})


def _record(root: Path, stage: str, name: str) -> dict[str, Any]:
    path = root / "out" / stage / name
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        hint = f"run `python -m dllm {stage}` or `dvc repro {stage}` first"
        raise StageError(f"stage {stage} has left no {name}", where=str(path), hint=hint) from None
    except ValueError:
        raise StageError("not JSON", where=str(path), hint=f"run `dvc repro -sf {stage}`") from None
    return record
