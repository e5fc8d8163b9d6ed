"""Points of the plots that dvc.yaml names: one CSV file a plot, in out/<stage>/plots/.

Every file is there for every method, without a row where the method measures nothing of the kind: DVC warns of a
file that is missing, and not of one without rows. Each row is a point of one line, which `series` names.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm.methods.figures import Points

PLOTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "train": {
        "loss": ("step", "loss"),
        "accuracy": ("step", "accuracy"),
        "acceptance_length": ("step", "acceptance_length"),
    },
    "evaluate": {
        "acceptance": ("offset", "accepted"),
        "throughput": ("draft_tokens", "tokens_per_s"),
        "masked_accuracy": ("masked", "accuracy"),
        "parallel_decoding": ("tokens_per_pass", "words_correct"),
    },
}
"""Plots of each stage by name, with the columns of x and y. A plot for a new method is a line here and an entry of
dvc.yaml."""


def write_plots(stage: str, folder: Path, points: Mapping[str, Points]) -> dict[str, Path]:
    """Write the CSV file of each plot of a stage.

    Args:
        stage: a key of `PLOTS`.
        folder: where the files go.
        points: by plot; a point without a y is left out.

    Returns: the files, by their names in out/<stage>/.

    Raises:
        KeyError: a name is no plot of the stage.
    """
    for name in points:
        PLOTS[stage][name]
    folder.mkdir(exist_ok=True)
    files = {}
    for name, columns in PLOTS[stage].items():
        path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, "series"])
            writer.writerows(point for point in points.get(name, ()) if point[1] is not None)
        files[f"plots/{path.name}"] = path
    return files


def training_points(records: Sequence[Mapping[str, Any]], curves: Mapping[str, str]) -> dict[str, Points]:
    """Return the points of figures over optimizer steps.

    Args:
        records: of training.jsonl.
        curves: name of the figure, by plot; that on held-out text has the prefix val_.
    """
    return {plot: list(_of_figure(records, figure)) for plot, figure in curves.items()}


def _of_figure(records: Sequence[Mapping[str, Any]], figure: str) -> Iterator[tuple[float, float | None, str]]:
    for series, name in (("training", figure), ("held-out", f"val_{figure}")):
        values = {record["step"]: record[name] for record in records if name in record}
        yield from ((step, value, series) for step, value in values.items())
