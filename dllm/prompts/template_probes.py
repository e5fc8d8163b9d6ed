"""What a chat template does with tools, turns, thinking and dates, found by rendering probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm.errors import DataError
from dllm.prompts.chats.turns import Message, Tools
from dllm.prompts.template import chat_template, prompt_ids, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION = "Is this rendered?"
_TURN_PROBE = "xyzzy"


def check_thinking_modes(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a chat template that renders the same prompt with thinking on and off.

    Raises:
        DataError: it does; the line names `where`, the key that asks for a mode.
    """
    on, off = (prompt_ids(tokenizer, [{"role": "user", "content": _QUESTION}], mode) for mode in (True, False))
    if on == off:
        what = "the chat template renders the same prompts with thinking on and off"
        raise DataError(what, where=where, hint="leave it out")


def ignores_tools(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> bool:
    """Return whether the chat template renders the same prompt with tools as without."""
    asked: list[Message] = [{"role": "user", "content": _QUESTION}]
    try:
        return prompt_ids(tokenizer, asked, tools=tools) == prompt_ids(tokenizer, asked)
    except DataError:
        return False


def unseen_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None) -> set[str]:
    """Return the roles of a chat of which the chat template leaves out the text of a turn: the target never sees it.

    A word of its own is put behind each text, and looked for in what is rendered.
    """
    with_text = [number for number, message in enumerate(messages) if message["content"].strip()]
    probed = [dict(message) for message in messages]
    for number in with_text:
        probed[number]["content"] += f" {_TURN_PROBE}{number}e"
    try:
        rendered = render_chat(tokenizer, probed, None, tools=tools)
    except DataError:  # each row that it refuses is counted, with its reason
        return set()
    return {str(messages[number]["role"]) for number in with_text if f"{_TURN_PROBE}{number}e" not in rendered}


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes today's date, so that a prompt has other ids on another day."""
    return "strftime_now" in chat_template(tokenizer)
