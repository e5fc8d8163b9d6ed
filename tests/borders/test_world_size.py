"""A run is resumed at any number of ranks with the same global batch, or one line says what lies there."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.errors import ConfigError, StageError
from dllm.models import targets
from dllm.stages import train
from dllm.training import distributed, launch
from dllm.workspace import SIDECAR
from tests.flows.conftest import free_port
from tests.stages.test_train import prepare
from tests.training.test_distribution import finish, toy

__all__ = ["free_port"]

SHAPES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2)]
"""Ranks, batch_size and grad_accumulation with the same global batch."""


def curve(work: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (work / "training.jsonl").read_text().splitlines()]
    return {(r["step"], r["kind"]): r.get("loss", r.get("val_loss")) for r in records}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("straight")
    assert finish(toy(work, ranks=1, batch_size=8))[0] == 0
    return work


@pytest.mark.ranks
@pytest.mark.parametrize(("first", "then"), [(0, 1), (1, 0), (1, 2), (2, 3)])
def test_ranks_may_change_between_calls(straight: Path, tmp_path: Path, first: int, then: int) -> None:
    for shape, stops in ((SHAPES[first], ["kill@7"]), (SHAPES[then], [])):
        ranks, batch_size, accumulation = shape
        code, _ = finish(toy(tmp_path, *stops, ranks=ranks, batch_size=batch_size, grad_accumulation=accumulation))
        assert (code == 0) == (not stops)
    found, expected = curve(tmp_path), curve(straight)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    last = "checkpoints/step-000012/model.safetensors"
    for name, tensor in load_file(straight / last).items():
        torch.testing.assert_close(load_file(tmp_path / last)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "4x"}, "WORLD_SIZE is '4x'"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE is 'all'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is missing"),
    ],
)
def test_half_of_an_environment_of_torchrun_is_named(
    left: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", launch.STORE):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named), distributed.Join():
        pass


@pytest.mark.parametrize("left", ["all", "7"])
def test_ranks_of_a_torchrun_that_is_gone_are_not_ours(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, left)
    with distributed.Join() as ranks, distributed.one_rank_at_a_time(ranks.device):
        assert (ranks.rank, ranks.world) == (0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert targets.best_device() == torch.device("cuda", 0)


def test_an_environment_of_torchrun_left_in_a_shell_is_no_silent_wait(
    free_port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "NOTICE_S", 0.2)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(launch.STORE, raising=False)
    with pytest.raises(StageError, match=r"did not meet the others.*unset it to train alone"), distributed.Join():
        pass
    assert f"rank 0 of 2 waits for the others at 127.0.0.1:{free_port}" in capfd.readouterr().err
    launch.note_ranks(4)
    assert "train.nproc=4 has no effect" in capfd.readouterr().err


def unfinished(root: Path) -> Path:
    """Turn the only finished run back into one that was killed after its last checkpoint."""
    (work,) = (root / "work" / "train").iterdir()
    (work / SIDECAR).write_text("{}")
    return work


def test_the_split_of_a_batch_does_not_name_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    small = {"epochs": 1, "nproc": 1}
    train.run(prepare(tmp_path, batch_size=4, grad_accumulation=1, **small), tmp_path)
    work = unfinished(tmp_path)
    shutil.rmtree(tmp_path / "out")
    found = train.run(prepare(tmp_path, batch_size=2, grad_accumulation=2, **small), tmp_path)
    assert list(work.parent.iterdir()) == [work] and found["steps"] == 6
    assert "starting at step 0" not in capfd.readouterr().err

    unfinished(tmp_path)
    shutil.rmtree(tmp_path / "out")
    train.run(prepare(tmp_path, batch_size=2, grad_accumulation=1, **small), tmp_path)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "starting at step 0" in line]
    assert f"{work} holds 6 steps of training" in line
    assert "differs in global batch (4 there, 2 here)" in line and "set train.grad_accumulation to 2" in line

    shutil.rmtree(tmp_path / "out")
    train.run(prepare(tmp_path, batch_size=4, seed=7, **small), tmp_path)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "starting at step 0" in line]
    assert "differs in train.seed (0 there, 7 here)" in line and len(line) < 500
