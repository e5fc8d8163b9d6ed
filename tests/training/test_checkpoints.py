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
    state, tensors, weights = checkpoints.load(newest)
    assert weights is None
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


def test_one_of_another_step_is_refused(tmp_path) -> None:
    """Two folders that were swapped are whole, and the better one is not the one that would be published."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    moved = save(checkpoints, 3).rename(tmp_path / "step-000004")
    for read in (checkpoints.load, checkpoints.weights):
        with pytest.raises(ModelError, match="it holds the checkpoint of step 3"):
            read(moved)


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


def save_sharded(root: Path, world: int = 2) -> Path:
    """Save a checkpoint of one matrix of five rows as `world` ranks do."""
    whole = torch.arange(10.0).view(5, 2)
    checkpoints = Checkpoints(root, keep=1)
    for rank, shard in enumerate(whole.tensor_split(world)):
        equal_on_all = {"w:step": torch.tensor(3.0)} if rank == 0 else {}
        moments, weights = {"w:exp_avg": shard.clone(), **equal_on_all}, {"w": -shard}
        checkpoints.save_shard(3, moments, rank, world, weights)
    assert checkpoints.latest() is None
    return checkpoints.save(TrainState(step=3), {}, shards=world)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_of_any_number_of_ranks_are_read_back_whole(tmp_path, world) -> None:
    path = save_sharded(tmp_path, world)
    state, tensors, weights = Checkpoints(tmp_path, keep=1).load(path)
    assert state.step == 3 and set(tensors) == {"w:exp_avg", "w:step"}
    assert weights is not None and dict(weights).keys() == {"w"}
    assert torch.equal(weights["w"], -torch.arange(10.0).view(5, 2))
    assert torch.equal(tensors["w:exp_avg"], torch.arange(10.0).view(5, 2))
    assert tensors["w:step"].shape == () and tensors["w:step"] == 3
    assert not list(tmp_path.glob(".*"))


def test_a_missing_shard_leaves_no_checkpoint(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_shard(1, {"w:exp_avg": torch.zeros(2)}, 0, 2)
    with pytest.raises(OSError, match="00002-of-00002"):
        checkpoints.save(TrainState(step=1), {}, shards=2)
    assert checkpoints.latest() is None


def test_shards_left_by_a_killed_save_are_overwritten_then_removed(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 3):
        checkpoints.save_shard(step, {"w:exp_avg": torch.full((2, 2), 9.0)}, 0, 2)
    path = save_sharded(tmp_path)
    assert torch.equal(checkpoints.load(path)[1]["w:exp_avg"], torch.arange(10.0).view(5, 2))
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path) -> None:
    (tmp_path / ".shards-000001" / "optimizer-00001-of-00002.safetensors").mkdir(parents=True)
    with pytest.raises(StageError, match="cannot be written"):
        Checkpoints(tmp_path, keep=1).save_shard(1, {"w:exp_avg": torch.zeros(2)}, 0, 2)


@pytest.mark.parametrize("name", ["weights-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"])
@pytest.mark.parametrize("damage", [b"{broken", b"{}", None])
def test_a_damaged_shard_is_refused_by_name(tmp_path, name, damage) -> None:
    path = save_sharded(tmp_path)
    (path / name).unlink()
    if damage is not None:
        (path / name).write_bytes(damage)
    with pytest.raises(ModelError, match="step-000003"):
        Checkpoints(tmp_path, keep=1).load(path)
