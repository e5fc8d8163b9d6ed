from pathlib import Path

import pytest

from dllm.decoding.acceptance import Acceptance, RoundCounts
from dllm.methods.dflash import curve


def figures(block_size: int, runs: list[int]) -> dict:
    acceptance = Acceptance(block_size)
    acceptance.add([RoundCounts(run + 1, run, block_size - 1) for run in runs])
    return acceptance.figures()


PAYING = figures(4, [0, 1, 3]) | {
    "throughput": {
        "tokens_per_s": {"1": {"0": 50.0, "1": 70.0, "3": 80.0}, "32": {"0": 900.0, "1": 800.0, "3": 600.0}},
        "best_draft_tokens": {"1": 3, "32": 0},
    }
}


@pytest.mark.parametrize(
    ("found", "block_size"),
    [(figures(8, [0, 1, 1, 3, 7]) | {"speedup": 1.5}, 8), (figures(16, []), 16), (figures(2, [0, 1]), 2), (PAYING, 4)],
)
def test_a_readable_png_appears_whole(found: dict, block_size: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "acceptance.png"
    curve.draw(found, path, f"target, block {block_size}")
    pixels = imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.02, "an empty picture"
    assert [p.name for p in tmp_path.iterdir()] == ["acceptance.png"]


def test_throughput_has_a_panel_with_the_best_choice_of_each_concurrency_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), real(self, *args, **more)))
    curve.draw(PAYING, tmp_path / "acceptance.png", "target, block 4")
    (figure,) = drawn
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    panel = panels["Expected throughput, the best choice marked"]
    stars = [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_marker() == "*"]
    assert stars == [(3, 80), (0, 900)]
    curves = {line.get_label(): line.get_xydata().tolist() for line in panel.lines if line.get_marker() != "*"}
    assert curves["1 at once"] == [[0, 50], [1, 70], [3, 80]] and len(curves) == 2
    expected = [(0, 50.0, "1 at once"), (1, 70.0, "1 at once"), (3, 80.0, "1 at once"), (0, 900.0, "32 at once")]
    assert curve.points(PAYING, PAYING)["throughput"][:4] == expected
