"""Prompts as a stream: in order, each once, in parts that make the whole, and in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.params import Prepare, Source
from dllm.errors import DataError
from dllm.prompts.sources import input_digest
from dllm.prompts.stream import Tally, collect, stream
from dllm.prompts.table import HELDOUT, TRAIN, is_heldout

X = Source(name="x.jsonl")


def lay(root: Path, chats: Iterable[Any], name: str = "x.jsonl") -> Path:
    with (root / name).open("w") as file:
        file.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)
    return root


def test_prompts_come_in_the_input_s_order_each_once_and_are_counted(tmp_path: Path) -> None:
    lay(tmp_path, ["b", "a", "b", "", [], "c", "a"])
    tally = Tally()
    found = list(stream(X, tmp_path, tally=tally))
    assert [prompt.messages[0]["content"] for prompt in found] == ["b", "a", "c"]
    assert {prompt.split for prompt in found} == {TRAIN} and {prompt.source for prompt in found} == {"x.jsonl"}
    assert tally.to_json() == {
        "rows": 7, "prompts": 3, "other_parts": 0, "duplicates": 2, "over_limit": 0,
        "refused": {"empty user turn": 1, "no user turn": 1},
    }  # fmt: skip


def test_ids_splits_and_tools_are_those_of_prepare(tmp_path: Path) -> None:
    rows = [{"messages": str(n), "tools": [{"name": "look"}] if n % 3 == 0 else None} for n in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(stream(X, tmp_path, heldout_fraction=0.3))
    collected, _ = collect(Prepare(sources=[X], heldout_fraction=0.3), tmp_path)
    assert sorted(found, key=lambda prompt: prompt.id) == collected
    assert all((prompt.split == HELDOUT) == is_heldout(prompt.id, 0.3) for prompt in found)
    assert sum(prompt.tools is not None for prompt in found) == 20


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 5), st.none() | st.integers(1, 20))
def test_parts_make_the_whole_and_share_nothing(tmp_path: Path, numbers: list[int], of: int, limit: int | None) -> None:
    lay(tmp_path, map(str, numbers))
    source = X.model_copy(update={"limit": limit})
    whole = list(stream(source, tmp_path))
    parts = [list(stream(source, tmp_path, part=(i, of))) for i in range(of)]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in whole)
    assert len(whole) == min(len(set(numbers)), limit or len(numbers))
    for part in parts:
        assert part == [prompt for prompt in whole if prompt in part], "the input's order"


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 20))
def test_a_limit_keeps_the_smallest_ids_in_the_input_s_order(tmp_path: Path, numbers: list[int], limit: int) -> None:
    lay(tmp_path, map(str, numbers))
    whole, tally = list(stream(X, tmp_path)), Tally()
    kept = list(stream(X.model_copy(update={"limit": limit}), tmp_path, tally=tally))
    smallest = sorted(prompt.id for prompt in whole)[:limit]
    assert kept == [prompt for prompt in whole if prompt.id in smallest]
    assert tally.over_limit == len(whole) - len(kept) and tally.rows == len(numbers)


def test_a_limit_means_the_same_to_prepare_and_reads_every_row(tmp_path: Path) -> None:
    lay(tmp_path, map(str, range(60)))
    limited = Source(name="x.jsonl", limit=25)
    prepared, _ = collect(Prepare(sources=[limited], heldout_fraction=0.3), tmp_path)
    assert sorted(stream(limited, tmp_path, heldout_fraction=0.3), key=lambda prompt: prompt.id) == prepared
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(DataError, match=r"x\.jsonl:61"):
        list(stream(limited, tmp_path))


@pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet"])
def test_memory_does_not_grow_with_what_rows_hold(tmp_path: Path, kind: str) -> None:
    peaks = []
    for count in (2_000, 6_000):
        chats = (f"{n} " + "word " * 200 for n in range(count))
        if kind == "x.jsonl":
            lay(tmp_path, chats)
        else:
            pq.write_table(pa.table({"messages": list(chats)}), tmp_path / kind, row_group_size=500)
        tracemalloc.start()
        assert sum(1 for _ in stream(Source(name=kind), tmp_path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = peaks[1] - peaks[0]
    assert grown < 4_000 * 250, f"{grown / 4_000:.0f} bytes per row that holds 1000"


def test_the_input_s_digest_is_that_of_its_bytes_in_order(tmp_path: Path) -> None:
    lay(tmp_path, ["a", "b"])
    before = input_digest(X, tmp_path)
    (tmp_path / "x.jsonl").rename(tmp_path / "y.jsonl")
    assert input_digest(Source(name="y.jsonl"), tmp_path) == before
    (tmp_path / "folder").mkdir()
    for name, chat in (("1.jsonl", "a"), ("2.jsonl", "b")):
        lay(tmp_path / "folder", [chat], name)
    folder = input_digest(Source(name="folder"), tmp_path)
    lay(tmp_path / "folder", ["c"], "2.jsonl")
    assert len({before, folder, input_digest(Source(name="folder"), tmp_path)}) == 3
    assert input_digest(Source(name="gsm8k"), tmp_path) == input_digest(Source(name="gsm8k", limit=3), tmp_path)
    with pytest.raises(DataError, match="no such file"):
        input_digest(X, tmp_path)
