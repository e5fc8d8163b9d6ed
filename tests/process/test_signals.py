"""Signals become exit codes, and none raises inside an event loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from dllm.process.event_loop import EventLoop
from dllm.process.signals import Interrupt
from tests.patience import LONGEST_S

BOTH = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


def run(code: str) -> tuple[int, str, str]:
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONGEST_S, check=False)
    return child.returncode, child.stdout, child.stderr


# The signal comes while a callback of the loop runs, where an exception would be printed and dropped.
IN_A_CALLBACK = """
import asyncio, os, signal
from dllm.process.signals import handled
from dllm.process.event_loop import EventLoop
def strike():
    os.kill(os.getpid(), {number})
    for _ in range(1000):  # the handler runs here
        pass
async def main():
    asyncio.get_running_loop().call_soon(strike)
    try:
        await asyncio.sleep(60)
    finally:
        print("cancelled")
async def last():
    {again}
    await asyncio.sleep(0)
    print("closed")
with handled(signal.SIGTERM, signal.SIGINT):
    loop = EventLoop()
    try:
        loop.run(main)
    finally:
        loop.close(last)
        print("left")
"""


@pytest.mark.parametrize("again", ["", "strike()"])
@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_signal_in_a_callback_cancels_the_coroutine_and_exits(number: int, code: int, again: str) -> None:
    script = IN_A_CALLBACK.format(number=int(number), again=again)
    assert run(script) == (code, "cancelled\nclosed\nleft\n", "")


HANDED_TO = """
import asyncio, os, signal
from dllm.process.event_loop import EventLoop
signal.signal({number}, lambda number, frame: print("handled"))
async def main():
    os.kill(os.getpid(), {number})
    await asyncio.sleep(60)
loop = EventLoop()
os.kill(os.getpid(), {number})  # between runs: at once
try:
    loop.run(main)
except SystemExit as stop:
    print(stop.code)
loop.close()
"""


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_the_callers_handler_gets_the_signal(number: int, code: int) -> None:
    assert run(HANDED_TO.format(number=int(number))) == (0, f"handled\nhandled\n{code}\n", "")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop = EventLoop()

    async def main() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "done"

    try:
        assert loop.run(main) == "done"
    finally:
        loop.close()
        signal.signal(signal.SIGTERM, before)


def test_errors_and_results_pass_through_also_beside_the_main_thread() -> None:
    seen: list[object] = []

    async def main() -> int:
        return 3

    async def fail() -> None:
        raise ValueError("wrong")

    def use() -> None:
        loop = EventLoop()
        seen.append(loop.run(main))
        with pytest.raises(ValueError, match="wrong"):
            loop.run(fail)
        loop.close()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    use()
    assert seen == [3, 3]


def test_an_exception_leaves_before_a_recorded_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="first"), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        raise ValueError("first")
    assert signal.getsignal(signal.SIGTERM) is before
