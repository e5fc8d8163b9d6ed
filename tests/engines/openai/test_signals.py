"""A signal while requests are in flight: the run ends with the signal's exit code, in silence, and asks no more."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.patience import LONGEST_S

RUN = """
import sys
from dllm.process.signals import handled
from dllm.engines.engine import RequestList
from dllm.models.targets import load_tokenizer
from tests.engines.openai.asking import TARGET, engine, requests

asked = engine(sys.argv[1], load_tokenizer(TARGET), concurrency=4)
with handled():
    for outcome in asked.answer(RequestList(requests(40))):
        print("outcome", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_requests_ends_the_run_in_order(server, number: signal.Signals) -> None:
    server.always = "stall"
    child = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", RUN, server.url], stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + LONGEST_S
    while len(server.bodies) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=LONGEST_S)
    assert (child.returncode, said) == (128 + number, "")
    assert len(server.bodies) == 4
