"""Pages of numbers to double, with their answers: a task that can be checked, item by item.

Each result stands right-aligned under its question, so that what answers a place lies at the same distance from it
everywhere. All pages are of one length; all of one can be written at the same time, but for carries.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

PAGES = 20_000
ITEMS = 28
"""Numbers a page. Each takes 9 characters of an answer, so a page fits 256 tokens of one character."""
LARGEST = 999_999


def chats() -> Iterator[list[dict[str, Any]]]:
    """Give every page as a chat of a user's and an assistant's turn, the same pages every time."""
    for number in range(PAGES):
        draw = random.Random(f"arithmetic {number}")
        numbers = [draw.randint(0, LARGEST) for _ in range(ITEMS)]
        asked = " ".join(f"{n:06}*2" for n in numbers)
        answer = " ".join(f" {2 * n:07}" for n in numbers)
        yield [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
