"""What training prompts ask already is found however it is written, and nothing else."""

from __future__ import annotations

from pathlib import Path

from dllm.config.params import Source
from dllm.prompts import sets, sources
from dllm.prompts.overlap import asked_in_training
from dllm.prompts.table import Prompt, prompt_id

LONG = "Ann has 3 apples, and Ben has 4 more. How many have they?"


def training(*texts: str, source: str = "mine") -> list[Prompt]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(prompt_id(chat), source, "train", chat) for chat in chats]


def test_case_punctuation_spaces_and_what_stands_around_make_no_difference() -> None:
    for text in (LONG, LONG.upper().replace(" ", "\n"), f"Q: {LONG}\nThink first!", LONG.replace(",", " -")):
        assert asked_in_training({"it": [LONG]}, training("Another question", text)) == {"it": "mine"}
    for text in (LONG.replace("4", "5"), LONG.removesuffix("they?"), f"{LONG[:20]} so {LONG[20:]}", ""):
        assert asked_in_training({"it": [LONG]}, training(text)) == {}


def test_a_short_question_is_asked_only_by_a_turn_of_its_own() -> None:
    questions = {"hi": ["Hi there!"], "none": ["..."]}
    assert asked_in_training(questions, training("hi, there")) == {"hi": "mine"}
    assert asked_in_training(questions, training("Hi there, can you help me with my homework of today?", "")) == {}


def test_every_user_turn_counts_and_the_first_source_is_named() -> None:
    (chat,) = training("Hello", source="chats")
    chat.messages.extend([{"role": "assistant", "content": LONG}, {"role": "user", "content": "Thanks"}])
    assert asked_in_training({"it": [LONG]}, [chat]) == {}
    chat.messages[-1]["content"] = LONG
    assert asked_in_training({"it": [LONG]}, [chat, *training(LONG)]) == {"it": "chats"}


def test_built_in_sources_ask_what_the_published_sets_ask(tmp_path: Path) -> None:
    for name in ("gsm8k", "humaneval"):
        entry = Source(name=name)
        prompts = sets.read(entry, tmp_path)
        chats = [str(row.chat) for row in sources.rows(entry, tmp_path)]
        questions = {prompt.id: sets.texts(entry, prompt) for prompt in prompts}
        found = asked_in_training(questions, training(*chats))
        assert found.keys() == questions.keys(), "the source's own instruction is another one"
