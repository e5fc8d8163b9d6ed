"""Columns and keys of turns that look like a part of the prompt are used or refused; others are listed."""

from __future__ import annotations

from typing import Any

import pytest

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts.chats.turns import Unusable
from dllm.prompts.rows.reading import Reading, UnusedColumn, read_row

QUESTION = {"role": "user", "content": "Which tree\nis this, an oak or an elm?"}
ANSWER = {"role": "assistant", "content": "An oak, as the leaves say."}


def read(row: dict[str, Any], column: str = "messages", **options: Any) -> tuple[Any, Reading]:
    reading = Reading()
    return read_row(row, column, Source(name="x", **options), "x:1", reading).chat, reading


@pytest.mark.parametrize("name", ["system_content", "sysprompt", "sys_msg", "SystemText", "developer_message"])
@pytest.mark.parametrize("write", [str, lambda text: [{"type": "text", "text": text}]])
def test_a_system_prompt_has_many_names(name: str, write: Any) -> None:
    chat, reading = read({"messages": [QUESTION], name: write("Be brief.")})
    assert chat == [{"role": "system", "content": "Be brief."}, QUESTION]
    assert reading.columns[name] == "system prompt"


TEXTS = [
    "sys",
    "preamble",
    "persona",
    "background",
    "chat_history",
    "previousMessages",
    "conversation_history",
    "retrieved_docs",
    "passages",
    "prompt",
    "user_prompt",
    "question",
    "query",
    "instructions",
    "few_shot_examples",
    "demonstrations",
    "db_schema",
    "sql_context",
    "user_profile",
    "memories",
    "role_description",
    "character_card",
    "assistant_prefix",
    "prefill",
    "prompt_suffix",
    "format_instructions",
]
TOOLS = ["tool_list", "toolset", "apis", "api_list", "tool_schemas", "functionList", "plugins"]


@pytest.mark.parametrize("name", [*TEXTS, *TOOLS])
@pytest.mark.parametrize("value", ["A text.", ["A text."], [{"name": "A text."}]])
def test_what_looks_like_a_part_of_the_prompt_is_not_dropped(name: str, value: Any) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {name} belongs to the prompt"):
        read({"messages": [QUESTION], name: value})
    found, reading = read({"messages": [QUESTION], name: value}, ignore_columns=[name])
    assert found == [QUESTION] and reading.columns[name] == "left out, as asked"


@pytest.mark.parametrize("name", ["id", "prompt_id", "num_turns", "language", "source", "category", "chosen", "output"])
def test_other_columns_are_listed(name: str) -> None:
    assert read({"messages": [QUESTION], name: "A text."})[1].columns[name] == "not used"


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "other", [sharegpt("Which oak?"), sharegpt("Which oak?", "This."), '[{"from": "human", "value": "x"}]']
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_second_chat_that_asks_something_else_is_not_dropped(other: Any, column: str) -> None:
    row = {"messages": [QUESTION, ANSWER], "conversations": other}
    with pytest.raises(UnusedColumn, match="hold two chats that differ"):
        read(row, column)
    read_row(row, column, Source(name="x", column=column), "x:1", reading := Reading())
    assert sorted(reading.columns.values()) == ["chat", "not used"]


def test_a_second_chat_that_the_first_holds_is_listed() -> None:
    asked = QUESTION["content"].replace("\n", " ")
    for other in (sharegpt(asked), sharegpt(asked, "Another response."), [ANSWER]):
        row = {"messages": [QUESTION, ANSWER], "conversations": other}
        assert read(row)[1].columns["conversations"] == "not used: messages holds it"
    told = {"from": "system", "value": "Be brief."}
    row = {"messages": [QUESTION], "conversations": [told, *sharegpt(asked)]}
    with pytest.raises(UnusedColumn, match="differ"):
        read(row)
    assert read({**row, "system": "Be brief."})[1].columns["conversations"] == "not used: messages holds it"


