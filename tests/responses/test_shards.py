"""Shards and their manifest: whole, verified, and refused by name where they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from dllm.errors import DataError
from dllm.responses import shards
from dllm.responses.shards import Row
from tests.responses.shard_folder import write_rows


def row(n: int) -> Row:
    return Row(
        prompt_id=f"{n:016x}",
        sample=0,
        source="one" if n % 2 else "two",
        split="heldout" if n % 5 == 0 else "train",
        messages=[{"role": "user", "content": f"Zwölf {n}"}, {"role": "assistant", "content": "ja"}],
        prompt_ids=[1, 2, n],
        answer_ids=list(range(n % 4)),
        finish_reason="stop" if n % 3 else "length",
        num_tokens=n % 4,
        turn=n % 2,
        flags=["length", "repetition"][: n % 3],
    )


ROWS = [row(n) for n in range(25)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(iter(ROWS), tmp_path, 10, {"target": {"model": "m"}})
    return tmp_path


def test_rows_come_back_by_split(folder: Path) -> None:
    assert shards.read_rows(folder) == ROWS
    assert shards.read_rows(folder, "heldout") == [row(n) for n in (0, 5, 10, 15, 20)]


def test_the_manifest_counts_what_is_there(folder: Path) -> None:
    manifest = shards.read_manifest(folder)
    assert [(shard["file"], shard["rows"]) for shard in manifest["shards"]] == [
        ("shard-00000.parquet", 10),
        ("shard-00001.parquet", 10),
        ("shard-00002.parquet", 5),
    ]
    assert manifest["target"] == {"model": "m"}
    assert manifest["rows"] == 25 and manifest["rejected"] == 0 and manifest["dropped"] == {}
    assert manifest["flags"] == {"length": 16, "repetition": 8}
    assert manifest["tokens"] == sum(n % 4 for n in range(25)) == sum(manifest["tokens_by_split"].values())
    assert manifest["tokens_by_split"]["heldout"] == 0 + 1 + 2 + 3 + 0
    assert manifest["finish_reasons"] == {"length": 9, "stop": 16}
    assert manifest["splits"] == {"heldout": 5, "train": 20}
    assert manifest["sources"] == {"one": 12, "two": 13}


def test_equal_rows_make_equal_bytes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_rows(ROWS, other, 10, {"target": {"model": "m"}})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_the_usual_library_reads_a_shard(folder: Path) -> None:
    table = datasets.Dataset.from_parquet(str(folder / "shard-00002.parquet"), cache_dir=str(folder / "cache"))
    assert [turn["content"] for turn in table[0]["messages"]] == ["Zwölf 20", "ja"]
    assert table[0]["prompt_ids"] == [1, 2, 20] and table[0]["tools"] is None
    assert table[0]["messages"][1] == dict.fromkeys(("tool_calls", "tool_call_id", "name")) | ROWS[20].messages[1]


def test_rows_with_tools_lie_beside_rows_without(tmp_path: Path) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": '{"city": "Köln"}'}}
    said = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "grey", "tool_call_id": "x", "name": "look"},
        {"role": "assistant", "content": "grey"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"b": {}, "a": [1, None]}}}]
    rows = [ROWS[1], replace(ROWS[2], messages=said, tools=tools), ROWS[3]]
    write_rows(rows, tmp_path, 10, {})
    found = shards.read_rows(tmp_path)
    assert found == rows
    assert found[1].tools is not None and list(found[1].tools[0]["function"]["parameters"]) == ["b", "a"]


def test_an_unfinished_folder_is_not_read(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no finished responses.*manifest\.json.*dllm regenerate"):
        shards.read_rows(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "swap"])
def test_a_shard_that_is_not_the_manifest_s_is_named(folder: Path, damage: str) -> None:
    path = folder / "shard-00001.parquet"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((folder / "shard-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"shard-00001\.parquet") as caught:
        shards.read_rows(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 99, "shards": []}', "\udcff"])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"manifest.*manifest\.json"):
        shards.read_rows(folder)


def test_a_shard_of_other_columns_is_refused_though_its_hash_fits(folder: Path) -> None:
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "shard-00000.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    shards.write_manifest(folder, {name: value for name, value in manifest.items() if name != "seal"})
    with pytest.raises(DataError, match=r"other columns or rows.*shard-00000\.parquet"):
        shards.read_rows(folder)
