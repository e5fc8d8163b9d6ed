"""Whole chats written as one text: by a chat template, or with names of the speakers.

Such a text is no question: read as one, the model would be asked with the response in its prompt.
"""

from __future__ import annotations

import re

_BOS = (
    r"(?:(?:<s>|<bos>|<\|endoftext\|>|<\|begin_of_sentence\|>|<\|begin_of_text\|>|<\|startoftext\|>|<BOS_TOKEN>|\[gMASK\]<sop>"
    r"|<\uff5cbegin▁of▁sentence\uff5c>)\s*)?"
)
_ROLE = r"(?:system|developer|user|human|prompter|assistant|model|tool)"
_KEY = r"(?:role|from|content|value)"
_FORMATS = {
    "by ChatML": rf"<\|im_start\|>\s?{_ROLE}\b",
    "by Llama's template": rf"<\|(?:start_header_id|header_start)\|>{_ROLE}\b",
    "by Gemma's template": rf"<(?:start_of_turn>|\|turn>){_ROLE}\b",
    "by Granite's template": rf"<\|start_of_role\|>{_ROLE}\b",
    "by gpt-oss's template": rf"<\|start\|>{_ROLE}\b",
    "by a chat template": rf"[<[]\|(?:{_ROLE}|User|Bot|START_OF_TURN_TOKEN)\|[>\]]|<\uff5c(?:User|Assistant)\uff5c>",
    # Without a response, `[INST] ... [/INST]` may stand around a question.
    "by Mistral's or Llama 2's template": r"\[INST\].*\[/INST\]\s*[^\s<[]|\[SYSTEM_PROMPT\]|\[INST\]\s*<<SYS>>",
    "with names of speakers": (
        r"(?:#{2,3} ?|\*\*|GPT4 Correct )?(?:Human|User|USER):.*(?:[\s#*]|GPT4 Correct )(?:Assistant|ASSISTANT|AI):"
        r"|H:.*\n\nA:|(?:#{2,3} ?|\*\*)?(?:System|SYSTEM|system):.*\n[#* ]*(?:User|USER|user|Human|HUMAN|human):"
        r"|user:.*\nassistant:|(?:User|Human):.*\n(?:Bot|Chatbot|Model):|Instruct:.*\nOutput:"
        r"|A chat between a .*\bUSER:.*\bASSISTANT:"
    ),
    "by LLaDA2's, Nemotron's, Kimi's, MiniMax's or Seed's template": (
        r"<role>(?:SYSTEM|HUMAN|ASSISTANT|OBSERVATION)</role>|<extra_id_\d>(?:System|User|Assistant)\b"
        rf"|<\|im_{_ROLE}\|>|(?:\]~!b\[)?\]~b\](?:{_ROLE}|ai)\b|<seed:bos>{_ROLE}\b"
    ),
    "in Alpaca's format": r"(?:.{0,400}\n)?### Instruction:.*\n### Response:\s*\S",
    "as Python": rf"(?:array)?\(\[?\s*\{{\s*['\"]{_KEY}['\"]:",
    "as YAML": rf"- {_KEY}: .*\n\s*{_KEY}:",
}
"""How a text begins, after a token that opens a sequence, and what follows in it."""
_FORMS = {name: re.compile(_BOS + f"(?:{begin})", re.DOTALL) for name, begin in _FORMATS.items()}


def written(text: str) -> str | None:
    """Return how a chat is written as this text, for error messages; None for any other text."""
    text = text.strip("\ufeff \t\r\n")
    return next((name for name, form in _FORMS.items() if form.match(text)), None)
