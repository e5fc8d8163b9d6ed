"""Checkpoints are whole or absent."""

from pathlib import Path

import pytest
import torch

from dllm.errors import ModelError, StageError
from dllm.training.checkpoints import Checkpoints, TrainState


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> Path:
    return checkpoints.save(
        TrainState(step=step, best_step=best), {"w:m": torch.full((2,), float(step))}, lambda d: _write(d, step)
    )


def _write(directory: Path, step: int) -> None:
    (directory / "config.json").write_text(str(step))


def test_newest_and_best_are_kept_and_pointed_at(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "step-000001", "step-000003", "step-000004"]
    assert (tmp_path / "best").read_text() == "step-000001\n"
    newest = checkpoints.latest()
    assert newest is not None and newest.name == "step-000004"
    state, tensors = checkpoints.load(newest)
    assert (state.step, tensors["w:m"].tolist()) == (4, [4.0, 4.0])


def test_an_unfinished_one_is_never_taken_for_whole(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)

    def full_disk(directory: Path) -> None:
        _write(directory, 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(TrainState(step=2), {}, full_disk)
    assert checkpoints.latest() == tmp_path / "step-000001"
    save(checkpoints, 2)
    assert checkpoints.latest() == tmp_path / "step-000002"
    assert not list(tmp_path.glob(".*"))


def test_a_lost_pointer_costs_nothing(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 9)
    save(checkpoints, 1000000)
    (tmp_path / "latest").unlink()
    assert checkpoints.latest() == tmp_path / "step-1000000"


def test_a_refused_write_of_tensors_is_one_line(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)

    def occupied(directory: Path) -> None:
        (directory / "optimizer.safetensors").mkdir()

    with pytest.raises(StageError, match="cannot be written"):
        checkpoints.save(TrainState(step=1), {"w:m": torch.zeros(1)}, occupied)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors"])
def test_a_damaged_one_is_refused_by_name(tmp_path, name) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = save(checkpoints, 1)
    (path / name).write_bytes(b"{broken")
    with pytest.raises(ModelError, match="step-000001"):
        checkpoints.load(path)
