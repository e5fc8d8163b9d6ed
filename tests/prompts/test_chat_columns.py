"""The column of the chat is found, and a file without one gets a line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts import sources
from dllm.prompts.stream import Tally, stream
from tests.borders.test_containers import chat, put

ROWS = [{"messages": chat(str(number))} for number in range(3)]


def read(root: Path, name: str, **options: Any) -> tuple[list[str], Tally]:
    tally, source = Tally(), Source(name=name, **options)
    sources.inputs(source, root)
    return [each.messages[-1]["content"] for each in stream(source, root, tally=tally)], tally


@pytest.mark.parametrize("value", [{"data": ROWS}, {"version": 1, "train": ROWS, "test": ROWS[:1]}])
def test_rows_inside_of_one_object_are_named_also_beside_other_files(tmp_path: Path, value: dict[str, Any]) -> None:
    put(tmp_path / "d" / "a.jsonl", *({"messages": chat(f"a{number}")} for number in range(300)))
    for indent in (None, 1):
        (tmp_path / "d" / "b.json").write_text(json.dumps(value, indent=indent))
        key = list(value)[-2:][0] if "version" in value else "data"
        for name in ("d/b.json", "d"):
            with pytest.raises(DataError, match=rf"one object, with rows in {key}.*`jq -c '\.{key}\[\]'`"):
                read(tmp_path, name)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("message_id", r"prepare\.sources\[\]\.column"),
        ("message_tree_id", r"prepare\.sources\[\]\.column"),
        ("Messages", "did you mean Messages"),
        ("conversation", "did you mean conversation"),
    ],
)
def test_a_column_that_may_be_meant_is_named(tmp_path: Path, column: str, said: str) -> None:
    put(tmp_path / "x.jsonl", {column: "q", "parent_id": None})
    with pytest.raises(DataError, match=said):
        read(tmp_path, "x.jsonl")


@pytest.mark.parametrize("empty", [[], "", None])
def test_a_chat_in_the_second_column_is_found_where_the_first_is_empty(tmp_path: Path, empty: Any) -> None:
    put(tmp_path / "x.jsonl", {"messages": empty, "conversations": [{"from": "human", "value": "q"}]})
    found, tally = read(tmp_path, "x.jsonl")
    assert found == ["q"] and tally.reading.columns["messages"] == "empty"


@pytest.mark.parametrize("name", ["~old.jsonl", "[a].jsonl", "a*.jsonl", "datasets/a/b"])
def test_a_file_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    put(tmp_path / name / "a.jsonl" if "/" in name else tmp_path / name, *ROWS)
    assert len(read(tmp_path, name)[0]) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("~nobody-has-this-name/x.jsonl", "no such file or folder"),
        ("*.jsonl", "patterns are not read.*name the folder"),
        ("d/train-*", "patterns are not read"),
        ("{a,b}.jsonl", "patterns are not read"),
        ("datasets/a/b", "a dataset of the hub is named OWNER/NAME"),
        ("huggingface.co/datasets/a/b", "a dataset of the hub is named OWNER/NAME"),
    ],
)
def test_a_name_of_no_file_gets_its_own_hint(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, name)
