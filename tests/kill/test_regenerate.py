"""Regeneration killed ten times over, any way and at any moment: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dllm.responses import shards, verify
from tests.engines.openai.loopback_server import echo, serving

pytestmark = pytest.mark.kill

CHATS, SAMPLES = 60, 2
KILLS = 10
BLOWS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

# Imports once and forks for every call: ten starts of torch would cost minutes.
FORKING = """
import json, os, signal, sys
import pyarrow.parquet, torch, transformers
from dllm import __main__ as command
from dllm.config.params import Target
from dllm.models import targets
from dllm.regeneration import standalone
from dllm.engines.openai import engine as openai_engine
targets.load_tokenizer(Target(model="builtin:tiny"))
for number in (signal.SIGTERM, signal.SIGINT):  # a blow may come before the command has handlers of its own
    signal.signal(number, lambda number, frame: os._exit(128 + number))
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        command.main(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forking:
    """A process that starts `python -m dllm` over and over."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._read() == "ready"

    def start(self, *arguments: object) -> int:
        """Start one call; return its process number."""
        assert self._process.stdin is not None
        print(json.dumps([*map(str, arguments)]), file=self._process.stdin, flush=True)
        return int(self._read())

    def wait(self) -> int:
        """Wait for its end; return its exit code, or minus the signal's number."""
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def forking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forking]:
    for name in ("DLLM_TARGET_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    argv = [sys.executable, "-c", FORKING]
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        yield Forking(process)
        assert process.stdin is not None
        process.stdin.close()


def chats(path: Path) -> Path:
    with path.open("w") as lines:
        for n in range(CHATS):
            messages = []
            for turn in range(n % 3):
                messages += [{"role": "user", "content": f"{n}/{turn}"}, {"role": "assistant", "content": "old"}]
            messages.append({"role": "user", "content": f"question {n}"})
            lines.write(json.dumps({"messages": messages}) + "\n")
    return path


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".parquet", ".jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_ten_times_each_turn_is_there_once_in_the_same_bytes(
    tmp_path: Path, forking: Forking, seed: int
) -> None:
    chance = random.Random(seed)

    def reply(body: dict[str, Any]) -> Any:
        time.sleep(chance.uniform(0.0, 0.1))
        return echo(body)

    def flags(output: str) -> list[object]:
        asking = ["--model", "builtin:tiny", "--target-server", server.url, "--concurrency", 4, "--shard-size", 11]
        sampling = ["--temperature", 0.5, "--samples-per-prompt", SAMPLES]
        return ["regenerate", "--input-data", chats(tmp_path / "chats.jsonl"), "--output-dir", tmp_path / output,
                *asking, *sampling, "--resume"]  # fmt: skip

    ended = []
    with serving(reply=reply) as server:
        forking.start(*flags("whole"))
        assert forking.wait() == 0, (tmp_path / "said").read_text()
        turns = len(server.bodies)
        server.bodies.clear()
        for kill in range(KILLS):
            child = forking.start(*flags("killed"))
            if kill % 2:  # well into the answers; else anywhere, the start and the end among it
                end, so_far = time.monotonic() + 30, len(server.bodies)
                while len(server.bodies) < min(so_far + chance.randrange(20), turns) and time.monotonic() < end:
                    time.sleep(0.01)
            else:
                time.sleep(chance.uniform(0.0, 2.0))
            blow = BLOWS[kill % len(BLOWS)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, blow)
            ended.append(forking.wait())
        forking.start(*flags("killed"))
        assert forking.wait() == 0, (tmp_path / "said").read_text()
        asked = len(server.bodies)
    # Python gives signals their default back while it ends: a blow that late ends the process by itself.
    assert set(ended) <= {0, *(-blow for blow in BLOWS), *(128 + blow for blow in BLOWS)}, ended
    assert sum(code != 0 for code in ended) >= 5, "most blows must have hit"
    rows = [(row.prompt_id, row.sample, row.turn) for row in shards.read_rows(tmp_path / "killed")]
    assert len(rows) == len(set(rows)) == turns == SAMPLES * sum(n % 3 + 1 for n in range(CHATS))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert asked <= turns + KILLS * 4, "asked twice: only what was in flight"
    verify.verify(tmp_path / "killed")
    assert "Traceback" not in (tmp_path / "said").read_text()
