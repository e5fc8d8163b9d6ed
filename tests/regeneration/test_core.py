"""The core: any order of answers, any stop and any resume give each turn once, in the same bytes."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate
from dllm.digests import unsealed
from dllm.engines.engine import Refusal, Request, Response, request_origin
from dllm.errors import DataError, StageError
from dllm.models.targets import load_tokenizer
from dllm.prompts.table import Prompt
from dllm.regeneration import core
from dllm.regeneration.core import Job, Regenerated
from dllm.regeneration.rollout import RolloutConfig
from dllm.responses import shards
from tests.regeneration.made_up_engine import MadeUpEngine, Stopped, echo

TARGET = Target(model="builtin:tiny")


@cache
def tokenizer() -> Any:
    return load_tokenizer(TARGET)


def prompts(number: int, turns: int = 1) -> list[Prompt]:
    made = []
    for n in range(number):
        messages: list[dict[str, Any]] = []
        for turn in range(n % turns):
            messages += [{"role": "user", "content": f"{n}, {turn}"}, {"role": "assistant", "content": "old"}]
        messages.append({"role": "user", "content": f"question {n}"})
        id = hashlib.sha256(str(n).encode()).hexdigest()[:16]
        made.append(Prompt(id, "mine", "heldout" if n % 5 == 0 else "train", messages, None))
    return made


def job(work: Path, asked: list[Prompt], engine: MadeUpEngine | None, /, **options: Any) -> Job:
    @contextlib.contextmanager
    def opened() -> Iterator[MadeUpEngine]:
        assert engine is not None, "an engine was started though nothing is missing"
        yield engine

    work.mkdir(exist_ok=True)
    asking = RolloutConfig(Regenerate(temperature=0.5, **options), TARGET, tokenizer())
    return Job(asking, lambda: asked, sum(core.num_turns(each, asking) for each in asked), work, opened)


def content(answered: Regenerated) -> dict[str, bytes]:
    files = {entry["file"]: (answered.store.folder / entry["file"]).read_bytes() for entry in answered.entries}
    return {**files, "rejected": core.rejections(answered)}


def rows(answered: Regenerated) -> list[shards.Row]:
    folder = answered.store.folder
    shards.write_manifest(folder, {"schema": shards.SCHEMA, "shards": answered.entries})
    return shards.read_rows(folder)


def refuse_some(request: Request) -> Response | Refusal:
    if int(request.key[:2], 16) % 6 == 0 and not request.key.endswith(":0"):
        return Refusal(request.key, "made to fail")
    return echo(request)


@given(
    number=st.integers(1, 16),
    turns=st.integers(1, 4),
    samples=st.integers(1, 3),
    shard_size=st.integers(1, 12),
    slots=st.integers(1, 20),
    which=st.sampled_from(["all", "last"]),
    stops=st.lists(st.integers(0, 20), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_stopped_and_resumed_anywhere_each_turn_is_there_once_and_the_bytes_are_the_same(
    number: int, turns: int, samples: int, shard_size: int, slots: int, which: Any, stops: list[int], seed: int
) -> None:
    asked = prompts(number, turns)
    options = {"samples_per_prompt": samples, "shard_size": shard_size, "turns": which}
    with tempfile.TemporaryDirectory() as folder:
        whole = core.regenerate(job(Path(folder, "whole"), asked, MadeUpEngine(refuse_some), **options))
        work, heard = Path(folder, "stopped"), []
        for turn, stop in enumerate(stops):
            engine = MadeUpEngine(refuse_some, seed=seed + turn, slots=slots, stop_after=stop)
            with contextlib.suppress(Stopped):
                core.regenerate(job(work, asked, engine, **options))
            heard += engine.asked
        last = MadeUpEngine(refuse_some, seed=seed - 1, slots=slots)
        made = core.regenerate(job(work, asked, last, **options))
        assert content(made) == content(whole)
        assert made.counts == whole.counts
        found = [(row.prompt_id, row.sample, row.turn) for row in rows(made)]
        assert len(found) == len(set(found)) == made.counts.rows
        order = {prompt.id: place for place, prompt in enumerate(asked)}
        assert found == sorted(found, key=lambda origin: (order[origin[0]], *origin[1:]))
        again = {key for key in heard if heard.count(key) > 1}
        assert not any(isinstance(refuse_some_by_key(key), Response) for key in again), "an answer was asked for twice"
        assert core.regenerate(job(work, asked, None, **options)).asked == 0
        assert not list(made.store.folder.glob("journal-*"))


def refuse_some_by_key(key: str) -> Response | Refusal:
    return refuse_some(Request(key, (), [], 1, 0.0, 1.0, 0))


def test_shards_hold_their_rollouts_and_no_shard_waits_for_another(tmp_path: Path) -> None:
    def first_is_slow(request: Request) -> Response | Refusal:
        return echo(request)

    class SlowFirst(MadeUpEngine):
        """Answers the very first request last."""

        def answer(self, feed: Any) -> Iterator[Response | Refusal | None]:
            first = feed.take()
            yield from super().answer(feed)
            finished = sorted(path.name for path in tmp_path.rglob("shard-*.parquet"))
            assert finished == [f"shard-{n:05d}.parquet" for n in range(1, 10)]
            yield echo(first)

    made = core.regenerate(job(tmp_path, prompts(100), SlowFirst(first_is_slow), shard_size=10))
    assert [entry["file"] for entry in made.entries] == [f"shard-{n:05d}.parquet" for n in range(10)]
    assert all(entry["rows"] == 10 for entry in made.entries)


def test_the_window_is_bounded(tmp_path: Path) -> None:
    taken = []

    class Greedy(MadeUpEngine):
        """Takes all it can get before it answers."""

        def answer(self, feed: Any) -> Iterator[Response | Refusal | None]:
            held: list[Request] = []
            while True:
                while (request := feed.take()) is not None:
                    held.append(request)
                taken.append(len(held))
                if not held:
                    return
                yield echo(held.pop(0))

    core.regenerate(job(tmp_path, prompts(900), Greedy(), shard_size=7, engine="local", batch_size=2))
    assert max(taken) == 2 * core.ROOM


def test_a_refused_turn_ends_its_chat_and_is_asked_again_by_the_next_call(tmp_path: Path) -> None:
    asked, refusing = prompts(8, 4), {"on": True}

    def refuse(request: Request) -> Response | Refusal:
        _, _, turn = request_origin(request.key)
        return Refusal(request.key, "too long") if refusing["on"] and turn == 1 else echo(request)

    with pytest.raises(Stopped):
        core.regenerate(job(tmp_path, asked, MadeUpEngine(refuse, stop_after=11)))
    refusing["on"] = False
    made = core.regenerate(job(tmp_path, asked, MadeUpEngine(refuse)))
    assert made.counts.rejected == 0 and made.counts.rows == sum(n % 4 + 1 for n in range(8))
    refusing["on"] = True
    cut = core.regenerate(job(tmp_path / "cut", asked, MadeUpEngine(refuse)))
    assert cut.counts.rejected == 6 and cut.counts.rows == 8
    assert core.rejections(cut).count(b'"turn": 1, "reason": "too long"') == 6


def test_what_servers_failed_is_asked_again_also_of_finished_shards(tmp_path: Path) -> None:
    asked, failing = prompts(40, 3), {"on": True}

    def fail_some(request: Request) -> Response | Refusal:
        if int(request.key[:2], 16) % 5 == 0:
            return Refusal(request.key, "too long")
        if int(request.key[:2], 16) % 4 == 0 and failing["on"]:
            return Refusal(request.key, "out of order", is_transient=True)
        return echo(request)

    first = core.regenerate(job(tmp_path, asked, MadeUpEngine(fail_some), shard_size=3))
    failing["on"] = False
    engine = MadeUpEngine(fail_some)
    made = core.regenerate(job(tmp_path, asked, engine, shard_size=3))
    whole = core.regenerate(job(tmp_path / "whole", asked, MadeUpEngine(fail_some), shard_size=3))
    assert content(made) == content(whole) and made.counts.rejected < first.counts.rejected
    assert len(engine.asked) < 40, "answers of reopened shards are kept"
    assert core.regenerate(job(tmp_path, asked, None, shard_size=3)).asked == 0


def test_unwanted_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    kept = core.regenerate(job(tmp_path / "kept", prompts(40), MadeUpEngine()))
    cut = core.regenerate(job(tmp_path / "cut", prompts(40), MadeUpEngine(), drop=["length"]))
    cut_short = kept.counts.flags["length"]
    assert 0 < cut_short < 40
    assert cut.counts.dropped == {"length": cut_short} and cut.counts.rows == 40 - cut_short
    assert {row.finish_reason for row in rows(cut)} == {"stop"}


def test_a_damaged_shard_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = core.regenerate(job(tmp_path, prompts(30), MadeUpEngine(), shard_size=10))
    before = content(whole)
    (whole.store.folder / "shard-00001.parquet").write_bytes(b"torn")
    engine = MadeUpEngine()
    assert content(core.regenerate(job(tmp_path, prompts(30), engine, shard_size=10))) == before
    assert len(engine.asked) == 10 and "damaged" in caplog.text


@pytest.mark.parametrize("name", ["../../precious.parquet", "/etc/passwd", "shard-00000.parquet", "x\0y", None, ["a"]])
def test_a_record_that_names_another_file_is_damaged(tmp_path: Path, name: object) -> None:
    whole = core.regenerate(job(tmp_path / "w", prompts(30), MadeUpEngine(), shard_size=10))
    before, path = content(whole), whole.store.folder / "shard-00001.json"
    record = unsealed(path.read_bytes())
    if isinstance(name, str) and "\0" not in name and not (place := whole.store.folder / name).exists():
        place.write_bytes(before["shard-00001.parquet"])  # right by its digest
    path.write_text(json.dumps({**record, "entry": {**record["entry"], "file": name}}))
    (whole.store.folder / "shard-x.json").write_text("{}")  # no name of ours
    engine = MadeUpEngine()
    again = core.regenerate(job(tmp_path / "w", prompts(30), engine, shard_size=10))
    assert content(again) == before and len(engine.asked) == 10
    assert set(core.write_records(again, {})) == {
        *(f"shard-{n:05d}.parquet" for n in range(3)),
        shards.REJECTED,
        shards.MANIFEST,
    }


def test_another_input_under_the_work_is_refused(tmp_path: Path) -> None:
    asked = prompts(30)
    with pytest.raises(Stopped):
        core.regenerate(job(tmp_path, asked, MadeUpEngine(stop_after=25), shard_size=5))
    with pytest.raises(StageError, match="other prompts"):
        core.regenerate(job(tmp_path, asked[1:], MadeUpEngine(), shard_size=5))


def test_another_model_behind_the_server_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        core.regenerate(job(tmp_path, prompts(30), MadeUpEngine(stop_after=25, model="old"), shard_size=5))
    engine = MadeUpEngine(model="new")
    made = core.regenerate(job(tmp_path, prompts(30), engine, shard_size=5))
    assert made.asked == len(engine.asked) == 30
    assert "another model responds now (new) than before (old)" in capsys.readouterr().err
    core.remove_others(made)
    assert [path for path in tmp_path.glob("answers-*")] == [made.store.folder]


def test_an_engine_that_leaves_requests_behind_is_found_out(tmp_path: Path) -> None:
    class Forgetful(MadeUpEngine):
        """Stops without a word."""

        def answer(self, feed: Any) -> Iterator[Response | Refusal | None]:
            request = feed.take()
            feed.take()
            yield echo(request)

    with pytest.raises(StageError, match="left requests without a response"):
        core.regenerate(job(tmp_path, prompts(3), Forgetful()))


def test_chats_that_the_template_refuses_are_set_aside_unless_they_are_many(tmp_path: Path) -> None:
    class Picky:
        """The tiny tokenizer with a template that does not take every chat."""

        def __init__(self, refused: str) -> None:
            self._refused = refused

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer(), name)

        def __len__(self) -> int:
            return len(tokenizer())

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer()(*arguments, **options)

        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            from jinja2 import TemplateError

            if self._refused in messages[-1]["content"]:
                raise TemplateError("no such words")
            return tokenizer().apply_chat_template(messages, **options)

    few = job(tmp_path / "few", prompts(40), MadeUpEngine())
    few = Job(
        RolloutConfig(few.config.settings, TARGET, Picky("question 7")),
        few.prompts,
        few.turns,
        few.work,
        few.open_engine,
    )
    made = core.regenerate(few)
    assert made.counts.rejected == 1 and made.counts.rows == 39
    assert b"no such words" in core.rejections(made)
    many = job(tmp_path / "many", prompts(40), MadeUpEngine())
    many = Job(
        RolloutConfig(many.config.settings, TARGET, Picky("question")),
        many.prompts,
        many.turns,
        many.work,
        many.open_engine,
    )
    with pytest.raises(DataError, match="100% of the latest 20 chats do not fit the chat template"):
        core.regenerate(many)


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    import psutil

    def stream(number: int) -> Iterator[Prompt]:
        for n in range(number):
            messages = [{"role": "user", "content": f"question {n} " + "and so on " * 200}]
            yield Prompt(f"{n:016x}", "mine", "train", messages, None)

    def run(number: int) -> int:
        asking = job(
            tmp_path / str(number), [], MadeUpEngine(slots=64), shard_size=500, concurrency=16, engine="openai"
        )
        core.regenerate(Job(asking.config, lambda: stream(number), number, asking.work, asking.open_engine))
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    few, many = run(2_000), run(20_000)
    assert many - few < 40e6, f"grew by {(many - few) / 1e6:.0f} MB over 18,000 rows"
