"""The metrics log, and its curves: each record is logged once, however often the run was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllm.files import atomic_write, open_to_append
from dllm.tracking.runs import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Phase = Literal["train", "validation"]
LABELS = ("step", "epoch", "time", "kind")
"""Keys of a record that are not metrics."""
MANY = 5
"""With more curves than this in a panel, the legend stands beside it and the colors are ordered shades."""


class MetricsLog:
    """Records of one run, in order.

    Args:
        path: the JSONL file; None keeps nothing (ranks above 0).
        tracker: gets every figure too, and leaves out those that it has.
    """

    def __init__(self, path: Path | None, tracker: Tracker) -> None:
        self.path, self.tracker = path, tracker

    def rewind(self, step: int) -> None:
        """Drop records after a step, which the resumed run writes again, and log those before it to the tracker.

        A line cut short by a kill goes too. The tracker may be another run than last time, or have missed records.
        """
        if self.path is None:
            return
        whole = [record for line in self._lines() if (record := _parse(line)) is not None]
        kept = [record for record in whole if record["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        for record in kept:
            self._track(record)

    def write(self, kind: Phase, step: int, epoch: float, figures: Mapping[str, float | None]) -> None:
        """Append a record; figures that are None are unknown and are not logged to the tracker."""
        if self.path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"step": step, "epoch": round(epoch, 4), "time": now, "kind": kind, **figures}
        with os.fdopen(open_to_append(self.path), "a") as file:
            file.write(json.dumps(record) + "\n")
        self._track(record)

    def _track(self, record: Mapping[str, Any]) -> None:
        known = {k: v for k, v in record.items() if k not in LABELS and v is not None}
        self.tracker.log_metrics(known, record["step"])

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path is not None and self.path.exists() else []


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a training.jsonl."""
    return [record for line in path.read_bytes().splitlines() if (record := _parse(line)) is not None]


def draw_curves(records: Sequence[dict[str, Any]], path: Path, panels: Sequence[Sequence[str]]) -> None:
    """Plot figures of a training.jsonl over optimizer steps into a PNG.

    Args:
        records: as `read` returns them.
        path: the PNG.
        panels: figures that share axes, panel by panel; of a figure `x`, `val_x` is drawn beside it in dots.
    """
    # matplotlib takes 0.5 seconds to import, and only rank 0 draws.
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        many = len(names) > MANY
        shades = colormaps["viridis"].resampled(len(names)) if many else colormaps["tab10"]
        shown: list[tuple[int, float]] = []
        for color, name in enumerate(names):
            for series, style in ((name, "-"), (f"val_{name}", "o--")):
                points = [(r["step"], r[series]) for r in records if r.get(series) is not None]
                shown += points
                if points:
                    label = name if series == name else None
                    axes.plot(*zip(*points, strict=True), style, color=shades(color), markersize=3, label=label)
        cut = ", first steps cut off" if _leave_out_start(axes, shown) else ""
        axes.set_title((f"{names[0]} to {names[-1]}" if many else names[0]) + cut)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            # A long legend would cover the curves.
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
            axes.legend(fontsize="small", **beside)
    figure.supxlabel("optimizer step; dots: held-out text", fontsize="medium")
    figure.savefig(path, dpi=120)


def _leave_out_start(axes: Axes, points: Sequence[tuple[int, float]]) -> bool:
    """Scale a panel to what follows the first twentieth of the steps, if it would fill less than a quarter of it."""
    start = max((step for step, _ in points), default=0) / 20
    values, later = [value for _, value in points], [value for step, value in points if step > start]
    height = max(later) - min(later) if later else 0.0
    if not 0 < height < (max(values) - min(values)) / 4:
        return False
    axes.set_ylim(min(later) - height / 10, max(later) + height / 2)
    return True


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line; None if it is no record: cut short by a kill, or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"step", "kind"} <= record.keys():
        return None
    figures = [value for key, value in record.items() if key not in LABELS and value is not None]
    return record if all(map(_is_number, [record["step"], *figures])) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
