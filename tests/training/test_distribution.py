"""Real ranks under torchrun: they pool like one, stop together, and fall in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.errors import ConfigError
from dllm.training.distributed import PeerLost, device_of
from tests.patience import LONGEST_S

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


def ranked(module: str, *arguments: str, ranks: int = 2) -> subprocess.Popen:
    """Start a module under torchrun, or alone as one rank."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *run, "-m", module, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=quiet, text=True, start_new_session=True
    )


def toy(work: Path, *woe: str, ranks: int = 2, **changes) -> subprocess.Popen:
    return ranked("tests.training.toy", str(work), json.dumps(changes), *woe, ranks=ranks)


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    try:
        _, stderr = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler writes where each rank hangs
        pytest.fail(f"hung: {process.communicate(timeout=LONGEST_S)[1][-4000:]}")
    return process.returncode, [line for line in stderr.splitlines() if line.startswith("error:")]


def test_two_ranks_do_what_one_does(tmp_path) -> None:
    two = toy(tmp_path / "two", batch_size=2, epochs=1)
    one = toy(tmp_path / "one", ranks=1, batch_size=4, epochs=1)
    assert (finish(two)[0], finish(one)[0]) == (0, 0)
    read = [[json.loads(line) for line in (tmp_path / name / "training.jsonl").open()] for name in ("one", "two")]
    assert [r["step"] for r in read[0]] == [r["step"] for r in read[1]]
    for left, right in zip(*read, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() & {"loss", "grad_norm", "lr", "hit_rate", "val_loss", "val_hit_rate"}:
            assert left[name] == pytest.approx(right[name], rel=1e-4), (name, left["step"])
    last = "checkpoints/step-000008/model.safetensors"
    for name, tensor in load_file(tmp_path / "one" / last).items():
        torch.testing.assert_close(tensor, load_file(tmp_path / "two" / last)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("woe", "line"),
    [
        ("error@3", "error: the shard is rotten (shard-00007)"),
        ("kill@3", f"error: {PeerLost.MESSAGE}; {PeerLost.HINT}"),
    ],
)
def test_a_rank_that_fails_brings_all_down_with_one_line(tmp_path, woe, line) -> None:
    began = time.monotonic()
    code, lines = finish(toy(tmp_path, woe))
    assert code != 0
    assert lines == [line]
    assert time.monotonic() - began < LONGEST_S  # before the half hour that ranks wait for each other


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path) -> None:
    code, lines = finish(toy(tmp_path, "term@3", batch_size=2))
    assert code != 0 and lines == []
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000003\n"


def test_sigterm_to_torchrun_checkpoints(tmp_path) -> None:
    process = toy(tmp_path, batch_size=2, epochs=20000, validate_every=1000000)
    deadline = time.monotonic() + LONGEST_S
    while not (tmp_path / "training.jsonl").exists() or not (tmp_path / "training.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, lines = finish(process)
    assert code != 0 and lines == []
    assert (tmp_path / "checkpoints/latest").exists()


def test_ranks_have_a_gpu_each_or_none_at_all() -> None:
    assert [device_of(local, 0).type for local in range(2)] == ["cpu", "cpu"]
    assert [device_of(local, 2) for local in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="more ranks than the 1 GPU of this machine"):
        device_of(1, 1)
