"""An engine from outside the package: one file, and one entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.config.params import Regenerate
from dllm.registry import ENGINES
from dllm.responses import shards

ENGINE = '''
from contextlib import contextmanager

from dllm.engines.engine import EngineStats, Response


class EchoEngine:
    """Generates every prompt's own ids."""

    affects = frozenset()
    is_external = False

    def __init__(self):
        self.stats = EngineStats()

    @classmethod
    def check(cls, settings): pass

    @classmethod
    def num_slots(cls, settings):
        return settings.concurrency

    @classmethod
    @contextmanager
    def open(cls, params, tokenizer, root, servers=None):
        yield cls()

    def describe(self):
        return {"engine": "echo"}

    def answer(self, requests):
        while (request := requests.take()) is not None:
            yield Response(request.key, request.prompt_ids, "echo", "length")
'''


def test_every_member_says_what_regeneration_reads() -> None:
    for name, factory in ENGINES.items():
        assert factory.affects <= {"batch_size", "served_model", "sglang"}, name
        assert isinstance(factory.is_external, bool) and factory.num_slots(Regenerate()) >= 1
        factory.check(Regenerate(engine=name, turns="last"))


def test_an_engine_from_outside_generates(tmp_path: Path) -> None:
    (tmp_path / "echo_engine.py").write_text(ENGINE)
    described = tmp_path / "echo_engine-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-engine\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[dllm.engines]\necho = echo_engine:EchoEngine\n")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    words = ["regenerate", "--input-data", chats, "--output-dir", "out", "--model", "builtin:tiny", "--engine", "echo"]
    done = subprocess.run(
        [sys.executable, "-m", "dllm", *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = shards.read_rows(tmp_path / "out")
    assert row.answer_ids == row.prompt_ids and shards.read_manifest(tmp_path / "out")["engine"] == "echo"


def test_an_unknown_engine_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of local, openai, sglang, dataset.*did you mean sglang\?"):
        Regenerate(engine="sglan")
