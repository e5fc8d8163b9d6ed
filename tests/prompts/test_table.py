"""Prompts: identity, the held-out part, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.config.params import Prepare, Source
from dllm.errors import DataError
from dllm.prompts.stream import collect
from dllm.prompts.table import HELDOUT, TRAIN, is_heldout, prompt_id, read_prompts, write_prompts

IDS = [prompt_id([{"role": "user", "content": str(n)}]) for n in range(4000)]


def test_ids_stay_what_they_are() -> None:
    # A literal: another id would move prompts between train and held-out, and orphan every shard.
    chat = [{"role": "user", "content": "Zwölf?"}]
    assert prompt_id(chat) == "eeed768f1654fe02"
    assert prompt_id([{"content": "Zwölf?", "role": "user"}]) == prompt_id(chat)
    others = [[{"role": "system", "content": "Zwölf?"}], chat * 2, [{"role": "user", "content": "Zwolf?"}], []]
    assert len({prompt_id(other) for other in [*others, chat]}) == 5


def test_tools_calls_and_ids_of_calls_make_another_prompt() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    other = [chat[0], {**chat[1], "tool_call_id": "x"}]
    assert len({prompt_id(chat), prompt_id(chat, tools), prompt_id(other), prompt_id(other, tools)}) == 4
    assert prompt_id([chat[0], {"tool_call_id": "x", **chat[1]}]) == prompt_id(other)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_fraction_holds_out_a_superset(one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert all(is_heldout(id, large) for id in IDS[:200] if is_heldout(id, small))


def test_the_fraction_is_kept_also_among_the_smallest_ids() -> None:
    for ids in (IDS, sorted(IDS)[:1000]):
        assert sum(is_heldout(id, 0.1) for id in ids) / len(ids) == pytest.approx(0.1, abs=0.03)


def source(root: Path, name: str, chats: list[object], **options: object) -> Source:
    (root / name).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return Source(name=name, **options)


def test_rows_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    one = source(tmp_path, "one.jsonl", [str(n) for n in range(40)] + ["0", "1", "", [], []])
    two = source(tmp_path, "two.jsonl", [str(n) for n in range(30, 60)], limit=15)
    prompts, report = collect(Prepare(sources=[one, two], heldout_fraction=0.3), tmp_path)
    counts = report["sources"]
    assert counts["one.jsonl"]["rows"] == 45 and counts["one.jsonl"]["duplicates"] == 2
    assert counts["one.jsonl"]["refused"] == {"empty user turn": 1, "no user turn": 2}
    assert counts["two.jsonl"] | {TRAIN: 0, HELDOUT: 0} == {
        "rows": 30, "duplicates": 10, "refused": {}, "over_limit": 5, TRAIN: 0, HELDOUT: 0
    }  # fmt: skip
    assert report["prompts"] == len(prompts) == 55 == report[TRAIN] + report[HELDOUT]
    assert report["duplicates"] == 12 and report["refused"] == 3
    assert [prompt.id for prompt in prompts] == sorted({prompt.id for prompt in prompts})
    assert {prompt.source for prompt in prompts} == {"one.jsonl", "two.jsonl"}


def test_a_prompt_s_side_depends_on_nothing_but_itself(tmp_path: Path) -> None:
    few = source(tmp_path, "few.jsonl", [str(n) for n in range(60)])
    many = source(tmp_path, "many.jsonl", [str(n) for n in reversed(range(200))])
    sides = [
        {p.id: p.split for p in collect(Prepare(sources=chosen, heldout_fraction=0.2), tmp_path)[0]}
        for chosen in ([few], [many, few])
    ]
    assert len(sides[0]) == 60 and len(sides[1]) == 200
    assert sides[0].items() <= sides[1].items()


def test_a_limit_takes_the_same_prompts_from_shuffled_rows(tmp_path: Path) -> None:
    found = []
    for name, numbers in (("up.jsonl", range(100)), ("down.jsonl", reversed(range(100)))):
        limited = source(tmp_path, name, [str(n) for n in numbers], limit=50)
        found.append([p.id for p in collect(Prepare(sources=[limited], heldout_fraction=0.2), tmp_path)[0]])
    assert found[0] == found[1] and len(found[0]) == 50


@pytest.mark.parametrize(
    ("chats", "fraction", "line"),
    [
        ([], 0.1, "no usable prompt in 0 rows"),
        (["", []], 0.1, r"no usable prompt in 2 rows \(1 with empty user turn, 1 with no user turn\)"),
        (["a", "b"], 1e-9, "none of 2 prompts falls into the heldout split.*heldout_fraction"),
        (["a", "b"], 1 - 1e-9, "none of 2 prompts falls into the train split"),
    ],
)
def test_nothing_to_train_or_judge_on_is_refused(
    tmp_path: Path, chats: list[object], fraction: float, line: str
) -> None:
    prepare = Prepare(sources=[source(tmp_path, "x.jsonl", chats)], heldout_fraction=fraction)
    with pytest.raises(DataError, match=line):
        collect(prepare, tmp_path)


def test_what_is_written_is_read_again_by_split(tmp_path: Path) -> None:
    rows = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"Zwölf {n}"}] for n in range(30)]
    prompts, _ = collect(Prepare(sources=[source(tmp_path, "x.jsonl", list(rows))], heldout_fraction=0.3), tmp_path)
    path = tmp_path / "prompts.parquet"
    write_prompts(prompts, path)
    first = path.read_bytes()
    write_prompts(prompts, path)
    assert path.read_bytes() == first
    assert read_prompts(tmp_path) == prompts
    assert read_prompts(tmp_path, HELDOUT) == [prompt for prompt in prompts if is_heldout(prompt.id, 0.3)]


def test_tools_and_tool_turns_are_kept(tmp_path: Path) -> None:
    calls = [{"function": {"name": "look", "arguments": {"city": "Köln"}}}]
    chat = [{"role": "user", "content": "weather?"}, {"role": "assistant", "tool_calls": calls}]
    row = {"messages": [*chat, {"role": "tool", "content": "grey"}], "tools": json.dumps([{"name": "look"}])}
    rows = [row, *({"messages": str(n)} for n in range(20))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, report = collect(Prepare(sources=[Source(name="x.jsonl")], heldout_fraction=0.3), tmp_path)
    write_prompts(prompts, tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path) == prompts and report["refused"] == 0
    (kept,) = [prompt for prompt in prompts if prompt.tools]
    assert kept.tools == [{"type": "function", "function": {"name": "look"}}]
    assert [message["role"] for message in kept.messages] == ["user", "assistant", "tool"]
    assert kept.messages[1]["tool_calls"][0]["id"] == kept.messages[2]["tool_call_id"]


def test_a_table_of_the_last_version_says_what_to_run(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: ["a"] for name in ("id", "source", "split")}), tmp_path / "prompts.parquet")
    with pytest.raises(DataError, match=r"columns .*python -m dllm prepare"):
        read_prompts(tmp_path)


def test_a_published_table_is_replaced_and_never_changed(tmp_path: Path) -> None:
    prompts, _ = collect(
        Prepare(sources=[source(tmp_path, "x.jsonl", [str(n) for n in range(30)])], heldout_fraction=0.3), tmp_path
    )
    write_prompts(prompts, tmp_path / "prompts.parquet")
    (tmp_path / "linked").hardlink_to(tmp_path / "prompts.parquet")
    before = (tmp_path / "linked").read_bytes()
    write_prompts(prompts[:1], tmp_path / "prompts.parquet")
    assert (tmp_path / "linked").read_bytes() == before


def test_missing_and_damaged_tables_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prompts yet.*python -m dllm prepare"):
        read_prompts(tmp_path)
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"unreadable.*prompts\.parquet"):
        read_prompts(tmp_path)
