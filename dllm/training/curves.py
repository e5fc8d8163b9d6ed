"""Training curves as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANY = 5
"""With more curves than this in a panel, the legend stands beside it and the colors are ordered shades."""


def draw(records: Sequence[dict[str, Any]], path: Path, panels: Sequence[Sequence[str]]) -> None:
    """Plot figures of a training.jsonl over optimizer steps into a PNG.

    Args:
        records: what the journal holds.
        path: the PNG.
        panels: figures that share axes, panel by panel; of a figure `x`, `val_x` is drawn beside it in dots.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        many = len(names) > MANY
        shades = colormaps["viridis"].resampled(len(names)) if many else colormaps["tab10"]
        for color, name in enumerate(names):
            for series, style in ((name, "-"), (f"val_{name}", "o--")):
                points = [(r["step"], r[series]) for r in records if r.get(series) is not None]
                if points:
                    label = name if series == name else None
                    axes.plot(*zip(*points, strict=True), style, color=shades(color), markersize=3, label=label)
        axes.set_title(f"{names[0]} to {names[-1]}" if many else names[0])
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            # A long legend would cover the curves.
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
            axes.legend(fontsize="small", **beside)
    figure.supxlabel("optimizer step; dots: held-out text", fontsize="medium")
    figure.savefig(path, dpi=120)
