"""Real ranks that fail, are killed, or are stopped: one line, one exit code, and none is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm.training.distributed import LOOPBACK
from tests.patience import LONGEST_S

pytestmark = pytest.mark.ranks

RANK = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
pathlib.Path(f"{rank}.pid").write_text(str(os.getpid()))
manner = sys.argv[1]
if rank == "1" and manner in ("3", "killed"):
    print("dllm rank 1: out of order", file=sys.stderr, flush=True) if manner == "3" else None
    sys.exit(3) if manner == "3" else os.kill(os.getpid(), 9)
time.sleep(60)
"""


def launch(folder: Path, manner: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    code = "import sys; from dllm.training import launch; sys.exit(launch.run(sys.argv[1:], 2, grace_s=5))"
    argv = [sys.executable, "-c", code, sys.executable, "rank.py", manner]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("OMP_NUM_THREADS", None)  # as a user has it
    return subprocess.Popen(argv, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("manner", "code", "said"),
    [
        ("3", 3, ["dllm rank 1: out of order"]),
        (
            "killed",
            137,
            ["dllm: rank 1 was killed by signal 9; unless it was sent on purpose, memory may have run out"],
        ),
    ],
)
def test_the_code_and_the_last_word_are_the_ranks(tmp_path: Path, manner: str, code: int, said: list[str]) -> None:
    launcher = launch(tmp_path, manner)
    lines = launcher.communicate(timeout=LONGEST_S)[1].splitlines()
    assert launcher.returncode == code
    assert lines == said


NETWORK = """
import os, pathlib
from dllm.training.distributed import Join
with Join() as ranks:
    pathlib.Path(f"{ranks.rank}.network").write_text(os.environ["GLOO_SOCKET_IFNAME"])
"""


def test_ranks_that_we_start_listen_on_loopback_whatever_the_shell_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "network.py").write_text(NETWORK)
    code = "import sys; from dllm.training import launch; sys.exit(launch.run(sys.argv[1:], 2, grace_s=5))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code, sys.executable, "network.py"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, timeout=LONGEST_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"{rank}.network").read_text() for rank in (0, 1)] == [LOOPBACK] * 2


def test_sigterm_stops_the_ranks_without_a_traceback(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "wait")
    pids = [tmp_path / "0.pid", tmp_path / "1.pid"]
    while not all(path.exists() and path.read_text() for path in pids):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=LONGEST_S)[1]
    assert launcher.returncode == 143 and "Traceback" not in said
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
