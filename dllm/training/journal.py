"""The metrics log: each record once in training.jsonl and in the tracker, however often the run was killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dllm.files import atomic_write
from dllm.tracking.runs import Tracker

Phase = Literal["train", "validation"]
LABELS = ("step", "epoch", "time", "kind")
"""Keys of a record that are not metrics."""


class MetricsLog:
    """Records of one run, in order.

    Args:
        path: the JSONL file; None keeps nothing (ranks above 0).
        tracker: gets every figure too.
    """

    def __init__(self, path: Path | None, tracker: Tracker) -> None:
        self.path, self.tracker = path, tracker
        self._told: set[tuple[int, str]] = set()

    def rewind(self, step: int) -> None:
        """Drop records after a step, which the resumed run writes again.

        A line cut short by a kill goes too. A tracker that is another run than last time is told everything again.
        """
        if self.path is None:
            return
        whole = [record for line in self._lines() if (record := _parse(line)) is not None]
        kept = [record for record in whole if record["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        known_by = self.path.with_suffix(".run")
        if known_by.exists() and known_by.read_text() == str(self.tracker.run_id):
            self._told = {(record["step"], record["kind"]) for record in whole}
        else:
            atomic_write(known_by, str(self.tracker.run_id).encode())
            for record in kept:
                self._tell(record)

    def write(self, kind: Phase, step: int, epoch: float, figures: Mapping[str, float | None]) -> None:
        """Append a record; figures that are None are unknown and are not logged to the tracker."""
        if self.path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"step": step, "epoch": round(epoch, 4), "time": now, "kind": kind, **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._tell(record)

    def _tell(self, record: Mapping[str, Any]) -> None:
        if (record["step"], record["kind"]) not in self._told:
            known = {k: v for k, v in record.items() if k not in LABELS and v is not None}
            self.tracker.log_metrics(known, record["step"])

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path is not None and self.path.exists() else []


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a training.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "kind"} <= record.keys() else None
