"""A chat that is written as one text is no question."""

import json
import time

import pytest

from dllm.errors import DataError
from dllm.prompts.chats.transcripts import written
from dllm.prompts.chats.turns import parse_chat

CHATS = {
    "Anthropic": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: So.",
    "a prompt of Anthropic's": "Human: Hi.\n\nAssistant:",
    "Guanaco": "### Human: Hi.### Assistant: Hello.",
    "Vicuna": "USER: Hi. ASSISTANT: Hello.</s>USER: Why?",
    "speakers": "User: Hi.\nAssistant: Hello.\nUser: Why?",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\na b",
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST] Hello. </s><s>[INST] Why? [/INST]",
    "Mistral": "<s>[INST] Hi. [/INST] Hello.</s>",
    "Gemma": "<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\n",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi.</s>",
    "GLM": "[gMASK]<sop><|user|>\nHi.<|assistant|>",
    "ChatML, a tool": "<|im_start|>tool\n42<|im_end|>",
    "Granite": "<|start_of_role|>user<|end_of_role|>Hi.<|end_of_text|>",
    "EXAONE": "[|user|]Hi.\n[|assistant|]Hello.",
    "OpenAssistant": "<|prompter|>Hi.<|endoftext|><|assistant|>Hello.",
    "OpenChat": "GPT4 Correct User: Hi.<|end_of_turn|>GPT4 Correct Assistant: Hello.",
    "Solar": "### User:\nHi.\n\n### Assistant:\nHello.",
    "Markdown": "**User:** Hi.\n\n**Assistant:** Hello.",
    "one line": "Human: Hi. Assistant: Hello.",
    "letters": "\n\nH: Hi.\n\nA: Hello.",
    "Python": "({'role': 'user', 'content': 'Hi.'},)",
    "numpy": "array([{'content': 'Hi.', 'role': 'user'}], dtype=object)",
    "YAML": "- role: user\n  content: Hi.\n- role: assistant\n  content: Hello.\n",
    "gpt-oss": "<|start|>user<|message|>Hi.<|end|>",
    "Vicuna, whole": "A chat between a curious user and an assistant. USER: Hi. ASSISTANT: Hello.</s>",
    "speakers, a system": "System: Be brief.\nUser: Hi.\nAssistant: Hello.",
    "speakers, a system in Markdown": "### System:\nBe brief.\n\n### User:\nHi.\n\n### Assistant:\nHello.",
    "speakers in lower case": "user: Hi.\nassistant: Hello.",
    "a bot": "User: Hi.\nBot: Hello.",
    "Phi": "Instruct: Sort b a.\nOutput: a b",
    "LLaDA2": "<role>HUMAN</role>Hi.<role>ASSISTANT</role>Hello.",
    "Nemotron": "<extra_id_0>System\n\n<extra_id_1>User\nHi.\n<extra_id_1>Assistant\nHello.",
    "Kimi": "<|im_user|>user<|im_middle|>Hi.<|im_end|><|im_assistant|>assistant<|im_middle|>Hello.",
    "MiniMax": "]~!b[]~b]user\nHi.[e~[\n]~b]ai\nHello.",
    "Seed": "<seed:bos>user\nHi.<seed:eos><seed:bos>assistant\nHello.",
    "a token before": "<|endoftext|><|im_start|>user\nHi.<|im_end|>",
    "DeepSeek": "<｜begin▁of▁sentence｜><｜User｜>Hi.<｜Assistant｜>",  # noqa: RUF001
}


@pytest.mark.parametrize("text", CHATS.values(), ids=CHATS)
def test_a_chat_that_is_written_as_one_text_is_named(text: str) -> None:
    with pytest.raises(DataError, match=r"a whole chat is written as one text .*list of turns.*file:3"):
        parse_chat(text, None, "file:3")
    for turns in ([{"role": "user", "content": text}], json.dumps([{"role": "user", "content": text}])):
        assert parse_chat(turns, None, "file:3").messages == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|>user mean?",
        "Human: a species, or a person?",
        "User: ann. Assistant to whom?",
        "### Instruction:\nSort.\n\n### Response:\n",
        "[INST] Sort. [/INST]",
        "System: what is one?\nAnd a user?",
        "A chat between a cat and a dog.",
        "Instruct: a verb?",
        "Write a dialogue.\nHuman: Hi.\nAssistant: Hello.",
        "- role: a part in a play\n- form: verse",
        "array([1, 2]) or ({'a': 1},)?",
        "[|x|] is an absolute value",
        "Q: Who?\nA:",
        "<s> strikes text out in HTML",
    ],
)
def test_a_question_about_chats_is_one(text: str) -> None:
    assert written(text) is None


@pytest.mark.parametrize("text", ["Human: " + "\n" * 200_000, "[INST] " + "[/INST]" * 50_000, " " * 500_000 + "x"])
def test_a_long_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    assert written(text) is None
    assert time.process_time() - start < 60  # some milliseconds; hours where it is quadratic
