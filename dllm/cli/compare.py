"""The verb `compare`: runs in folders, or of git revisions and DVC experiments, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dllm.cli import revisions
from dllm.errors import ConfigError
from dllm.report import comparison, page
from dllm.stages import DVC_STAGES
from dllm.stages.records import check_outside_results

MOST = 6
"""Runs in one comparison; more columns are not legible."""
FILES = ("run.json", "metrics.json")
MORE = {"train": ("training.jsonl",), "evaluate": ("samples.json", "prompts.parquet")}
"""What else the page shows; a revision of an older version may lack it, or evaluation of another method."""


def print_comparison(names: Sequence[str], root: Path, to: Path, console: Console | None = None) -> None:
    """Print runs side by side, and write the page.

    Args:
        names: folders that hold an out/, git revisions of the project, or DVC experiments.
        root: the project.
        to: the page.
        console: where to print.

    Raises:
        ConfigError: fewer than two runs, or too many; or the page is not named as one.
        DataError: one is neither a folder nor a revision with results.
        StageError: a folder holds no finished stage, or the page lies in the result of one.
    """
    if not 2 <= len(names) <= MOST:
        raise ConfigError(f"compare takes 2 to {MOST} runs, got {len(names)}", hint="name folders or revisions")
    if len(set(names)) < len(names):
        raise ConfigError(f"compare was given the same run twice: {' '.join(names)}")
    if to.suffix != ".html":  # it replaces what stands there: a mistaken name must not cost a file of another kind
        raise ConfigError("a page's name ends in .html", where=f"--to {to}", hint="name another file by --to")
    check_outside_results(to.resolve())
    with tempfile.TemporaryDirectory(prefix="dllm-compare-") as scratch:
        places = [revisions.folder(name, root, "out/") for name in names]
        known = [place.resolve() for place in places if place]
        labels = dict(zip(known, comparison.labels(known), strict=True))
        runs = [
            page.Run.read(place.resolve(), labels[place.resolve()])
            if place
            else page.Run.read(_copy(name, root, Path(scratch) / str(number)), name)
            for number, (name, place) in enumerate(zip(names, places, strict=True))
        ]
        comparison.compare(runs, to, console)
    print(f"compare: {to}")


def _copy(name: str, root: Path, to: Path) -> Path:
    """Copy the records of a revision: no weights, no responses."""
    for stage in DVC_STAGES:
        folder = to / "out" / stage
        folder.mkdir(parents=True)
        for file in FILES:
            revisions.copy(name, root, f"out/{stage}/{file}", folder / file)
        listed = (folder / "run.json").read_text(errors="replace")
        for file in MORE.get(stage, ()):
            if f'"{file}"' in listed:
                revisions.copy(name, root, f"out/{stage}/{file}", folder / file)
    return to
