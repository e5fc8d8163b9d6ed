"""Records of finished stages: the metrics.json and run.json that each leaves in out/<stage>/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm.errors import DataError, StageError
from dllm.stages import STAGES

Records = dict[str, dict[str, Any]]


def read_record(root: Path, stage: str, file: str) -> dict[str, Any]:
    """Read a record of a stage.

    Raises:
        StageError: the stage has left none.
        DataError: the file is not a JSON object.
    """
    path = root / "out" / stage / file
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        hint = f"run `python -m dllm {stage}` or `dvc repro {stage}` first"
        raise StageError(f"stage {stage} has left no {file}", where=str(path), hint=hint) from None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where=str(path), hint=f"run the stage again: `dvc repro -sf {stage}`")
    return record


def read_records(root: Path, file: str) -> Records:
    """Read one file, metrics.json or run.json, of each stage that has left it.

    Raises:
        DataError: a file is not a JSON object.
    """
    return {stage: read_record(root, stage, file) for stage in STAGES if (root / "out" / stage / file).is_file()}


def trained_method(runs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the method that train, or else evaluate, recorded in run.json; None for runs of versions that did not."""
    for stage in ("train", "evaluate"):
        identity = runs.get(stage, {}).get("identity")
        if isinstance(identity, dict) and isinstance(identity.get("method"), str):
            return str(identity["method"])
    return None
