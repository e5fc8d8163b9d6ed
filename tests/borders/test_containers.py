"""A chat gives the same prompt from every container; every option, column and file is used, listed or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.prompts import sources
from dllm.prompts.chats.turns import parse_chat
from dllm.prompts.sources import HUB
from dllm.prompts.stream import Tally, stream

Row = dict[str, Any]
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
LIKE_JSON = st.sampled_from(
    ["[1, 2]", '{"a": 1}', "null", "12", "true", '"x"', "[]", '[{"role": 1', "2024-05-01", "1.0"]
)
TEXT = WORDS | LIKE_JSON
PLAIN = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.sampled_from([0.5, -2.25]) | TEXT
ARGUMENTS = st.dictionaries(st.sampled_from("abcd"), PLAIN | st.lists(PLAIN, max_size=2), max_size=3)
TOOL = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["look", "add"]),
        "parameters": st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(
                    st.sampled_from(["unit", "city"]), st.just({"type": "string", "default": None}), max_size=2
                ),
            }
        ),
    }
)


@st.composite
def chats(draw: st.DrawFn) -> Row:
    """Draw a row: turns of all roles, calls and their results, and tools."""
    turns: list[Row] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            function = {"name": "look", "arguments": draw(ARGUMENTS)}
            calls = [{"id": "call1", "type": "function", "function": function}]
            turns.append({"role": "assistant", "content": draw(TEXT), "tool_calls": calls})
            turns.append({"role": "tool", "content": draw(TEXT), "tool_call_id": "call1"})
        else:
            turns.append({"role": "assistant", "content": draw(TEXT)})
    tools = [{"type": "function", "function": tool} for tool in draw(st.lists(TOOL, max_size=2))]
    return {"messages": turns, "tools": tools}


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[Row]) -> pa.Table:
    """Hold every turn and every tool as `arrow.json`, as `datasets` does where types differ."""
    texts = {name: [list(map(json.dumps, row[name])) for row in rows] for name in ("messages", "tools")}
    kind = pa.list_(pa.json_(pa.string()))
    return pa.table({name: pa.array(each, pa.list_(pa.string())).cast(kind) for name, each in texts.items()})


def texts(rows: list[Row], write: Callable[[Any], Any]) -> pa.Table:
    return pa.table({name: [write(row[name]) for row in rows] for name in ("messages", "tools")})


def nested(rows: list[Row]) -> pa.Table:
    """Hold turns as structs, which have all keys of any, with the arguments as `arrow.json` inside."""

    def kind(arguments: pa.DataType) -> pa.DataType:
        function = pa.struct([("name", pa.string()), ("arguments", arguments)])
        call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
        names = [(name, pa.string()) for name in ("role", "content", "tool_call_id")]
        return pa.list_(pa.struct([*names, ("tool_calls", pa.list_(call))]))

    turns = json.loads(json.dumps([row["messages"] for row in rows]))
    for each in (call for chat in turns for turn in chat for call in turn.get("tool_calls", ())):
        each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    messages = pa.array(turns, kind(pa.string())).cast(kind(pa.json_(pa.string())))
    return pa.table({"messages": messages, "tools": [json.dumps(row["tools"]) for row in rows]})


def saved(rows: list[Row], path: Path) -> None:
    """Write what `save_to_disk` writes."""
    path.mkdir(exist_ok=True)
    table = as_table(rows)
    with pa.OSFile(str(path / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (path / "dataset_info.json").write_text("{}")
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


CONTAINERS: dict[str, Callable[[list[Row], Path], object]] = {
    "a.JSONL": lambda rows, path: path.write_bytes(lines(rows)),
    "a.ndjson": lambda rows, path: path.write_bytes(b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n")),
    "a.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "a.json.gz": lambda rows, path: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.zst": lambda rows, path: path.write_bytes(pa.compress(lines(rows), codec="zstd", asbytes=True)),
    "a.jsonl.bz2": lambda rows, path: path.write_bytes(bz2.compress(lines(rows))),
    "a.jsonl.xz": lambda rows, path: path.write_bytes(lzma.compress(lines(rows))),
    "json.parquet": lambda rows, path: pq.write_table(as_table(rows), path),
    "nested.parquet": lambda rows, path: pq.write_table(nested(rows), path),
    "text.parquet": lambda rows, path: pq.write_table(texts(rows, json.dumps), path),
    "turns.parquet": lambda rows, path: pq.write_table(texts(rows, lambda each: list(map(json.dumps, each))), path),
    "text.jsonl": lambda rows, path: path.write_bytes(
        lines([{name: json.dumps(each) for name, each in row.items()} for row in rows])
    ),
    "saved": saved,
}


def prompts(source: Source, root: Path) -> list[tuple[str, Any, Any, Any]]:
    return [(each.id, each.messages, each.tools, each.given) for each in stream(source, root)]


@settings(max_examples=30)
@given(st.lists(chats(), min_size=1, max_size=3))
def test_every_container_gives_the_same_prompts(tmp_path: Path, rows: list[Row]) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    expected = prompts(Source(name="a.jsonl"), tmp_path)
    assert expected
    for name, write in CONTAINERS.items():
        write(rows, tmp_path / name)
        assert prompts(Source(name=name), tmp_path) == expected, name


@pytest.mark.parametrize("kind", ["use_json", "structs"])
def test_datasets_own_files_give_the_same_prompts(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for text, arguments in (
        ("12", {"city": "Bern"}),
        ("[1, 2]", {"day": "2024-05-01", "n": 3} if kind == "use_json" else {"day": "x"}),
    ):
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
        chat = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "c1"},
        ]
        rows.append({"messages": chat})
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/train.jsonl").write_bytes(lines(rows))
    expected = prompts(Source(name="repo/train.jsonl"), tmp_path)
    found = list(HUB.rows(Source(name=str(tmp_path / "repo")), tmp_path))
    assert [parse_chat(row.chat, row.tools, row.place).messages for row in found] == [each[1] for each in expected]
    dataset = datasets.load_dataset(str(tmp_path / "repo"), split="train")
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "both")
    for name in ("x.parquet", "disk", "both"):
        assert prompts(Source(name=name), tmp_path) == expected, name
    assert len(prompts(Source(name="both", split="test"), tmp_path)) == 1
    with pytest.raises(ConfigError, match="splits train, test, none of dev"):
        prompts(Source(name="both", split="dev"), tmp_path)


STRUCT = {"a": pa.int64(), "b": pa.string(), "c": pa.list_(pa.string()), "d": pa.struct([("x", pa.int64())])}
"""Types of arguments in a table whose rows agree on them."""
OF_ONE_TYPE = st.fixed_dictionaries(
    {},
    optional={
        "a": st.none() | st.integers(0, 9),
        "b": st.none() | TEXT,
        "c": st.none() | st.lists(st.none() | TEXT, max_size=2),
        "d": st.none() | st.fixed_dictionaries({}, optional={"x": st.none() | st.integers(0, 9)}),
    },
)


@settings(max_examples=30)
@given(st.lists(OF_ONE_TYPE, min_size=1, max_size=4))
def test_null_arguments_are_absent_in_structs_and_in_what_is_written_from_them(
    tmp_path: Path, arguments: list[Row]
) -> None:
    # A struct has one order of keys for all rows.
    rows = [{"messages": called({key: each[key] for key in STRUCT if key in each})} for each in arguments]
    function = pa.struct([("name", pa.string()), ("arguments", pa.struct(list(STRUCT.items())))])
    calls = pa.list_(pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)]))
    names = [(name, pa.string()) for name in ("role", "content", "tool_call_id")]
    kind = pa.list_(pa.struct([*names, ("tool_calls", calls)]))
    table = pa.table({"messages": pa.array([row["messages"] for row in rows], kind)})
    pq.write_table(table, tmp_path / "structs.parquet")
    (tmp_path / "filled.jsonl").write_bytes(lines(table.to_pylist()))  # as `to_json` of datasets: null for absent keys
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    pq.write_table(pa.table({"messages": [json.dumps(row["messages"]) for row in rows]}), tmp_path / "text.parquet")
    expected = prompts(Source(name="a.jsonl"), tmp_path)
    spelt = [json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) for _, messages, _, _ in expected]
    assert spelt and all(None not in each.values() for each in spelt)
    for name in ("structs.parquet", "filled.jsonl", "text.parquet"):
        assert prompts(Source(name=name), tmp_path) == expected, name


def test_null_arguments_of_a_text_are_kept_in_every_container(tmp_path: Path) -> None:
    rows = [{"messages": called('{"city": "Bern", "cursor": null}')}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        (found,) = prompts(Source(name=name), tmp_path)
        assert found[1][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern", "cursor": null}'


def called(arguments: Any) -> list[Row]:
    """Return a chat with a call."""
    call = {"id": "call1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    result = {"role": "tool", "content": "x", "tool_call_id": "call1"}
    return [*chat(), {"role": "assistant", "content": "", "tool_calls": [call]}, result]


def put(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(text: str = "q") -> list[Row]:
    return [{"role": "user", "content": text}]


def read(root: Path, row: Row, **options: Any) -> tuple[Any, Tally]:
    put(root / "x.jsonl", row)
    tally = Tally()
    found = list(stream(Source(name="x.jsonl", **options), root, tally=tally))
    return (found[0] if found else None), tally


SCHEMAS = [{"type": "function", "function": {"name": "w"}}]


@pytest.mark.parametrize(
    "row",
    [
        {"tools": SCHEMAS},
        {"functions": [{"name": "w"}]},
        {"metadata": json.dumps({"tools": SCHEMAS})},
        {"metadata": {"tools": json.dumps(SCHEMAS), "id": 3}},
        {"tools": json.dumps([json.dumps(SCHEMAS[0])]), "extra": {"functions": SCHEMAS}},
    ],
)
def test_tools_are_used_wherever_a_row_has_them(tmp_path: Path, row: Row) -> None:
    found, tally = read(tmp_path, {"messages": chat(), **row})
    assert found.tools == SCHEMAS and "tools" in tally.reading.columns.values()


@pytest.mark.parametrize("name", ["system", "system_prompt", "System Prompt"])
def test_a_system_column_is_a_system_turn(tmp_path: Path, name: str) -> None:
    found, tally = read(tmp_path, {"conversations": [{"from": "human", "value": "q"}], name: "Be brief.", "id": 1})
    assert [turn["content"] for turn in found.messages] == ["Be brief.", "q"]
    assert tally.reading.columns == {"conversations": "chat", name: "system prompt", "id": "not used"}
    own = [{"role": "system", "content": "Be brief."}, *chat()]
    assert len(read(tmp_path, {"messages": own, name: "Be brief."})[0].messages) == 2
    with pytest.raises(DataError, match="own system turn differ"):
        read(tmp_path, {"messages": own, name: "Be long."})


@pytest.mark.parametrize(
    ("column", "value"),
    [("input", "kiwi fig"), ("context", "A text."), ("history", [["a", "b"]]), ("xml_tools", ["<x>"]), ("system", [1])],
)
def test_a_column_of_the_prompt_is_refused_unless_left_out(tmp_path: Path, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"the column {column} belongs to the prompt.*ignore_columns"):
        read(tmp_path, {"messages": chat(), column: value})
    found, tally = read(tmp_path, {"messages": chat(), column: value}, ignore_columns=[column])
    assert found is not None and tally.reading.columns[column] == "left out, as asked"
    assert read(tmp_path, {"messages": chat(), column: None})[1].reading.columns[column] == "empty"
    if isinstance(value, str):
        assert read(tmp_path, {"messages": chat(f"Sort {value}."), column: value})[0] is not None


def test_alpaca_rows_are_joined(tmp_path: Path) -> None:
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    with pytest.raises(DataError, match="instruction, to which input is joined"):
        read(tmp_path, row)
    assert read(tmp_path, row, column="instruction")[0].messages == chat("Sort.\n\nb a")


@pytest.mark.parametrize("name", ["image", "images", "input_audio", "video"])
def test_rows_with_pictures_or_sounds_are_refused_and_counted(tmp_path: Path, name: str) -> None:
    for row in ({"messages": chat("<image>?"), name: ["a.jpg"]}, {"messages": [{**chat()[0], name: {"bytes": "x"}}]}):
        found, tally = read(tmp_path, row)
        assert found is None and tally.refused == {"content other than text": 1}


def test_files_of_a_folder_are_read_or_named(tmp_path: Path) -> None:
    for number, name in enumerate(["a.jsonl", "b.NDJSON", "sub/c.jsonl"]):
        put(tmp_path / "d" / name, {"messages": chat(str(number))})
    put(tmp_path / "d/report.json", {"kept": 1})
    for name in ("README.md", "x.csv", ".hidden.jsonl", ".cache/y.jsonl"):
        put(tmp_path / "d" / name, {"messages": chat(name)})
    tally = Tally()
    assert len(list(stream(Source(name="d"), tmp_path, tally=tally))) == 3
    assert set(tally.reading.files) == {"a.jsonl", "b.NDJSON", "sub/c.jsonl"}
    assert set(tally.reading.passed_over) == {"README.md", "x.csv", "report.json"}
    assert any("report.json" in line for line in tally.lines())


def test_splits_of_a_folder_are_chosen_or_refused(tmp_path: Path) -> None:
    for split in ("train_sft", "test_sft"):
        put(tmp_path / f"d/data/{split}-00000-of-00001.jsonl", {"messages": chat(split)})
    assert [each[1] for each in prompts(Source(name="d", split="train_sft"), tmp_path)] == [chat("train_sft")]
    for split in ("train", "dev"):
        with pytest.raises(ConfigError, match=r"splits test_sft, train_sft.*sources\[\]\.split"):
            prompts(Source(name="d", split=split), tmp_path)
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        put(tmp_path / "e" / name, {"messages": chat(name)})
    assert {each[1][0]["content"] for each in prompts(Source(name="e"), tmp_path)} == {"train.jsonl", "more.jsonl"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.jsonl", {"split": "dev"}),
        ("x.jsonl", {"split": "train[:3]"}),
        ("x.jsonl", {"subset": "main"}),
        ("x.jsonl", {"revision": "main"}),
        ("gsm8k", {"split": "test"}),
        ("gsm8k", {"column": "question"}),
        ("arithmetic", {"ignore_columns": ["x"]}),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    put(tmp_path / "x.jsonl", {"messages": chat()})
    with pytest.raises(ConfigError, match="does not apply"):
        sources.inputs(Source(name=name, **options), tmp_path)


BAD = [
    {"messages": None},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "wizard", "content": "a"}]},
    {"messages": 7},
    {"other": 1},
    [1],
    "text",
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_set_aside_counted_and_named(tmp_path: Path, bad: Any) -> None:
    put(tmp_path / "x.jsonl", *({"messages": chat(str(n))} for n in range(99)), bad)
    tally = Tally()
    assert len(list(stream(Source(name="x.jsonl"), tmp_path, tally=tally))) == 99
    assert tally.set_aside.total() == 1 and any("x.jsonl:100" in line for line in tally.lines())
    put(tmp_path / "x.jsonl", *({"messages": chat(str(n))} for n in range(2)), bad)
    with pytest.raises(DataError, match=r"1 of 3 rows.*x\.jsonl:3.*max_bad_rows to 0\.334 or more"):
        list(stream(Source(name="x.jsonl"), tmp_path))
    assert len(list(stream(Source(name="x.jsonl", max_bad_rows=0.334), tmp_path))) == 2
