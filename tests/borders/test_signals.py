"""SIGTERM, SIGINT and SIGHUP at any moment: documented exits, nothing left; and output that nobody reads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.source_tree import ROOT
from tests.kill import blows
from tests.kill.blows import Struck
from tests.patience import LONGEST_S

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
BLOWS = 3


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    with Struck(tmp_path_factory.mktemp("struck")).started() as project:
        for stage in blows.STAGES:
            if stage != "train2":
                project.undisturbed(stage)
        yield project


@pytest.mark.kill
@pytest.mark.outage
@pytest.mark.parametrize("stage", [stage for stage in blows.STAGES if stage != "train2"])
def test_random_blows(struck: Struck, stage: str) -> None:
    chance = random.Random(stage)
    assert not [blow for blow in (struck.strike(stage, chance) for _ in range(BLOWS)) if blow.wrong]
    assert struck.finish(stage) == []


def run(code: str, *, before: int | None = None, **more: str) -> tuple[int, str, str]:
    """Run a script to its end; return its exit code and its two streams."""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONGEST_S, check=False, cwd=ROOT,
        env=os.environ | more, preexec_fn=None if before is None else lambda: signal.signal(before, signal.SIG_IGN),
    )  # fmt: skip
    return child.returncode, child.stdout, child.stderr


LONG_COMPUTATION = """
import hashlib, os, signal
from dllm.process import signals
with signals.handled(signal.SIGTERM, signal.SIGINT), signals.on_stop(lambda: print("closed", flush=True)):
    os.kill(os.getpid(), int(os.environ["NUMBER"]))
    try:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # reaches no point where stopping is safe
    finally:
        print("unwound", flush=True)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_what_reaches_no_safe_point_is_closed_and_ended(number: signal.Signals) -> None:
    assert run(LONG_COMPUTATION, NUMBER=str(int(number))) == (128 + number, "closed\n", "")


SAFE_POINT = """
import os, signal
from dllm.process import event_loop, signals
with signals.handled():
    try:
        with signals.on_stop(lambda: print("closed", flush=True)):
            while True:
                os.kill(os.getpid(), signal.SIGHUP)
                signals.check()
    finally:
        for number in signals.SIGNALS:  # a second one, and a third, while the first is obeyed
            os.kill(os.getpid(), number)
        signals.check()
        signals.sleep(0.1)
        event_loop.EventLoop().run(lambda: wait())
        print("unwound", flush=True)
"""


def test_the_first_signal_counts_and_later_ones_change_nothing() -> None:
    wait = "import asyncio\nasync def wait(): await asyncio.sleep(0.1)\n"
    assert run(wait + SAFE_POINT) == (129, "unwound\n", "")


INSIDE = """
import os, signal, threading
from dllm.process import signals
from dllm.progress import Progress
with signals.handled():
    with signals.uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        with Progress("x", 2) as bar:
            bar.update()
        print("whole")
    thread = threading.Thread(target=signals.check)
    thread.start()
    thread.join()
    print("other threads go on", flush=True)
    with Progress("x", 2, shown=False) as bar:
        bar.update()
    print("never")
"""


def test_a_block_that_must_be_whole_is_whole() -> None:
    code, said, _ = run(INSIDE)
    assert (code, said) == (143, "whole\nother threads go on\n")


def test_nohup_keeps_a_process_alive() -> None:
    code = "import os, signal\nfrom dllm.process import signals\n"
    code += "with signals.handled():\n os.kill(os.getpid(), signal.SIGHUP); signals.sleep(0.1); print('alive')"
    assert run(code, before=signal.SIGHUP) == (0, "alive\n", "")


AT_EXIT = """
import atexit, os, signal
from dllm.__main__ import main
atexit.register(lambda: os.kill(os.getpid(), int(os.environ["NUMBER"])))
main(["recipe", "list"])
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_while_python_ends_prints_nothing(number: signal.Signals) -> None:
    code, said, complaint = run(AT_EXIT, NUMBER=str(int(number)))
    assert (code, complaint) == (-number, "")
    assert "tiny-dflash" in said


FORKS = """
import os, signal, time
from dllm.process import signals
with signals.handled():
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signals.sleep(0.2)
    print("not struck")
"""


def test_a_forked_worker_can_be_terminated_and_its_parent_does_not_notice() -> None:
    assert run(FORKS) == (0, "-15\nnot struck\n", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_dropped(stream: str, unbuffered: str) -> None:
    code = f"""
import os, sys
from dllm.process.output import outlive_readers
outlive_readers()
for n in range(3000):
    print(n, "x" * 100, file=sys.{stream})
    sys.{stream}.flush()
os.write(int(sys.argv[1]), b"whole")
"""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(write)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[write],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, cwd=ROOT,
    )  # fmt: skip
    os.close(write)
    assert child.stdout is not None and child.stderr is not None
    getattr(child, stream).readline()
    getattr(child, stream).close()
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"whole"
    assert child.wait() == 0


@pytest.mark.kill
@pytest.mark.outage
def test_a_stage_whose_reader_is_gone_saves_a_checkpoint_when_it_is_stopped(struck: Struck) -> None:
    """As when the terminal or the flow is gone: the pipe breaks first, then comes the signal."""
    training = [sys.executable, "-m", "dllm", "train", "--set", "train.epochs=100000", "--set", "train.seed=7"]
    training += ["--set", "train.validate_every=1000000", "--set", "train.log_every=1"]
    before = set(struck.folder.glob("work/train/*/training.jsonl"))
    child = subprocess.Popen(
        training, cwd=struck.folder, env=struck.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    while not (works := set(struck.folder.glob("work/train/*/training.jsonl")) - before):
        assert child.poll() is None
        time.sleep(0.05)
    child.stdout.close()
    time.sleep(6)  # for a line of progress to meet the broken pipe
    assert child.poll() is None
    child.send_signal(signal.SIGHUP)
    assert child.wait() == 129
    assert (works.pop().parent / "checkpoints/latest").exists()
    assert struck.statuses() == {"FINISHED", "KILLED"}


@pytest.mark.parametrize("number", ["999999999", "none", "\x1b[2J"])
def test_a_number_left_in_a_shell_is_named(number: str) -> None:
    argv = [sys.executable, "-m", "dllm", "recipe", "list"]
    done = subprocess.run(argv, env={**os.environ, "DLLM_PARENT": number}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (143, -15) and f"DLLM_PARENT names no parent that lives: {number!r}" in done.stderr


def test_every_signal_has_a_documented_exit() -> None:
    assert "| 129, 130, 143 |" in (ROOT / "docs/operations.md").read_text()
    assert Path(ROOT / "Makefile").read_text().count("tests.kill.blows") == 1
