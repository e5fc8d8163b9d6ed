"""Rows out of files, and the file and line of what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm.errors import DataError
from dllm.prompts.files.readers import records

ROWS = [{"a": 1, "t": "zwölf"}, {"a": 2, "t": "\u2028"}, {"a": 3, "t": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.name == "list.json":
        path.write_text("\ufeff\n " + json.dumps(ROWS, indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    else:
        path.write_text("\ufeff" + LINES.replace("\n", "\r\n\n"))
    return path


@pytest.mark.parametrize("name", ["x.parquet", "list.json", "lines.json", "x.jsonl", "x.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    found = list(records(path))
    assert [row for _, row in found] == ROWS
    assert all(where.startswith(str(path)) for where, _ in found)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    assert [where for where, _ in records(write(tmp_path / "x.jsonl"))] == [
        f"{tmp_path}/x.jsonl:{n}" for n in (1, 3, 5)
    ]


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"not JSON: .*x\.jsonl:2"),
        ("x.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', r"not UTF-8: .*x\.jsonl:3"),
        ("x.json", b"[1,\n2,\n}", r"not JSON: .*x\.json:3"),
        ("x.json", b'["\xff"]', r"cannot read the file: .*x\.json"),
        ("x.parquet", b"PAR1 nothing", r"cannot read the parquet file: .*x\.parquet"),
        ("x.jsonl", b'{"a": 1}\n{"b": NaN}\n', r"NaN is no number of JSON; write null for it.*x\.jsonl:2"),
        ("x.json", b'[{"b": Infinity}]', r"Infinity is no number of JSON; write null for it.*x\.json:1"),
        ("x.jsonl", b'{"a": 1}\r{"a": 2}\r', r"lines end in CR alone.*x\.jsonl:1"),
        ("x.json", b'{"a": 1}\r{"a": 2}\r', r"lines end in CR alone.*x\.json:1"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\r\r{"a": 2}', mtime=0), r"lines end in CR alone.*x\.jsonl\.gz:1"),
        ("x.jsonl.gz", gzip.compress(LINES.encode("utf-16-le"), mtime=0), r"not UTF-8: text in UTF-16 or UTF-32.*gz:1"),
        ("x.jsonl", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', r"objects over several lines.*`jq -c \.`"),
        ("x.json", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', r"another value at line 4, column 1; `jq -c \.`.*x\.json:4"),
        ("x.jsonl", b'{"a": 1}\n\0\0\0\0', r"a line of zero bytes: the file was not written to its end.*x\.jsonl:2"),
        ("x.feather", b"FEA1 old", r"Feather file of version 1.*version 2"),
        ("x.parquet", b"PARE secret", r"a parquet file that is encrypted"),
        ("x.jsonl.gz", b"plain", r"cannot read the file: .*x\.jsonl\.gz:1"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], r"cannot read the file: .*x\.jsonl\.gz"),
    ],
)
def test_damage_is_one_line_with_its_place(tmp_path: Path, name: str, data: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=line) as caught:
        list(records(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_an_encoding_that_is_not_read_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(LINES.encode(encoding))
    said = encoding[:6].upper() + encoding[7:].upper()
    with pytest.raises(DataError, match=rf"the file is text in {said} .*`iconv -f {said} -t UTF-8` converts it"):
        list(records(tmp_path / name))


@pytest.mark.parametrize(("name", "compress"), [("x.jsonl.bz2", bz2.compress), ("x.jsonl.xz", lzma.compress)])
def test_streams_after_one_another_are_read_to_the_end_or_refused(tmp_path: Path, name: str, compress: Any) -> None:
    parts = [compress(json.dumps(row).encode() + b"\n") for row in ROWS]
    path = tmp_path / name
    path.write_bytes(b"".join(parts) + b"\0" * 8)
    assert [row for _, row in records(path)] == ROWS
    for damaged in (
        [parts[0], b"\1" + parts[1][1:], parts[2]],
        [parts[0], LINES.encode()],
        [*parts[:2], parts[2][:-4]],
        [],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(DataError, match="cannot read the file"):
            list(records(path))


def test_times_that_python_does_not_have_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    late = pa.array([253402300800000, 0], pa.timestamp("ms"))
    odd = pa.array([1, 2], pa.timestamp("ms", "Mars/Olympus"))
    pq.write_table(pa.table({"a": ["x", "y"], "late": late, "odd": odd}), path)
    found = [row for _, row in records(path)]
    assert [row["a"] for row in found] == ["x", "y"]
    assert [row["late"] for row in found] == [253402300800000, 0] and [row["odd"] for row in found] == [1, 2]


def test_a_stream_whose_writer_was_killed_is_not_half_of_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])) as out:
        ends = []
        for number in range(3):
            out.write_batch(pa.record_batch({"a": [number]}))
            ends.append(sink.tell())
    assert len(list(records(path))) == 3
    whole = path.read_bytes()
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"no mark of its end.*x\.arrow"):
            list(records(path))


def test_columns_and_keys_of_tables_that_stand_twice_are_refused_as_those_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["t", "t"]), path)
    with pytest.raises(DataError, match=r"the column 't' stands twice"):
        list(records(path))
    kind = pa.map_(pa.string(), pa.int64())
    for pairs, said in (([("a", 1), ("b", None)], None), ([("a", 1), ("a", 2)], "the key 'a' stands twice")):
        pq.write_table(pa.table({"t": pa.array([pairs], kind)}), path)
        if said is None:
            assert [row for _, row in records(path)] == [{"t": {"a": 1, "b": None}}]
        else:
            with pytest.raises(DataError, match=said):
                list(records(path))
