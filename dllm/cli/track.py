"""`python -m dllm track`: send to MLflow what it has missed."""

from __future__ import annotations

import sys
from pathlib import Path

from dllm.tracking.run_journal import FOLDER


def sync(root: Path) -> None:
    """Send what runs of a project have logged while MLflow was away, and close runs whose processes were killed.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI is not the address of a store.
        ServerError: the store is out of reach.
        StageError: its file is damaged, or its disk is full.
    """
    from dllm.tracking.delivery import synchronize  # MLflow takes 2 seconds to import

    report = synchronize(root, everything=True)
    for line in report.refused:
        print(f"warning: {line}", file=sys.stderr)
    for store, count in report.elsewhere.items():
        print(f"warning: {count} records wait for another store: set MLFLOW_TRACKING_URI to {store}", file=sys.stderr)
    sent, runs, closed = sum(report.sent.values()), len(report.sent), len(report.closed)
    print(f"track: {sent} records of {runs} runs sent, {closed} runs closed as KILLED ({root / FOLDER})")
