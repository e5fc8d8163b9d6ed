"""Which questions of prompt sets training prompts ask already, by their words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from dllm.prompts.table import Prompt

Key = TypeVar("Key", bound=Hashable)

RUN = 8
"""Words by which a question is looked up in longer texts."""
_WORD = re.compile(r"\w+")


def asked_in_training(questions: Mapping[Key, Iterable[str]], training: Iterable[Prompt]) -> dict[Key, str]:
    """Find the questions that a training prompt asks; return the source of that prompt for each.

    A question is asked where its words stand in a user turn, all and in order, whatever their case, punctuation and
    what stands around them. One of fewer than RUN words is asked only where they are the whole turn.

    Args:
        questions: the texts of each question, such as with its instruction and without.
    """
    index: dict[str, list[tuple[list[str], Key]]] = defaultdict(list)
    for key, texts in questions.items():
        for words in map(_words, texts):
            if words:
                index[" ".join(words[:RUN])].append((words, key))
    found: dict[Key, str] = {}
    for prompt in training:
        for message in prompt.messages:
            if message["role"] == "user":
                words = _words(str(message["content"]))
                for key in _asked(words, index):
                    found.setdefault(key, prompt.source)
    return found


def _asked(words: Sequence[str], index: Mapping[str, Sequence[tuple[list[str], Key]]]) -> Iterable[Key]:
    if len(words) < RUN:
        return [key for _, key in index.get(" ".join(words), ())]
    return [
        key
        for start in range(len(words) - RUN + 1)
        for wanted, key in index.get(" ".join(words[start : start + RUN]), ())
        if list(words[start : start + len(wanted)]) == wanted
    ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
