"""Curves that can be read: what follows the first steps is not dwarfed by them, and nothing else is cut off."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from dllm.training.journal import draw_curves


def drawn(values: list[float], path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[float, float]]:
    """Draw a loss, and return title and limits of its panel."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: figures.append(self))
    draw_curves([{"step": step, "loss": value} for step, value in enumerate(values)], path, [["loss"]])
    (axes,) = figures[0].axes
    return axes.get_title(), axes.get_ylim()


def test_a_start_that_dwarfs_the_rest_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [80.0, 40.0, 20.0, *(13 - step / 100 for step in range(100))]
    title, (low, high) = drawn(values, tmp_path / "curves.png", monkeypatch)
    assert title == "loss, first steps cut off" and 11.8 < low < min(values) and 13 < high < 14


@pytest.mark.parametrize(
    "values",
    [[1 + step / 50 for step in range(100)], [13.0] * 100, [80.0], [], [80.0, *([13.0] * 50), 79.0]],
    ids=["even", "level", "one", "none", "a peak later on"],
)
def test_otherwise_all_is_shown(values: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title, (low, high) = drawn(values, tmp_path / "curves.png", monkeypatch)
    assert title == "loss"
    assert not values or low <= min(values) <= max(values) <= high
