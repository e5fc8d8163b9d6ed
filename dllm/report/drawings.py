"""Curves of a run as SVG that takes the text color of the page, so that one file serves light and dark screens."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INK = "#010203"
"""Stands for the page's text color in a drawing."""
COLORS = ("#3182ce", "#dd6b20", "#38a169", "#b83280", "#805ad5", "#b7791f")
PER_OFFSET = re.compile(r"_k\d+$")
MAX_PANELS = 3


@dataclass(frozen=True)
class Series:
    """One line; dotted ones share the color of the line of the same label."""

    label: str
    points: Sequence[tuple[float, float]]
    dotted: bool = False


def lines(title: str, x: str, series: Sequence[Series], *, percent: bool = False) -> str:
    """Draw lines over common axes.

    Args:
        title: of the drawing.
        x: label of the horizontal axis.
        series: those without a point are left out.
        percent: the values are shares and are shown as percentages.

    Returns:
        An `<svg>` element, or "" if there is nothing to draw.
    """
    shown = [each for each in series if each.points]
    if not shown:
        return ""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Text stays text; ids are salted so that equal drawings are equal bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        labels = list(dict.fromkeys(each.label for each in shown))
        for each in shown:
            xs, ys = zip(*each.points, strict=True)
            heights = [100 * value for value in ys] if percent else ys
            color = COLORS[labels.index(each.label) % len(COLORS)]
            style = {"linestyle": "--", "marker": "o", "markersize": 3} if each.dotted else {"linestyle": "-"}
            if len(xs) <= 32 and not each.dotted:
                style |= {"marker": "o", "markersize": 3}
            label = "_" if each.dotted else each.label.replace("$", r"\$")  # no mathematics
            axes.plot(xs, heights, color=color, linewidth=1.6, label=label, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.set_xlabel(x, color=INK)
        if percent:
            axes.set_ylabel("%", color=INK)
            axes.set_ylim(0, 103)
        axes.tick_params(colors=INK)
        axes.grid(alpha=0.2, color=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        if len(labels) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def training(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Draw the loss and the main figures of training over optimizer steps; held-out values are dots on a dashed line.

    Args:
        runs: records of training.jsonl by a label of the run; one label for a single run.
    """
    names: dict[str, None] = {}
    for records in runs.values():
        for record in records:
            names |= {key.removeprefix("val_"): None for key in record if key.startswith("val_")}
    shown = sorted((n for n in names if not PER_OFFSET.search(n)), key=lambda name: name != "loss")
    drawn = []
    for name in shown:
        series = [
            Series(label or name, points, dotted=key != name)
            for label, records in runs.items()
            for key in (name, f"val_{name}")
            if (points := [(r["step"], r[key]) for r in records if r.get(key) is not None])
        ]
        if any(not each.dotted for each in series) and any(each.dotted for each in series):
            drawn.append(lines(name.replace("_", " "), "optimizer step (dashed: held-out)", series))
    return drawn[:MAX_PANELS]
