"""Columns and keys of turns that look like a part of the prompt are used or refused; others are listed."""

from __future__ import annotations

import json
import re
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
TOOLS = ["tool_list", "toolset", "apis", "api_list", "tool_schemas", "functionList", "plugins", "tools_json"]
TOOLS += ["tool_descriptions"]
NEARLY = [
    "system_prompt_text",
    "system_prompt_en",
    "defaultSystemPrompt",
    "prompt_template",
    "base_prompt",
    "task_prompt",
]


@pytest.mark.parametrize("name", [*TEXTS, *TOOLS, *NEARLY])
@pytest.mark.parametrize("value", ["A text.", ["A text."], [{"name": "A text."}]])
def test_what_looks_like_a_part_of_the_prompt_is_not_dropped(name: str, value: Any) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {name} belongs to the prompt"):
        read({"messages": [QUESTION], name: value})
    found, reading = read({"messages": [QUESTION], name: value}, ignore_columns=[name])
    assert found == [QUESTION] and reading.columns[name] == "left out, as asked"


@pytest.mark.parametrize("name", ["id", "prompt_id", "num_turns", "language", "source", "category", "chosen", "output"])
def test_other_columns_are_listed(name: str) -> None:
    assert read({"messages": [QUESTION], name: "A text."})[1].columns[name] == "not used"


FACTS = {
    "prompt_id": "c4 1f",
    "prompt_source": "a site of questions",
    "prompt_category": "Open question answering",
    "original_prompt_id": "1 of 3",
    "system_prompt_hash": "4d1f",
    "default_system_prompt": "qwen",
    "prompt_tokens": 12,
    "prompt_token_ids": [1, 2],
    "num_prompts": 3,
    "has_system_prompt": True,
    "prompt_style": "chain of thought",
    "labelling_prompt": [{"role": "user", "content": "Which is better?"}],
    "generation_prompt": ["You are asked to write."],
    "judge_system_prompt": "Be a fair judge.",
    "revised_prompt": "A red fox runs.",
    "eval_prompt_template": "Rate it from 1 to 5.",
    "social_media": "a.b/c",
    "media": "nytimes.com",
    "pdf_url": "https://a.b/c.pdf",
}


@pytest.mark.parametrize(("name", "value"), FACTS.items(), ids=FACTS)
def test_what_is_said_about_a_prompt_is_listed(name: str, value: Any) -> None:
    assert read({"messages": [QUESTION], name: value})[1].columns == {"messages": "chat", name: "not used"}
    assert read({"messages": [QUESTION], "metadata": {name: value}})[0] == [QUESTION]


@pytest.mark.parametrize("name", ["media", "mm_data", "multi_modal_data", "pdf"])
@pytest.mark.parametrize("value", ["dog.jpg", ["https://a.b/dog"], {"image": "dog"}, b"%PDF"])
def test_names_of_media_that_have_other_uses_are_told_by_what_they_hold(name: str, value: Any) -> None:
    for row in ({"messages": [QUESTION], name: value}, {"messages": [{**QUESTION, name: value}]}):
        with pytest.raises(Unusable, match="other than text"):
            read(row)


SCHEMAS = [{"name": "look"}]
DEEP = {
    "metadata.request.tools": {"metadata": {"request": {"tools": SCHEMAS}}},
    "metadata.request.system": {"metadata": {"request": {"system": "Be brief."}}},
    "metadata.request.image": {"metadata": {"request": {"image": "dog.jpg"}}},
    "metadata.sent.system": {"metadata": {"sent": {"system": "Be brief.", "model": "m"}}},
    "metadata.default_system_prompt": {"metadata": {"default_system_prompt": "Be brief."}},
    "metadata[].tools": {"metadata": [{"n": 1}, {"tools": SCHEMAS}]},
    "metadata[].systemPrompt": {"metadata": [{"systemPrompt": "Be brief."}]},
    "a.b.tools": {"a": '{"b": "{\\"tools\\": [{\\"name\\": \\"look\\"}]}"}'},
    "a[].tools": {"a": '[{"tools": [{"name": "look"}]}]'},
    "extra_body.chat_template_kwargs.enable_thinking": {
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}
    },
    "template_kwargs.enable_thinking": {"template_kwargs": {"enable_thinking": False}},
    "chat_template_kwargs.x": {"chat_template_kwargs": '{"x": 1}'},
    "template_args": {"template_args": ["no_think"]},
    "messages[].extra.request.tools": {"messages": [{**QUESTION, "extra": {"request": {"tools": SCHEMAS}}}]},
}


@pytest.mark.parametrize(("name", "row"), DEEP.items(), ids=DEEP)
def test_parts_of_the_prompt_are_found_wherever_a_row_has_them(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {re.escape(name)} belongs to the prompt"):
        read({"messages": [QUESTION], **row})
    start = name.removeprefix("messages[].")
    column = name.removesuffix(start) + start.split(".")[0].removesuffix("[]")
    for ignored in (name, column):
        assert read({"messages": [QUESTION], **row}, ignore_columns=[ignored])[0] is not None


OTHERS = {
    "completions of UltraFeedback": {"completions": [{"custom_system_prompt": "Be kind to all.", "response": "No."}]},
    "the prompt of MagPie": {"gen_input_configs": {"pre_query_template": "<|user|> and more", "seed": None}},
    "turns of WildChat": {"messages": [{**QUESTION, "header": {"accept-language": "en"}, "toxic": 1}]},
    "what verl computes rewards with": {
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"need_tools_kwargs": True, "tools_kwargs": {"calc": {"create_kwargs": {"ground_truth": "4"}}}},
    },
    "a reply of a server": {"raw": {"choices": [{"message": {"content": "An oak.", "tools": SCHEMAS}}]}},
    "the request for the response": {"response": {"request": {"system": "Be a judge now."}}},
    "a schema of the output": {"format": {"schema": {"properties": {"image": {"type": "string"}}}}},
    "arguments": {"plan": [{"name": "show", "arguments": {"image": "dog.jpg"}}]},
    "what is needed to build": {"steps": [{"tools": ["saw", "hammer"], "text": "Saw the oak."}]},
    "a machine": {"metadata": {"env": {"system": "Ubuntu Linux 22"}}},
    "labels of another task": {"metadata": {"labels": [{"image": "https://a.b/c.png"}]}},
    "another chat": {"chosen": [{"role": "user", "content": "x", "tools": SCHEMAS}]},
}


@pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS)
def test_what_belongs_to_responses_and_metadata_is_not_asked_for(row: dict[str, Any]) -> None:
    chat, reading = read({"messages": [QUESTION], **row})
    assert len(chat) == 1 and chat[0]["content"] == QUESTION["content"]
    assert set(reading.columns.values()) == {"chat", "not used"}


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


@pytest.mark.parametrize(
    ("asked", "text", "is_held"),
    [
        ("Name an animal whose name begins with the given letter.", "a", False),
        ("Name an animal whose name begins with the given letter.\n\na", "a", True),
        ("Name an animal whose name begins with this letter: a", "a", True),
        ("Is this number larger than 100?", "100", False),
        ("Which is it? A. one B. two", "two", True),
        ("Translate 'tree'.", "tree", True),
        ("Say what dragons eat.", "dragon", False),
        ("Don't stop: what's it?", "s", False),
        ("Mend it. Say how.", "Say", False),
        ("You are a friendly dragon. Be brief.", "a friendly dragon", True),
        (
            "\u7ffb\u8bd1\u6210\u82f1\u6587\uff1a\u4f60\u597d\u4e16\u754c\u670b\u53cb",
            "\u4f60\u597d\u4e16\u754c\u670b\u53cb\u4eec"[:6],
            True,
        ),
    ],
)
def test_a_short_text_is_held_where_it_is_set_off(asked: str, text: str, is_held: bool) -> None:
    chat = read({"instruction": asked, "input": text}, "instruction")[0]
    assert chat == (asked if is_held else f"{asked}\n\n{text}")
    if not is_held:
        with pytest.raises(UnusedColumn, match="the column persona belongs"):
            read({"messages": [{"role": "user", "content": asked}], "persona": text})


def test_a_number_is_a_text_of_the_prompt_and_what_stands_for_nothing_is_none() -> None:
    assert read({"instruction": "Double it.", "input": 7}, "instruction")[0] == "Double it.\n\n7"
    with pytest.raises(UnusedColumn, match="the column context belongs"):
        read({"question": "Is it warm?", "context": 35}, "question")
    assert read({"question": "Is it warm?", "context": 35, "options": 4}, "question", ignore_columns=["context"])[0]
    for nothing in ("nan", "None", "N/A", "<noinput>"):
        chat, reading = read({"instruction": "Sort.", "input": nothing}, "instruction")
        assert chat == "Sort." and reading.columns["input"] == "empty"
    assert read({"messages": [QUESTION], "tools": "None"})[1].columns["tools"] == "empty"


@pytest.mark.parametrize(
    "options",
    [{"A": "x", "B": "y", "C": "z", "D": "w"}, {"opa": "x", "opb": "y"}, {"option_1": "x"}, {"choice_a": "x"},
     {"ending0": "x"}, {"answer_choices": ["x", "y"]}],
    ids=str,
)  # fmt: skip
def test_options_in_columns_of_their_own_are_a_part_of_a_question(options: dict[str, Any]) -> None:
    with pytest.raises(UnusedColumn, match=f"the column {next(iter(options))} belongs to the prompt"):
        read({"question": "Which is true?", **options, "answer": "A"}, "question")
    assert read({"messages": [QUESTION], **options})[0] == [QUESTION]


@pytest.mark.parametrize(
    "chat",
    [[{"type": "human", "content": "Hi"}, {"type": "ai", "content": "Hello"}], [["Hi", "Hello"]], ["Hi", "Hello", "q"],
     [{"speaker": "a", "text": "Hi"}]],
    ids=str,
)  # fmt: skip
def test_json_in_a_chat_s_column_that_is_no_chat_is_no_question(chat: Any) -> None:
    with pytest.raises(DataError, match="conversations is a text of JSON whose items are no turns"):
        read({"conversations": json.dumps(chat)}, "conversations")
    assert read({"question": json.dumps(chat)}, "question")[0] == json.dumps(chat)
    assert read({"messages": "[1, 2, 3] is sorted?"})[0] == "[1, 2, 3] is sorted?"


def test_what_says_the_same_otherwise_is_read() -> None:
    empty = {"role": "system", "content": ""}
    assert read({"messages": [empty, QUESTION], "system": "Be nice."})[0] == [
        {**empty, "content": "Be nice."},
        QUESTION,
    ]
    lists = {"role": ["user", "assistant"], "content": ["Hi", "Hello"], "tool_calls": None}
    assert read({"messages": lists})[0] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    schema = {"type": "function", "function": {"name": "look", "parameters": {}}}
    cells = read_row({"messages": [QUESTION], "tools": schema}, "messages", Source(name="x"), "x:1", Reading())
    assert cells.tools == [schema]


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
