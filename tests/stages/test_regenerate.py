"""regenerate, whole: the tiny target in process and a server on loopback, killed, resumed and out of disk."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params, Target
from dllm.errors import DataError, StageError
from dllm.models.targets import load_tokenizer
from dllm.prompts import template as chat
from dllm.prompts.stream import collect
from dllm.prompts.table import TRAIN, read_prompts, write_prompts
from dllm.responses import shards
from dllm.stages import regenerate
from tests.engines.openai.loopback_server import echo, serving
from tests.patience import LONGEST_S
from tests.regeneration.full_disk import full_disk_after

PROMPTS = 40


def params(**settings: Any) -> Params:
    return parse_params(
        {
            "recipe": "test",
            "target": {"model": "builtin:tiny"},
            "prepare": {"sources": [{"name": "mine.jsonl"}], "heldout_fraction": 0.3},
            "regenerate": {"max_new_tokens": 6, "shard_size": 15, **settings},
            "register": {"model_name": "test"},
        }
    )


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_root(tmp_path, mlflow_store, monkeypatch)


def make_root(path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.delenv("DLLM_TARGET_URL", raising=False)
    path.mkdir(exist_ok=True)
    (path / "mine.jsonl").write_text("".join(json.dumps({"messages": f"question {n}"}) + "\n" for n in range(PROMPTS)))
    (path / "out/prepare").mkdir(parents=True)
    prompts, _ = collect(params().prepare, path)
    write_prompts(prompts, path / "out/prepare/prompts.parquet")
    return path


def published(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "out/regenerate").iterdir() if p.suffix == ".parquet"} | {
        "manifest": (root / "out/regenerate/manifest.json").read_bytes()
    }


def test_the_target_answers_every_prompt_and_held_out_ones_once(root: Path) -> None:
    metrics = regenerate.run(params(samples_per_prompt=3, temperature=0.9), root)
    prompts = {prompt.id: prompt for prompt in read_prompts(root / "out/prepare")}
    rows = shards.read_rows(root / "out/regenerate")
    samples = Counter(row.prompt_id for row in rows)
    assert samples == {id: 3 if prompt.split == TRAIN else 1 for id, prompt in prompts.items()}
    assert [(row.prompt_id, row.sample) for row in rows] == sorted((row.prompt_id, row.sample) for row in rows)
    tokenizer = load_tokenizer(Target(model="builtin:tiny"))
    for row in rows:
        prompt = prompts[row.prompt_id]
        assert (row.source, row.split) == ("mine.jsonl", prompt.split)
        assert row.messages[:-1] == prompt.messages and row.messages[-1]["role"] == "assistant"
        assert row.prompt_ids == chat.prompt_ids(tokenizer, prompt.messages)
        assert 1 <= row.num_tokens == len(row.answer_ids) <= 6
        assert (row.finish_reason == "stop") == (row.answer_ids[-1] in chat.stop_ids(tokenizer))
    first, second = (
        {row.prompt_id: row.answer_ids for row in rows if row.split == TRAIN and row.sample == n} for n in (0, 1)
    )
    assert first != second
    assert metrics["rows"] == len(rows) and metrics["tokens"] == sum(row.num_tokens for row in rows)
    assert metrics["splits"] == Counter(row.split for row in rows)
    manifest = shards.read_manifest(root / "out/regenerate")
    assert manifest["sampling"]["temperature"] == 0.9 and manifest["target"]["model"] == "builtin:tiny"


def test_the_order_of_finishing_does_not_show(root: Path, tmp_path: Path, mlflow_store: str, monkeypatch) -> None:
    chance = random.Random(0)

    def slow_echo(body: dict[str, Any]) -> tuple[str, str]:
        time.sleep(chance.random() * 0.05)
        return echo(body)

    other = make_root(tmp_path / "other", mlflow_store, monkeypatch)
    with serving(reply=slow_echo) as server:
        regenerate.run(params(engine="openai", servers=[server.url], concurrency=16), root)
        regenerate.run(params(engine="openai", servers=[server.url], concurrency=1), other)
    assert published(root) == published(other)
    rows = shards.read_rows(root / "out/regenerate")
    assert all(row.messages[-1]["content"].startswith("you said question") for row in rows)
    assert {row.finish_reason for row in rows} == {"stop", "length"}


RUN = """
import sys, pathlib
from dllm.config.load import parse_params
from dllm.config.params import Params, Target
from dllm.stages import regenerate
regenerate.run(Params.model_validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.kill
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_and_run_again_it_asks_for_the_rest_only(
    root: Path, tmp_path: Path, mlflow_store: str, monkeypatch, signum: signal.Signals
) -> None:
    reached, killed = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> tuple[str, str]:
        if len(server.bodies) > 20:
            reached.set()
            killed.wait(LONGEST_S)
        return echo(body)

    whole = make_root(tmp_path / "whole", mlflow_store, monkeypatch)
    with serving(reply=reply) as server:
        asked = params(engine="openai", servers=[server.url], concurrency=4)
        child = subprocess.Popen([sys.executable, "-c", RUN, asked.model_dump_json(by_alias=True), str(root)])
        assert reached.wait(LONGEST_S)
        with pytest.raises(StageError, match="another process"):
            regenerate.run(asked, root)
        child.send_signal(signum)
        code = child.wait(LONGEST_S)
        killed.set()
        assert code == (-9 if signum == signal.SIGKILL else 143)
        assert not (root / "out/regenerate").exists()
        server.reply = echo
        server.settle()
        before = len(server.bodies)
        metrics = regenerate.run(asked, root)
        assert metrics["asked"] == len(server.bodies) - before <= PROMPTS - 16
        assert len(server.bodies) <= PROMPTS + 4  # only what was in flight is asked twice
        regenerate.run(asked, whole)
    assert published(root) == published(whole)


def test_settings_of_the_machine_do_not_discard_work(root: Path) -> None:
    with serving() as server:
        regenerate.run(params(engine="openai", servers=[server.url]), root)
        first = published(root)
        moved = params(engine="openai", servers=["http://127.0.0.1:9"], concurrency=2, timeout_s=3.0, max_retries=1)
        assert regenerate.run(moved, root)["asked"] == 0
    assert published(root) == first


def test_a_full_disk_is_one_line_and_the_work_goes_on_afterwards(root: Path) -> None:
    with serving() as server:
        asked = params(engine="openai", servers=[server.url], concurrency=1)
        with full_disk_after(10), pytest.raises(StageError, match="disk is full"):
            regenerate.run(asked, root)
        assert not (root / "out/regenerate").exists()
        assert regenerate.run(asked, root)["asked"] == PROMPTS - 10


def test_what_is_dropped_is_named_where_nothing_is_left(root: Path) -> None:
    with serving(reply=lambda body: ("cut", "length")) as server:
        asked = params(engine="openai", servers=[server.url], drop=["length"])
        with pytest.raises(DataError, match=r"all responses are dropped: \d+ for length.*regenerate\.drop"):
            regenerate.run(asked, root)


def test_empty_answers_are_kept_and_counted_but_not_alone(root: Path) -> None:
    def silent(body: dict[str, Any]) -> tuple[str, str]:
        return "", "length"

    def mostly_silent(body: dict[str, Any]) -> tuple[str, str]:
        return ("", "length") if body["messages"][-1]["content"][-1] in "012345678" else ("nine", "stop")

    with serving(reply=silent) as server:
        with pytest.raises(DataError, match=r"no token to train on.*builtin:tiny"):
            regenerate.run(params(engine="openai", servers=[server.url]), root)
        assert not (root / "out/regenerate").exists()
        server.reply = mostly_silent
        metrics = regenerate.run(params(engine="openai", servers=[server.url], seed=1), root)
    assert metrics["rows"] == PROMPTS and metrics["flags"]["empty"] == 36 and metrics["tokens"] > 0


def test_without_prompts_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="python -m dllm prepare"):
        regenerate.run(params(), tmp_path)
