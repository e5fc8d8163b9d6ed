"""Random data at every parser of rows, prompts, tools, manifests and shards: read, or refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.cli import show
from dllm.cli.generation import read_prompts as read_batch
from dllm.config.params import Source
from dllm.digests import unsealed
from dllm.errors import DllmError
from dllm.outside import visible
from dllm.prompts import references, table
from dllm.prompts.stream import stream
from dllm.responses import merge, shards, verify
from dllm.responses.counts import ManifestCounts
from dllm.responses.shards import Row

DEEP: Any = 1
for _ in range(90):
    DEEP = [DEEP]
ODD = [None, True, -1, 2**70, 1e308, "", "../../x", "\ud800", "\x1b[2J", [], {}, [None], {"a": None}, "x" * 3000, DEEP]
VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LINES = st.sampled_from(
    [
        b"[" * 3000,
        b'{"messages": ' + b"[" * 3000,
        b'{"messages": ' + b"1" * 5000 + b"}",
        b"\xff\xfe",
        b"NaN",
        b"{",
        b"\0",
    ]
)
ROW = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": {"b": 2}, "tool_call_id": "1"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
    ],
    "system": "s",
    "metadata": {"tools": "[]"},
    "reference": 3,
}
BOUNDED = settings(max_examples=60)


def in_one_line(call: Callable[[], Any]) -> None:
    """Run a call; what it raises is for a user."""
    try:
        call()
    except DllmError as error:
        line = str(error)
        assert "\n" not in line and visible(line) == line and len(line) <= 500 and error.exit_code in (2, 3, 6)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all that a value holds."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """Return a copy with the value at one place replaced."""
    if not path:
        return by
    copied = copy.deepcopy(value)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return copied


@BOUNDED
@given(st.sampled_from(places(ROW)), VALUES, st.none() | LINES)
def test_a_row_that_is_changed_anywhere(tmp_path: Path, place: tuple[Any, ...], value: Any, line: bytes | None) -> None:
    text = json.dumps(changed(ROW, place, value)).encode()
    (tmp_path / "x.jsonl").write_bytes(text + b"\n" + (line or text) + b"\n")
    for share in (0.0, 1.0):
        in_one_line(lambda share=share: list(stream(Source(name="x.jsonl", max_bad_rows=share), tmp_path)))
    (tmp_path / "x.json").write_bytes(b"[" + text + b"]")
    in_one_line(lambda: list(stream(Source(name="x.json", max_bad_rows=1.0), tmp_path)))
    in_one_line(lambda: write_and_read(tmp_path))


def write_and_read(root: Path) -> None:
    """Write the prompts that were read, and read them again."""
    prompts = list(stream(Source(name="x.jsonl", max_bad_rows=1.0), root))
    table.write_prompts(prompts, root / table.FILE)
    assert [prompt.id for prompt in table.read_prompts(root)] == [prompt.id for prompt in prompts]


@BOUNDED
@given(
    st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.zst", ".parquet", ".arrow", ".xz"])
)
def test_bytes_that_are_no_file(tmp_path: Path, data: bytes, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(data)
    in_one_line(lambda: list(stream(Source(name=f"x{suffix}", max_bad_rows=1.0), tmp_path)))
    (tmp_path / "p.jsonl").write_bytes(data)
    in_one_line(lambda: read_batch(tmp_path / "p.jsonl"))
    (tmp_path / references.FILE).write_bytes(data)
    in_one_line(lambda: references.read_references(tmp_path))


@BOUNDED
@given(VALUES, VALUES)
def test_records_of_save_to_disk(tmp_path: Path, value: Any, name: Any) -> None:
    for record in ({"_data_files": value}, {"_data_files": [{"filename": name}]}, value):
        folder = tmp_path / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps(record))
        in_one_line(lambda: list(stream(Source(name="saved"), tmp_path)))
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": value}))
        in_one_line(lambda: list(stream(Source(name="saved"), tmp_path)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a finished folder, one part of one."""
    folder = tmp_path_factory.mktemp("whole")
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [Row(f"{n:016x}", 0, "s", "train", said, [1, 2], [5, 2], "stop", 2) for n in range(3)]
    entry = shards.write_shard(rows, folder / shards.shard_name(0))
    counts = ManifestCounts.of(rows).to_json()
    about = {"part": "0/1", "fingerprint_base": "b", "fingerprint": "f", "target": {"model": "m"}, "stop_ids": [2]}
    made = {"served": {"model": "m"}, "seconds": 1.0}
    entries = [{**entry, "counts": counts}]
    shards.write_manifest(folder, {"schema": shards.SCHEMA, **about, **counts, "made": made, "shards": entries})
    return folder


@BOUNDED
@given(st.data())
def test_a_manifest_that_is_changed_anywhere(tmp_path: Path, whole: Path, data: st.DataObject) -> None:
    folder = shutil.copytree(whole, tmp_path / "f", dirs_exist_ok=True)
    manifest = unsealed((whole / shards.MANIFEST).read_bytes())
    place = data.draw(st.sampled_from(places(manifest)))
    (folder / shards.MANIFEST).write_text(json.dumps(changed(manifest, place, data.draw(VALUES))))
    in_one_line(lambda: verify.verify(folder))
    in_one_line(lambda: list(show.select(folder)))
    in_one_line(lambda: shards.read_rows(folder))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    in_one_line(lambda: merge.merge([folder], tmp_path / "out"))


@pytest.mark.parametrize("text", ["[" * 5000, "1" * 5000, '{"schema": 2, "shards": ' + "[" * 2000, "NaN", '"x"'])
def test_a_manifest_that_exhausts_a_reader(tmp_path: Path, text: str) -> None:
    (tmp_path / shards.MANIFEST).write_text(text)
    with pytest.raises(DllmError, match="manifest"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize("file", ["../x.parquet", "/etc/passwd", "..", "", "a/b.parquet", "x\0y"])
def test_a_manifest_s_paths_stay_inside_for_every_reader(tmp_path: Path, whole: Path, file: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "f")
    manifest = unsealed((folder / shards.MANIFEST).read_bytes())
    manifest["shards"][0]["file"] = file
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    for reader in (shards.read_rows, verify.verify, lambda each: list(show.select(each))):
        with pytest.raises(DllmError, match="lies elsewhere"):
            reader(folder)
    with pytest.raises(DllmError, match="lies elsewhere"):
        merge.merge([folder], tmp_path / "out")
    with pytest.raises(DllmError, match="lies elsewhere"):
        next(shards.read_shard(folder, manifest["shards"][0]))


def test_a_manifest_that_lost_a_shard_is_not_trained_on(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "f")
    manifest = unsealed((folder / shards.MANIFEST).read_bytes())
    (folder / shards.MANIFEST).write_text(json.dumps({**manifest, "shards": []}))
    with pytest.raises(DllmError, match="hold 0 rows, it counts 3"):
        shards.read_rows(folder)


@BOUNDED
@given(st.data())
def test_tables_of_our_own_columns_that_hold_anything(tmp_path: Path, data: st.DataObject) -> None:
    texts = st.none() | st.sampled_from(["[", "{}", "[1]", "[" * 3000, "1" * 5000, "x"])
    turn = st.none() | st.fixed_dictionaries({name: texts for name in ("role", "content", "tool_calls", "name")})
    row = {
        "id": data.draw(texts), "source": "s", "split": "train", "given": None,
        "messages": data.draw(st.none() | st.lists(turn, max_size=2)), "tools": data.draw(texts),
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema=table.schema()), tmp_path / table.FILE)
    in_one_line(lambda: table.read_prompts(tmp_path))
