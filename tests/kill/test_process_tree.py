"""Real processes, killed every way there is: nothing of the tree may be left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dllm.errors import StageError
from dllm.process import children as process
from tests.patience import LONGEST_S

pytestmark = pytest.mark.kill

LEAF = """
import os, pathlib, signal, sys, time
def note(number, frame):
    pathlib.Path(sys.argv[1], f"{os.getpid()}.term").touch()
    if sys.argv[2] == "polite":
        sys.exit(0)
signal.signal(signal.SIGTERM, note)
pathlib.Path(sys.argv[1], f"{os.getpid()}.pid").touch()
time.sleep(0.1)
while True: time.sleep(0.1)
"""

# As torchrun does it: every rank in a session of its own, closed by the launcher on SIGTERM.
LAUNCHER = """
import signal, subprocess, sys, time
folder, manner = sys.argv[1:3]
argv = [sys.executable, "-c", sys.argv[3], folder, manner]
ranks = [subprocess.Popen(argv, start_new_session=True) for _ in range(2)]
def close(number, frame):
    if manner == "polite":
        for rank in ranks: rank.terminate()
        for rank in ranks: rank.wait()
        sys.exit(1)
signal.signal(signal.SIGTERM, close)
while True: time.sleep(0.1)
"""

# As dvc does it: a parent that dies at once on SIGTERM and leaves its child alone.
SHELL = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"

FORGETFUL = """
import subprocess, sys, time
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
time.sleep(1)
"""

# As a flow run that is killed when a program below it has ended and is not waited for.
CARELESS = """
import pathlib, subprocess, sys, time
parent = '''
import os, pathlib, subprocess, sys, time
ended = subprocess.Popen(["true"])
os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
pathlib.Path(sys.argv[1], f"{ended.pid}.pid").touch()
time.sleep(600)
'''
parent = subprocess.Popen([sys.executable, "-c", parent, sys.argv[1]])
pathlib.Path(sys.argv[1], f"{parent.pid}.pid").touch()
parent.wait()
time.sleep(600)
"""

CALLER = """
import json, sys
from dllm.process import children as process
process.run(json.loads(sys.argv[1]), grace_s=2)
"""


def tree(folder: Path, manner: str) -> list[str]:
    return [sys.executable, "-c", SHELL, LAUNCHER, str(folder), manner, LEAF]


def leaves(folder: Path) -> list[int]:
    end = time.monotonic() + LONGEST_S
    while len(found := list(folder.glob("*.pid"))) < 2:
        assert time.monotonic() < end, "the ranks never started"
        time.sleep(0.05)
    return [int(path.stem) for path in found]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # also where it ends in between
        return False


def assert_gone(pids: list[int], within_s: float) -> None:
    end = time.monotonic() + within_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.05)


class Cancelled(BaseException):
    """What Prefect raises on cancellation is no Exception either."""


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_cancelled_call_leaves_nothing(tmp_path: Path, manner: str) -> None:
    def cancel(number: int, frame: object) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGUSR1, cancel)
    subprocess.Popen(  # cancels this very process once the ranks are up
        [
            sys.executable,
            "-c",
            "import os,sys,time,pathlib\nwhile len(list(pathlib.Path(sys.argv[1]).glob('*.pid')))<2: time.sleep(.05)\n"
            f"os.kill({os.getpid()}, {signal.SIGUSR1})",
            str(tmp_path),
        ]
    )
    try:
        with pytest.raises(Cancelled):
            process.run(tree(tmp_path, manner), grace_s=5 if manner == "polite" else 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    pids = leaves(tmp_path)
    assert_gone(pids, within_s=0)  # gone when the call returns, not some time later: the GPU is free
    assert manner == "deaf" or all((tmp_path / f"{pid}.term").exists() for pid in pids), "asked before it was killed"


def test_deadline_reaches_ranks_in_their_own_sessions(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="deadline"):
        process.run(tree(tmp_path, "deaf"), deadline_s=3, grace_s=0.5)
    assert_gone(leaves(tmp_path), within_s=0)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_caller_takes_the_tree_along(tmp_path: Path, blow: signal.Signals) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, json.dumps(tree(tmp_path, "deaf"))])
    pids = leaves(tmp_path)
    everything = [child.pid for child in psutil.Process(caller.pid).children(recursive=True)]
    assert set(pids) <= set(everything)
    caller.send_signal(blow)
    caller.wait()
    assert_gone(everything, within_s=10)


def test_a_daemon_left_behind_is_stopped(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", FORGETFUL, LEAF, str(tmp_path), "polite"]
    assert process.run(argv).code == 0
    assert_gone(leaves(tmp_path), within_s=0)


def test_a_zombie_that_is_adopted_is_reaped_while_the_child_runs(tmp_path: Path) -> None:
    with process.background([sys.executable, "-c", CARELESS, str(tmp_path)], grace_s=1):
        ended, parent = sorted(leaves(tmp_path), key=is_alive)
        psutil.Process(parent).kill()
        end = time.monotonic() + LONGEST_S
        while left := [pid for pid in (ended, parent) if psutil.pid_exists(pid)]:
            assert time.monotonic() < end, f"never reaped: {left}"
            time.sleep(0.1)
