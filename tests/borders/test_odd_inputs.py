"""Files of another kind than their name, odd columns and names: used, or refused in a line that helps."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.models.targets import load_tokenizer
from dllm.prompts import sources
from dllm.prompts.stream import Tally, stream
from tests.borders.test_containers import SCHEMAS, chat, lines, prompts, put, read
from tests.engines.openai.asking import TARGET

ROWS = [{"messages": chat(str(number))} for number in range(3)]


def parquet(path: Path) -> bytes:
    pq.write_table(pa.table({"messages": ["a question"]}), path)
    return path.read_bytes()


OTHER_KINDS: dict[str, tuple[str, Any, str]] = {
    "gzip": ("a.jsonl", gzip.compress(lines(ROWS)), r"compressed with gzip.*name it a\.jsonl\.gz"),
    "zstd": ("a.json", pa.compress(lines(ROWS), codec="zstd", asbytes=True), r"name it a\.json\.zst"),
    "parquet": ("a.jsonl", parquet, r"a parquet file.*name it a\.parquet"),
    "a zip": ("a.jsonl", b"PK\x03\x04" + bytes(30), "a zip archive.*read are"),
    "UTF-16": ("a.jsonl", lines(ROWS).decode().encode("utf-16"), "UTF-16"),
    "a pointer": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "Git LFS.*lfs pull"),
    "a page": ("a.jsonl", b"<!DOCTYPE html><html>Not found</html>\n", "a page of HTML"),
    "a document": ("a.jsonl", json.dumps(ROWS, indent=2).encode(), r"one JSON document.*name it a\.json"),
    "nothing": ("a.jsonl", b"\n\n", "no usable prompt in 0 rows|the input is empty"),
    "a key twice": ("a.jsonl", b'{"messages": "a", "messages": "b"}\n', "the key 'messages' stands twice"),
    "half a file": ("a.jsonl.gz", gzip.compress(lines(ROWS * 500))[:-300], "ended before the end"),
    "no row": ("a.jsonl", b"1\n2\n", "2 of 2 rows.*look whether it is the right file"),
}


@pytest.mark.parametrize(("name", "data", "said"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, data: Any, said: str) -> None:
    (tmp_path / name).write_bytes(data(tmp_path / "made.parquet") if callable(data) else data)
    tally = Tally()
    if name.startswith("a.") and data == b"\n\n":
        assert not list(stream(Source(name=name), tmp_path, tally=tally)) and tally.rows == 0
        return
    with pytest.raises(DataError, match=said) as caught:
        list(stream(Source(name=name), tmp_path, tally=tally))
    assert len(str(caught.value)) <= 500


def test_texts_that_a_writer_left_as_bytes_are_texts(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", *ROWS)
    chats = [json.dumps(row["messages"]).encode() for row in ROWS]
    pq.write_table(pa.table({"messages": pa.array(chats, pa.binary())}), tmp_path / "a.parquet")
    assert prompts(Source(name="a.parquet"), tmp_path) == prompts(Source(name="a.jsonl"), tmp_path)


def test_an_empty_file_and_a_link_to_a_folder_are_listed(tmp_path: Path) -> None:
    put(tmp_path / "d" / "a.jsonl", *ROWS)
    (tmp_path / "d" / "b.jsonl").touch()
    (tmp_path / "d" / "more").symlink_to(tmp_path)
    tally = Tally()
    assert len(list(stream(Source(name="d"), tmp_path, tally=tally))) == 3
    assert tally.reading.files == {"a.jsonl": 3, "b.jsonl": 0}
    assert tally.reading.passed_over == {"more": "a link to a folder"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/datasets/a/b", "an address is not read.*OWNER/NAME"),
        ("s3://bucket/x.jsonl", "an address is not read"),
        ("json", "a kind of file, and no dataset"),
        ("pipe.jsonl", "no file, but a pipe"),
        ("empty", r"no \.parquet.* file in the folder, only a\.zip"),
    ],
)
def test_a_name_that_is_no_source_is_refused(tmp_path: Path, name: str, said: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.zip").touch()
    with pytest.raises(DataError, match=said):
        source = Source(name=name)
        sources.inputs(source, tmp_path)
        list(stream(source, tmp_path))


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_not_the_whole_project(name: str) -> None:
    with pytest.raises(ValidationError):
        Source(name=name)


def test_arguments_of_the_template_and_names_of_users_are_not_dropped_in_silence(tmp_path: Path) -> None:
    for arguments in ({"enable_thinking": False}, {"documents": [{"text": "a"}]}, {"date": "today"}):
        (key,) = arguments
        name = f"chat_template_kwargs.{key}"
        with pytest.raises(DataError, match=f"the column {name} belongs to the prompt"):
            read(tmp_path, {"messages": chat(), "chat_template_kwargs": arguments})
        found, _ = read(tmp_path, {"messages": chat(), "chat_template_kwargs": arguments}, ignore_columns=[name])
        assert found is not None
    empty = {"enable_thinking": None, "xml_tools": [], "tools": SCHEMAS}
    assert read(tmp_path, {"messages": chat(), "chat_template_kwargs": empty})[0].tools == SCHEMAS
    _, tally = read(tmp_path, {"messages": [{"role": "user", "content": "q", "name": "ann"}]})
    assert tally.reading.columns["messages[].name"] == "not used"
    answered = [*chat(), {"role": "tool", "content": "3", "name": "add"}]
    assert "messages[].name" not in read(tmp_path, {"messages": answered})[1].reading.columns


def test_schemas_of_other_vendors_are_read_or_refused_as_what_they_are(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found, tally = read(tmp_path, {"messages": chat(), "tools": [{"name": "add", "input_schema": schema}]})
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    assert tally.unseen(load_tokenizer(TARGET)) != []
    with pytest.raises(DataError, match="tool 1 is not JSON"):
        read(tmp_path, {"messages": chat(), "tools": ["add"]})
