"""What becomes of columns and files that belong to a prompt."""

import json
from pathlib import Path

import pytest

from dllm.cli.verify import _folders
from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts.chats.tools import JsonCell
from dllm.prompts.chats.turns import Unusable
from dllm.prompts.rows.reading import Reading, UnusedColumn, read_row

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


PICTURES = (
    "image_path",
    "image_urls",
    "imageUrl",
    "img",
    "attachments",
    "input_image_base64",
    "Audio File",
    "video_bytes",
)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"url": "a.png"}])
def test_a_row_with_a_picture_is_refused_however_its_column_is_named(name: str, value: object) -> None:
    for row in ({"messages": [QUESTION], name: value}, {"messages": [{**QUESTION, name: value}]}):
        with pytest.raises(Unusable, match="other than text"):
            chat_of(row)
    assert len(chat_of({"messages": [QUESTION], name: []})[0]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["imagery", "image_count", "video_title", "imgur", "path", "file"])
def test_other_columns_are_no_pictures(name: str) -> None:
    assert chat_of({"messages": [QUESTION], name: "a"})[1].columns[name] == "not used"


@pytest.mark.parametrize(
    "name", ["systemPrompt", "system_instruction", "systemMessage", "SystemInstructions", "SYSTEM"]
)
def test_a_system_prompt_is_one_however_its_column_is_named(name: str) -> None:
    for row in ({name: "Be brief."}, {"extra": {name: "Be brief."}}, {"extra": json.dumps({name: "Be brief."})}):
        chat, reading = chat_of({"messages": [QUESTION], **row})
        assert chat == [{"role": "system", "content": "Be brief."}, QUESTION]
        assert "system prompt" in reading.columns.values()


@pytest.mark.parametrize("tools", [{"w": {}, "x": {}}, {"w": []}, {"w": ""}])
def test_tools_without_schemas_are_not_nothing(tools: dict) -> None:
    for row in ({"tools": tools}, {"functions": tools}, {"my_tools": tools}, {"extra": {"tools": tools}}):
        with pytest.raises(UnusedColumn, match="belongs to the prompt"):
            chat_of({"messages": [QUESTION], **row})
    with pytest.raises(DataError, match="no schema"):
        chat_of({"messages": [QUESTION], "tools": [tools]})


@pytest.mark.parametrize("tools", [{}, {"w": None}, [], [{}], "{}", None])
def test_no_tools_are_empty(tools: object) -> None:
    assert chat_of({"messages": [QUESTION], "tools": tools})[1].columns["tools"] == "empty"


def test_what_a_killed_call_has_left_half_made_is_not_verified(tmp_path: Path) -> None:
    for name in (".tiny-1.0a1b2c3d", "tiny-1"):
        (tmp_path / name).mkdir()
    assert _folders(tmp_path) == [tmp_path / "tiny-1"]
