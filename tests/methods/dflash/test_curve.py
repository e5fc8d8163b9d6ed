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
