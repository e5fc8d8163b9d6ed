"""A run's curves as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(records: Sequence[dict[str, Any]], path: Path, panels: Sequence[Sequence[str]]) -> None:
    """Plot figures of a training.jsonl over optimizer steps into a PNG.

    Args:
        records: what the journal holds.
        path: the PNG.
        panels: figures that share axes, panel by panel; of a figure `x`, `val_x` is drawn beside it in dots.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, name in enumerate(names):
            for series, style in ((name, "-"), (f"val_{name}", "o--")):
                points = [(r["step"], r[series]) for r in records if r.get(series) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", markersize=3, label=series)
        axes.set_xlabel("optimizer step")
        axes.set_title(", ".join(names[:1]))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
