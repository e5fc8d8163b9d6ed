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


@pytest.mark.parametrize("orient", ["columns", "index", "split"])
def test_a_table_that_pandas_wrote_in_one_object_is_named(tmp_path: Path, orient: Any) -> None:
    import pandas as pd

    pd.DataFrame(ROWS).to_json(tmp_path / "x.json", orient=orient)
    with pytest.raises(DataError, match=r"whole columns.*orient='records', lines=True"):
        read(tmp_path, "x.json")


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("message_id", r"prepare\.sources\[\]\.column"),
        ("message_tree_id", r"prepare\.sources\[\]\.column"),
        ("Messages", "did you mean Messages"),
        ("MESSAGES", "did you mean MESSAGES"),
        ("messages ", r"only 'messages ', parent_id.*did you mean 'messages '"),
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


@pytest.mark.parametrize(("train", "other"), [("train", "test"), ("Training", "dev"), ("train", "validation")])
def test_rows_of_several_splits_in_one_file_are_not_all_trained_on(tmp_path: Path, train: str, other: str) -> None:
    rows = [{**row, "split": train if number else other} for number, row in enumerate(ROWS)]
    put(tmp_path / "x.jsonl", *rows)
    with pytest.raises(DataError, match=r"the column split has rows of train and of .*ignore_columns"):
        read(tmp_path, "x.jsonl")
    assert len(read(tmp_path, "x.jsonl", ignore_columns=["split"])[0]) == 3
    for kept in (rows[:1], rows[1:], [{**row, "split": word} for row, word in zip(ROWS, "abc", strict=True)]):
        put(tmp_path / "x.jsonl", *kept)
        assert len(read(tmp_path, "x.jsonl")[0]) == len(kept)


def test_a_reference_that_is_no_text_is_not_said_to_be_used(tmp_path: Path) -> None:
    for value, use in (
        (["4"], "not used: neither a text nor a number"),
        ("4", "correct result"),
        (4, "correct result"),
    ):
        put(tmp_path / "x.jsonl", {**ROWS[0], "reference": value})
        assert read(tmp_path, "x.jsonl")[1].reading.columns["reference"] == use


@pytest.mark.parametrize("text", ["None", "nan", "<NA>"])
def test_what_pandas_writes_for_no_system_prompt_is_none(tmp_path: Path, text: str) -> None:
    put(tmp_path / "x.jsonl", {**ROWS[0], "system": text})
    found = list(stream(Source(name="x.jsonl"), tmp_path))
    assert [turn["role"] for turn in found[0].messages] == ["user"]


def test_chats_inside_of_turns_are_no_rows_of_the_file(tmp_path: Path) -> None:
    put(tmp_path / "x.jsonl", {"messages": [{"turn": 1, "messages": chat("q")}]})
    with pytest.raises(DataError, match="a turn names no `role`"):
        read(tmp_path, "x.jsonl")
