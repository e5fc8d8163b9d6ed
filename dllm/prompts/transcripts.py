"""Whole chats written as one text: by a chat template, or with names of the speakers.

Such a text is no question: read as one, the model would be asked with the response in its prompt.
"""

from __future__ import annotations

import re

_BOS = (
    r"(?:(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<BOS_TOKEN>|\[gMASK\]<sop>"
    r"|<\uff5cbegin▁of▁sentence\uff5c>)\s*)?"
)
_ROLE = r"(?:system|developer|user|human|assistant|model)"
_FORMATS = {
    "by ChatML": rf"<\|im_start\|>{_ROLE}\b",
    "by Llama's template": rf"<\|(?:start_header_id|header_start)\|>{_ROLE}\b",
    "by Gemma's template": rf"<(?:start_of_turn>|\|turn>){_ROLE}\b",
    "by gpt-oss's template": rf"<\|start\|>{_ROLE}\b",
    "by a chat template": rf"<\|(?:{_ROLE}|User|Bot)\|>|<\uff5c(?:User|Assistant)\uff5c>|<\|START_OF_TURN_TOKEN\|>",
    # Without a response, `[INST] ... [/INST]` may stand around a question.
    "by Mistral's or Llama 2's template": r"\[INST\].*\[/INST\]\s*[^\s<[]|\[SYSTEM_PROMPT\]|\[INST\]\s*<<SYS>>",
    "with names of speakers": (
        r"Human:.*\n[ \t]*(?:Assistant|AI):|(?:User|USER):.*\s(?:Assistant|ASSISTANT):|###? Human:.*###? Assistant:"
    ),
    "in Alpaca's format": r"(?:.{0,400}\n)?### Instruction:.*\n### Response:\s*\S",
}
"""How a text begins, after a token that opens a sequence, and what follows in it."""
_FORMS = {name: re.compile(_BOS + f"(?:{begin})", re.DOTALL) for name, begin in _FORMATS.items()}


def written(text: str) -> str | None:
    """Return how a chat is written as this text, for error messages; None for any other text."""
    text = text.strip("\ufeff \t\r\n")
    return next((name for name, form in _FORMS.items() if form.match(text)), None)
