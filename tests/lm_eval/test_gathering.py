"""Values gathered over ranks arrive unchanged."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dllm.lm_eval.gathering import pack, tensors, unpack, values
from tests.patience import LONGEST_S

SAID = {"task": {("acc", "none"): [1.0, 0, np.float64(0.5)], ("bits", "x"): [(-1.5, 7)]}, "none": None, "é": [True]}


def test_any_mixture_comes_back() -> None:
    found = unpack(pack(SAID))
    assert found == SAID
    assert isinstance(found["task"]["bits", "x"][0], tuple)


def test_one_rank_gathers_its_own_value() -> None:
    assert values(SAID, 1, torch.device("cpu")) == [SAID]
    assert tensors(torch.tensor([3]), 1).tolist() == [3]


def speak(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    said = values([rank, ("x" * 9 * rank,)], 2, torch.device("cpu"))
    counts = tensors(torch.tensor([10 + rank]), 2).tolist()
    (folder / f"{rank}.txt").write_text(repr((said, counts)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_gather_values_of_any_length(tmp_path: Path) -> None:
    ranks = [multiprocessing.get_context("fork").Process(target=speak, args=(rank, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LONGEST_S)
    for rank in (0, 1):
        assert eval((tmp_path / f"{rank}.txt").read_text()) == ([[0, ("",)], [1, ("x" * 9,)]], [10, 11])
