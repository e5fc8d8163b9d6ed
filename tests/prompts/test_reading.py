"""What becomes of columns and files that belong to a prompt."""

import json
from pathlib import Path

import pytest

from dllm.cli.verify import _folders
from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts import folder
from dllm.prompts.reading import Reading, read_row
from dllm.prompts.tools import JsonCell

QUESTION = {"role": "user", "content": "Which tree is this?"}


def chat_of(row: dict) -> tuple[object, Reading]:
    reading = Reading()
    return read_row(row, "messages", Source(name="x"), "x:1", reading).chat, reading


ASKED = "Which tree is this?"
PARTS = [{"type": "text", "text": ASKED}]


@pytest.mark.parametrize("content", [ASKED, PARTS, JsonCell(f'"{ASKED}"', ASKED)], ids=["text", "parts", "json"])
def test_a_text_that_the_chat_holds_is_not_asked_for_again(content: object) -> None:
    chat, reading = chat_of({"messages": [{"role": "user", "content": content}], "input": "Which tree is this?"})
    assert len(chat) == 1  # type: ignore[arg-type]
    assert reading.columns["input"] == "not used: the chat holds it"


def test_a_system_turn_of_parts_equals_its_column() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert chat_of({"messages": [system, QUESTION], "system": "Be brief."})[0] == [system, QUESTION]
    with pytest.raises(DataError, match="differ"):
        chat_of({"messages": [system, QUESTION], "system": "Be long."})


def test_a_system_prompt_inside_a_turn_is_used_and_listed() -> None:
    chat, reading = chat_of({"messages": [{**QUESTION, "system": "Be brief."}]})
    assert chat[0] == {"role": "system", "content": "Be brief."}  # type: ignore[index]
    assert reading.columns["messages[].system"] == "system prompt"


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["chats.jsonl", "test.jsonl"], ["chats.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_files_of_another_split_stay_out_and_are_named(tmp_path: Path, names: list[str], read: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"messages": [QUESTION]}) + "\n")
    found, passed_over = folder.files(tmp_path, "train", "x")
    assert sorted(found) == read
    assert sorted(passed_over) == sorted(set(names) - set(read))


def test_what_a_killed_call_has_left_half_made_is_not_verified(tmp_path: Path) -> None:
    for name in (".tiny-1.0a1b2c3d", "tiny-1"):
        (tmp_path / name).mkdir()
    assert _folders(tmp_path) == [tmp_path / "tiny-1"]
