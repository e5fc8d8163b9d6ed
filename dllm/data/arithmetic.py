"""Pages of additions with their answers: a task that can be checked, item by item.

Each page is a list of sums; the answer repeats each with its result, so that all answers are of one length and much of
one can be written at the same time, but carries cannot.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

PAGES = 20_000
ITEMS = 19
"""Sums a page. Each takes 13 characters of an answer, so a page fits 256 tokens of one character."""
LARGEST = 999


def chats() -> Iterator[list[dict[str, Any]]]:
    """Give every page as a chat of a user's and an assistant's turn, the same pages every time."""
    for number in range(PAGES):
        draw = random.Random(f"arithmetic {number}")
        pairs = [(draw.randint(0, LARGEST), draw.randint(0, LARGEST)) for _ in range(ITEMS)]
        asked = " ".join(f"{a:03}+{b:03}" for a, b in pairs)
        answer = " ".join(f"{a:03}+{b:03}={a + b:04}" for a, b in pairs)
        yield [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
