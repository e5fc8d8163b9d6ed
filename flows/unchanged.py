"""Whether the pipeline has nothing to do: `python -m flows.unchanged` exits with 0 then, and with 1 otherwise.

`make run` asks before it starts a flow. Neither Prefect nor MLflow is imported, and no server is started.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from dllm.config.load import load_params, params_digest
from dllm.errors import DllmError
from dllm.stages import outside_data
from dllm.stages.records import read_record
from dllm.stages.schema import SCHEMA
from dllm.tracking.address import sqlite_path, tracking_uri
from dllm.tracking.run_journal import is_behind

ROOT = Path(__file__).resolve().parents[1]


def is_unchanged(root: Path) -> bool:
    """Return whether DVC has every stage up to date, and the registry has the checkpoint as out/register/ says.

    Stores that are not a local file are not asked: the flow does that.
    """
    try:
        made, run, of_evaluate = (
            read_record(root, stage, file)
            for stage, file in (("register", "metrics.json"), ("register", "run.json"), ("evaluate", "run.json"))
        )
        params = load_params(root / "params.yaml")
        store = sqlite_path(tracking_uri(root))
        if outside_data.changed(params, root) or outside_data.changed_sets(params, root):
            return False
        if is_behind(root) or store is None or not _has_version(store, made):
            return False
    except (DllmError, OSError, sqlite3.Error):
        return False  # the flow says what is wrong
    expected = (params_digest(params.register_), SCHEMA["register"], of_evaluate["inputs"]["checkpoint"])
    if (run["params"], run["schema"], run["inputs"].get("checkpoint")) != expected:
        return False
    status = [sys.executable, "-m", "dvc", "status", "--quiet"]
    return subprocess.run(status, cwd=root, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _has_version(store: Path, made: dict[str, Any]) -> bool:
    """Look a version and its aliases up in MLflow's own tables; MLflow itself takes 3 seconds to import and connect."""
    of_model = (made["model_name"],)
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as connection:
        versions = connection.execute("select version from model_versions where name = ?", of_model)
        aliases = connection.execute("select alias, version from registered_model_aliases where name = ?", of_model)
        own = {alias for alias, version in aliases if version == made["version"]}
        return (made["version"],) in versions.fetchall() and own == set(made["aliases"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not is_unchanged(ROOT):
        sys.exit(1)
    print("pipeline: every stage is up to date and the checkpoint is registered; FORCE=1 runs them again", flush=True)
