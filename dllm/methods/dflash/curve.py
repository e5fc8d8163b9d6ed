"""The picture of a draft: acceptance by offset in the block, and the distribution of tokens per round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.files import atomic_path
from dllm.methods.figures import Points, by_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#22252b", "#6b7280", "#e5e7eb"
GIVEN, REACHED, BARS = "#d9822b", "#2b6cb0", "#90b4d8"


def draw(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw acceptance by offset and the distribution of tokens per round as a PNG.

    Args:
        figures: those of `Acceptance.figures`, with `speedup` and `throughput` where they were measured.
        path: the PNG.
        title: what was decoded, e.g. the name of the target.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paying = figures.get("throughput")
    figure = Figure(figsize=(15 if paying else 10, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state
    curve, spread, *more = figure.subplots(1, 3 if paying else 2, width_ratios=[3, 2, 3] if paying else [3, 2])
    if paying:
        _draw_throughput(more[0], paying)
    _draw_curve(curve, figures["acceptance_by_offset"], figures["conditional_acceptance_by_offset"])
    _draw_spread(spread, figures["accepted_histogram"], figures["tau_micro"])
    figure.suptitle(_headline(figures, title), x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png")


def points(metrics: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Points]:
    """Return the points of acceptance and throughput for DVC.

    Args:
        metrics: metrics.json.
        shown: figures of `Acceptance.figures` on the most prompts.
    """
    given, reached = "given that all before it were", "with all before it"
    acceptance = [
        (offset, value, series)
        for series, name in ((reached, "acceptance_by_offset"), (given, "conditional_acceptance_by_offset"))
        for offset, value in enumerate(shown[name], start=1)
    ]
    table = (metrics.get("throughput") or {}).get("tokens_per_s", {})
    throughput = [
        (int(tokens), value, f"{concurrency} at once")
        for concurrency, row in by_number(table).items()
        for tokens, value in by_number(row).items()
    ]
    return {"acceptance": acceptance, "throughput": throughput}


def _headline(figures: Mapping[str, Any], title: str) -> str:
    parts = [title]
    if figures["tau_micro"] is not None:
        parts.append(f"τ {figures['tau_micro']:.2f}")
    if figures.get("speedup") is not None:
        parts.append(f"{figures['speedup']:.2f}× as fast as autoregressive")
    return " · ".join([*parts, f"{figures['rounds']:,} rounds"])


def _draw_curve(axes: Axes, reached: list[float | None], given: list[float | None]) -> None:
    for values, color, label in (
        (given, GIVEN, "accepted, given that all before it were"),
        (reached, REACHED, "accepted together with all before it"),
    ):
        points = [(k, 100 * v) for k, v in enumerate(values, start=1) if v is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linewidth=2, label=label)
    # Labels of many offsets would overlap: then only the ends are labelled.
    last = len(reached)
    for k, value in enumerate(reached, start=1):
        if value is not None and (last <= 9 or k in (1, last)):
            below = (0, -13)
            axes.annotate(
                f"{100 * value:.0f}", (k, 100 * value), below, textcoords="offset points", ha="center",
                fontsize=8, color=REACHED,
            )  # fmt: skip
    _style(axes, "Draft accepted, by offset in the block", "offset k (tokens after the anchor)", "% of rounds")
    axes.set_ylim(-8, 105)
    axes.set_xlim(0.6, last + 0.4)
    step = 1 if last <= 16 else 4
    axes.set_xticks(range(1, last + 1, step))
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _draw_spread(axes: Axes, histogram: list[int], tau: float | None) -> None:
    total = sum(histogram) or 1
    counts = range(1, len(histogram))
    axes.bar(counts, [100 * histogram[n] / total for n in counts], color=BARS, width=0.8)
    if tau is not None:
        axes.axvline(tau, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        on_right = tau < len(histogram) / 2
        axes.annotate(
            f"mean {tau:.2f}",
            (tau, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 if on_right else -4, -2),
            textcoords="offset points",
            ha="left" if on_right else "right",
            va="top",
            fontsize=9,
            color=INK,
        )
    _style(axes, "Tokens per round", "tokens generated, the bonus token included", "% of rounds")
    axes.set_xticks(range(1, len(histogram), 1 if len(histogram) <= 17 else 4))


def _draw_throughput(axes: Axes, paying: Mapping[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    table = by_number(paying["tokens_per_s"])
    shades = colormaps["viridis"].resampled(len(table) + 1)
    for index, (concurrency, row) in enumerate(table.items()):
        points = [(int(tokens), value) for tokens, value in by_number(row).items()]
        axes.plot(*zip(*points, strict=True), color=shades(index), linewidth=2, label=f"{concurrency} at once")
        best = paying["best_draft_tokens"][concurrency]
        axes.plot([best], [row[str(best)]], marker="*", markersize=13, color=shades(index))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _style(axes, "Expected throughput, the best choice marked", "draft tokens per round", "tokens per second")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GRID)
