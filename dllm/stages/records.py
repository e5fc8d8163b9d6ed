"""Records of finished stages: the metrics.json and run.json that each leaves in out/<stage>/.

run.json lists the digest of every file that its run has published, so a stage can tell what it reads from bytes that
were damaged, or that another run has left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm.digests import check_files, is_sealed, tree_digest, unsealed
from dllm.disk_faults import what_helps
from dllm.errors import DataError, ModelError, StageError
from dllm.publishing import RUN
from dllm.stages import STAGES
from dllm.tracking.provenance import RECORDS

Records = dict[str, dict[str, Any]]
OUTPUTS = "outputs"
"""In run.json: the digest of each published file by its name."""


def check_outside_results(to: Path) -> None:
    """Refuse to write into what a stage has published: it would count as damaged, and DVC would make it again.

    Raises:
        StageError: the path lies in such a folder.
    """
    for folder in to.absolute().parents:
        if folder.parent.name == "out" and folder.name in STAGES and (folder / RUN).is_file():
            what = f"this lies in the result of stage {folder.name}, which would count as damaged"
            raise StageError(what, where=str(to), hint="name another place by --to")


def read_record(root: Path, stage: str, file: str) -> dict[str, Any]:
    """Read a record of a stage.

    Raises:
        StageError: the stage has left none.
        DataError: the file is not a JSON object, or not the one that the stage's run wrote.
    """
    path = root / "out" / stage / file
    try:
        record = unsealed(path.read_bytes())
    except FileNotFoundError:
        hint = f"run `python -m dllm {stage}` or `dvc repro {stage}` first"
        raise StageError(f"stage {stage} has left no {file}", where=str(path), hint=hint) from None
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise DataError(what, where=str(path), hint=what_helps(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"damaged: {_one_line(error)}", where=str(path), hint=restore_hint(stage)) from None
    if file == RUN and OUTPUTS in record and not is_sealed(path.read_bytes()):
        raise DataError("damaged: it has lost its seal", where=str(path), hint=restore_hint(stage))
    if file != RUN:
        check_published(root, path)
    return record


def check_published(root: Path, path: Path, digest: str | None = None) -> None:
    """Compare a file or folder under out/ with the run.json of the stage that published it.

    What has no such record, as of an older version, is accepted.

    Args:
        root: the project's folder.
        path: a file of out/<stage>/, a folder in it, or out/<stage>/ itself.
        digest: of the path, by `provenance.digest`, where it is known.

    Raises:
        ModelError: a checkpoint has other bytes than the run published; the file is named.
        DataError: the same of anything else.
    """
    try:
        stage, *parts = path.relative_to(root / "out").parts
    except ValueError:
        return
    if not os.path.lexists(root / "out" / stage / RUN):
        return
    outputs = read_record(root, stage, RUN).get(OUTPUTS)
    if outputs is None:
        return
    error = ModelError if "checkpoint" in parts else DataError
    hint = restore_hint(stage)
    if path.is_file():
        if digest is not None and digest == outputs.get("/".join(parts)):
            return
        check_files(root / "out" / stage, {"/".join(parts): str(outputs.get("/".join(parts)))}, error=error, hint=hint)
        return
    prefix = "".join(f"{part}/" for part in parts)
    expected = {name.removeprefix(prefix): found for name, found in outputs.items() if name.startswith(prefix)}
    if not parts:
        expected = {name: found for name, found in expected.items() if name not in RECORDS}
    if digest is None or digest != tree_digest(expected):
        check_files(path, expected, error=error, hint=hint, but=RECORDS if not parts else ())


def restore_hint(stage: str) -> str:
    """Say how to restore what a stage has published."""
    ways = f"restore it by `dvc checkout --force out/{stage}`, or make it again by `dvc repro -sf {stage}`"
    return f"{ways}; if it stays damaged, see `python -m dllm verify`"


def read_records(root: Path, file: str) -> Records:
    """Read one file, metrics.json or run.json, of each stage that has left it.

    Raises:
        DataError: a file is not a JSON object.
    """
    return {stage: read_record(root, stage, file) for stage in STAGES if os.path.lexists(root / "out" / stage / file)}


def lineage(root: Path, checkpoint_digest: str) -> tuple[Records, Records]:
    """Read run.json and metrics.json of the stages that led to a checkpoint, and of the one that measured it.

    Each is followed by the digest of what the next one has read: what another run has left under out/ is not taken.

    Raises:
        DataError: a record is damaged.
    """
    found, runs = read_records(root, RUN), {}
    outputs = {stage: run.get(OUTPUTS) or {} for stage, run in found.items()}
    inputs = {stage: run.get("inputs") or {} for stage, run in found.items()}
    prefix, of_train = "checkpoint/", outputs.get("train", {})
    if tree_digest({name.removeprefix(prefix): of_train[name] for name in of_train if name.startswith(prefix)}) == (
        checkpoint_digest
    ):
        runs["train"] = found["train"]
        of_shards = {name: digest for name, digest in outputs.get("regenerate", {}).items() if name not in RECORDS}
        if "regenerate" in found and tree_digest(of_shards) == inputs["train"].get("regenerate"):
            runs["regenerate"] = found["regenerate"]
            if (prompts := outputs.get("prepare", {}).get("prompts.parquet")) is not None and (
                prompts == inputs["regenerate"].get("prompts")
            ):
                runs["prepare"] = found["prepare"]
    if inputs.get("evaluate", {}).get("checkpoint") == checkpoint_digest:
        runs["evaluate"] = found["evaluate"]
    return runs, {stage: read_record(root, stage, "metrics.json") for stage in runs}


def trained_method(runs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the method that train, or else evaluate, recorded in run.json; None for runs of versions that did not."""
    for stage in ("train", "evaluate"):
        identity = runs.get(stage, {}).get("identity")
        if isinstance(identity, dict) and isinstance(identity.get("method"), str):
            return str(identity["method"])
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