HELD = {
    "a text": "Which tree is this,",
    "a list": ["an oak", "an elm?"],
    "pairs": [["Which tree is this", "an oak"]],
    "turns": [QUESTION],
    "mappings": {"title": "oak", "n": None},
    "the chat, rendered": f"<|im_start|>user\n{QUESTION['content']}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("value", HELD.values(), ids=HELD)
def test_texts_that_the_chat_holds_are_not_asked_for(value: Any) -> None:
    for chat in ([QUESTION, ANSWER], [{"from": "human", "value": QUESTION["content"]}], QUESTION["content"]):
        assert read({"messages": chat, "prompt": value})[1].columns["prompt"] == "not used: the chat holds it"


def test_what_only_the_response_holds_is_not_held() -> None:
    with pytest.raises(UnusedColumn, match="context"):
        read({"messages": [QUESTION, ANSWER], "context": "as the leaves say"})


@pytest.mark.parametrize("name", ["choices", "options", "table", "examples", "article", "starter_code"])
def test_beside_a_bare_question_more_names_are_parts_of_the_prompt(name: str) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {name} belongs to the prompt"):
        read({"question": "How many?", name: ["one", "two"]}, "question")
    assert read({"question": "Which, one or two?", name: ["one", "two"]}, "question")[0] == "Which, one or two?"
    assert read({"messages": [QUESTION], name: [{"message": {"content": "one"}}]})[1].columns[name] == "not used"


@pytest.mark.parametrize("name", ["enable_thinking", "reasoning_effort", "chat_template", "continue_final_message"])
@pytest.mark.parametrize("value", [False, "low"])
def test_arguments_of_the_template_in_columns_of_their_own_are_not_dropped(name: str, value: Any) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {name} belongs to the prompt"):
        read({"messages": [QUESTION], name: value})
    assert read({"messages": [QUESTION], name: None})[1].columns[name] == "empty"


TURN_KEYS = [("context", "A text."), ("documents", [{"text": "A."}]), ("input", "b a"), ("channel", "analysis")]
TURN_KEYS += [("recipient", "functions.look")]


@pytest.mark.parametrize(("name", "value"), TURN_KEYS)
def test_a_turn_s_own_parts_of_the_prompt_are_not_dropped(name: str, value: Any) -> None:
    with pytest.raises(UnusedColumn, match=rf"the column messages\[\]\.{name} belongs to the prompt"):
        read({"messages": [{**QUESTION, name: value}]})
    assert read({"messages": [{**QUESTION, name: value}]}, ignore_columns=[f"messages[].{name}"])[0] is not None
    assert read({"messages": [QUESTION, {**ANSWER, name: value}]})[1].columns[f"messages[].{name}"] == "not used"


def test_the_final_channel_is_text_and_files_of_a_turn_are_refused() -> None:
    chat = [QUESTION, {**ANSWER, "channel": "final", "recipient": "all"}, QUESTION]
    assert read({"messages": chat})[0] == chat
    for name in ("file", "files", "file_ids"):
        with pytest.raises(Unusable, match="other than text"):
            read({"messages": [{**QUESTION, name: ["a.pdf"]}]})
        assert read({"messages": [QUESTION], name: ["a.pdf"]})[1].columns[name] == "not used"


@pytest.mark.parametrize("name", ["prefix", "partial", "prefill"])
def test_a_response_that_is_only_begun_is_not_dropped(name: str) -> None:
    with pytest.raises(UnusedColumn, match=rf"messages\[\]\.{name}"):
        read({"messages": [QUESTION, {**ANSWER, name: True}]})
    column = f"messages[].{name}"
    reading = read({"messages": [QUESTION, {**ANSWER, name: True}]}, ignore_columns=[column])[1]
    assert reading.columns[column] == "left out, as asked"
    assert read({"messages": [QUESTION, {**ANSWER, name: False}]})[0] is not None


@pytest.mark.parametrize("name", ["images", "audio"])
def test_pictures_of_the_response_that_is_generated_again_refuse_no_row(name: str) -> None:
    chat, reading = read({"messages": [QUESTION, {**ANSWER, name: {"id": "x"}}]})
    assert len(chat) == 2 and reading.columns[f"messages[].{name}"] == "not used"
    with pytest.raises(Unusable):
        read({"messages": [QUESTION, {**ANSWER, name: {"id": "x"}}, QUESTION]})


def test_alpaca_s_input_is_joined_however_it_is_spelt() -> None:
    assert read({"Instruction": "Sort.", "Input": "b a"}, "Instruction")[0] == "Sort.\n\nb a"


@pytest.mark.parametrize("name", ["tool", "function"])
def test_a_list_of_schemas_is_tools_under_a_name_in_the_singular(name: str) -> None:
    reading = Reading()
    for value, used in (([{"name": "look"}], True), ("look", False), (["look"], False)):
        cells = read_row({"messages": [QUESTION], name: value}, "messages", Source(name="x"), "x:1", reading)
        assert cells.tools == (value if used else None)


@pytest.mark.parametrize("role", ["assistant", "prompter", "User"])
def test_rows_that_are_turns_are_no_questions(role: str) -> None:
    with pytest.raises(UnusedColumn, match="the column role"):
        read({"text": "Why?", "role": role}, "text")
    assert read({"text": "Why?", "role": "Sherlock"}, "text")[0] == "Why?"


def test_empty_arguments_of_the_template_are_none() -> None:
    empty = {"custom_instructions": "", "python_tools": [], "xml_tools": [], "x": None}
    assert read({"messages": [QUESTION], "chat_template_kwargs": empty})[0] == [QUESTION]


def test_a_rendered_chat_is_named_beside_a_system_column_too() -> None:
    with pytest.raises(DataError, match="written as one text"):
        read({"chat": "USER: Hi.\n\n\nASSISTANT: Hello.", "system": "Be brief."}, "chat")
