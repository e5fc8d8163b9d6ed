"""The picture of a diffusion model: accuracy by noise level, and quality against tokens per forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: no global state, no display

from dllm.methods.figures import Points


def draw(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy by noise level, and correct words by tokens per forward pass, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = [level for level in metrics["by_noise_level"] if level["accuracy"] is not None]
    left.plot([level["masked_up_to"] for level in levels], [level["accuracy"] for level in levels], "o-")
    left.set(xlabel="fraction of tokens masked, up to", ylabel="accuracy on masked tokens", ylim=(0, 1.05))
    for (label, places), mark in zip(_lines(metrics).items(), ("s--", "o-", "^", "v"), strict=False):
        right.plot(*zip(*places, strict=True), mark, label=label)
        # Labels of one line stand below its points, those of the next beside them: the points often coincide.
        at = {"xytext": (0, -13), "ha": "center"} if mark == "s--" else {"xytext": (7, -3), "ha": "left"}
        for place, names in places.items():
            right.annotate(", ".join(names), place, textcoords="offset points", fontsize=8, **at)
    right.legend()
    tokens = [way["tokens_per_pass"] for way in metrics["decodings"]]
    if max(tokens) > 8 * min(tokens) > 0:
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
    right.margins(x=0.2)
    right.set(xlabel="tokens per forward pass", ylabel="fraction of words correct", ylim=(0, 1.05))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def points(metrics: Mapping[str, Any]) -> dict[str, Points]:
    """Return the points of the same two plots for DVC."""
    levels = [(level["masked_up_to"], level["accuracy"], "held-out responses") for level in metrics["by_noise_level"]]
    ways = [(place[0], place[1], label) for label, places in _lines(metrics).items() for place in places]
    return {"masked_accuracy": levels, "parallel_decoding": ways}


def _lines(metrics: Mapping[str, Any]) -> dict[str, dict[tuple[float, float], list[str]]]:
    """Group the ways of decoding by kind, and by position those whose points coincide."""
    lines: dict[str, dict[tuple[float, float], list[str]]] = {}
    default = metrics["decodings"][0]["sampler"]
    for way in metrics["decodings"]:
        by_number = "number of passes" if way["sampler"] == default else way["sampler"]
        line = lines.setdefault("threshold" if way["threshold"] is not None else by_number, {})
        number = way["threshold"] or way["steps"]
        name = way["way"] if number is None else f"{number:g}"
        line.setdefault((way["tokens_per_pass"], way["words_exact"] or 0.0), []).append(name)
    return lines
