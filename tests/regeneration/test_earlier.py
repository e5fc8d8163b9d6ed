"""Responses of earlier work: only what is missing is asked for, and the bytes are those of a result made alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.regenerate import Regenerate
from dllm.engines.engine import Response
from dllm.regeneration import core, identity, journal, served_note
from tests.regeneration.made_up_engine import MadeUpEngine, Stopped
from tests.regeneration.test_core import TARGET, content, job, prompts, refuse_some, refuse_some_by_key


def made(work: Path, asked: Any, engine: MadeUpEngine | None, /, digest: str | None = "same", **options: Any) -> Any:
    work.parent.mkdir(exist_ok=True)
    return core.regenerate(dataclasses.replace(job(work, asked, engine, **options), settings=digest))


@given(
    first=st.sets(st.integers(0, 15), min_size=1),
    turns=st.integers(1, 4),
    samples=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    which=st.sampled_from(["all", "last"]),
    stop=st.none() | st.integers(0, 20),
    drop=st.sampled_from([[], ["length"]]),
)
@settings(max_examples=20)
def test_more_prompts_samples_or_other_shards_cost_only_what_is_missing(
    first: set[int], turns: int, samples: Any, sizes: Any, which: Any, stop: int | None, drop: list[str]
) -> None:
    everything = prompts(16, turns)
    asked = [everything[n] for n in sorted(first)]
    with tempfile.TemporaryDirectory() as folder:
        options = {"turns": which, "samples_per_prompt": samples[1], "shard_size": sizes[1]}
        whole = made(Path(folder, "alone", "b"), everything, MadeUpEngine(refuse_some), **options)
        before = MadeUpEngine(refuse_some, stop_after=stop)
        with contextlib.suppress(Stopped):
            others = {"samples_per_prompt": samples[0], "shard_size": sizes[0], "drop": drop}
            made(Path(folder, "beside", "a"), asked, before, **{**options, **others})
        now = MadeUpEngine(refuse_some, seed=1)
        found = made(Path(folder, "beside", "b"), everything, now, **options)
        assert content(found) == content(whole)
        again = {key for key in before.asked if key in now.asked}
        assert found.asked == len(now.asked)
        if not drop:
            assert not any(isinstance(refuse_some_by_key(key), Response) for key in again)


@pytest.mark.parametrize("digest", ["another", None])
def test_work_of_other_settings_is_not_used(tmp_path: Path, digest: str | None) -> None:
    made(tmp_path / "w" / "a", prompts(4), MadeUpEngine())
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine, digest=digest)
    assert len(engine.asked) == 6


def test_work_of_another_model_is_not_used(tmp_path: Path) -> None:
    made(tmp_path / "w" / "a", prompts(4), MadeUpEngine())
    engine = MadeUpEngine(model="another")
    made(tmp_path / "w" / "b", prompts(6), engine)
    assert len(engine.asked) == 6


def test_a_damaged_shard_is_generated_again(tmp_path: Path) -> None:
    made(tmp_path / "w" / "a", prompts(6), MadeUpEngine(), shard_size=3)
    damaged = sorted((tmp_path / "w" / "a").glob("answers-*/shard-*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine, shard_size=4)
    assert len(engine.asked) == 3


def test_the_digest_is_of_what_a_response_depends_on() -> None:
    def digest(**changed: Any) -> str | None:
        made_of = {"engine": "local", "temperature": 0.7, **changed}
        return identity.settings_digest(Regenerate(**made_of), TARGET, {"template": "t"})

    same = ({"samples_per_prompt": 3}, {"shard_size": 7}, {"drop": ["length"]}, {"timeout_s": 1.0})
    assert {digest(**changed) for changed in same} == {digest()}
    others: list[dict[str, Any]] = [{"temperature": 0.3}, {"max_new_tokens": 9}, {"seed": 1}, {"batch_size": 2}]
    assert len({digest(**changed) for changed in [{}, *others, {"turns": "last"}, {"top_p": 0.5}]}) == 7
    assert identity.settings_digest(Regenerate(engine="dataset", turns="last"), TARGET, {}) is None


@pytest.mark.parametrize("key", ["abc", "abc:x:y", "a:0:0:0"])
def test_lines_and_files_that_no_version_writes_are_left_out(tmp_path: Path, key: str) -> None:
    made(tmp_path / "w" / "a", prompts(4), MadeUpEngine())
    (folder,) = (tmp_path / "w" / "a").glob("answers-*")
    (folder / "journal-00007.jsonl").write_text(json.dumps([key, [1, 2], "x", "stop"]) + "\n")
    (folder / "journal-00008.jsonl").symlink_to(folder / "nowhere")
    (folder / "journal-00009.jsonl").mkdir()
    (folder / "shard-00005.json").mkdir()
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine)
    assert len(engine.asked) == 2


@pytest.mark.parametrize("folder", ["../a", "x" * 500, "answers-1", "", "/tmp"])
def test_a_note_that_names_another_folder_is_none(tmp_path: Path, folder: str) -> None:
    made(tmp_path / "w" / "a", prompts(4), MadeUpEngine())
    note = tmp_path / "w" / "a" / served_note.FILE
    note.write_text(json.dumps({**json.loads(note.read_text()), "folder": folder}))
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine)
    assert len(engine.asked) == 6


def test_other_work_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    made(tmp_path / "w" / "a", prompts(4), MadeUpEngine())
    note = tmp_path / "w" / "a" / served_note.FILE
    note.unlink()
    note.symlink_to(note.name)
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine)
    assert len(engine.asked) == 6


def test_a_journal_that_ends_while_it_is_read_costs_nothing_but_its_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(Stopped):
        made(tmp_path / "w" / "a", prompts(6), MadeUpEngine(stop_after=3))

    def finished(path: Path) -> Iterator[Response]:
        path.unlink()
        return read(path)

    read = journal.read
    monkeypatch.setattr(journal, "read", finished)
    engine = MadeUpEngine()
    made(tmp_path / "w" / "b", prompts(6), engine)
    assert len(engine.asked) == 6
