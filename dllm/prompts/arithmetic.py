"""Pages of chains of doublings, with their answers: a task that can be checked, number by number.

The question is a line of numbers. Each line of the answer doubles the line above it, number by number, modulo 999,999:
a number's digits are doubled, each takes the carry of the digit after it, and the last one takes the first one's. So
every digit is made of two digits of the line above, the same distance back everywhere, the question's line included.

Each doubling is easy and a chain of them is not: a line can be written as soon as the one above stands there, and
hardly sooner. Numbers of a line can be written at the same time; the page cannot be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

PAGES = 20_000
NUMBERS, LINES = 3, 9
"""Numbers a line, and lines an answer: 252 tokens of one character, which fit 256."""
MODULUS = 999_999
BETWEEN = "\n" + 8 * " "
"""Between two lines of an answer; as many tokens as the chat template puts between the question and the answer."""


def doubled(numbers: list[int]) -> list[int]:
    """Return the line that comes after a line."""
    return [2 * number % MODULUS for number in numbers]


def chats() -> Iterator[list[dict[str, Any]]]:
    """Give every page as a chat of a user's and an assistant's turn, the same pages every time."""
    for page in range(PAGES):
        draw = random.Random(f"arithmetic {page}")
        lines = [[draw.randrange(1, MODULUS) for _ in range(NUMBERS)]]
        for _ in range(LINES):
            lines.append(doubled(lines[-1]))
        asked, *said = (" ".join(f"{number:06}" for number in line) for line in lines)
        yield [{"role": "user", "content": asked}, {"role": "assistant", "content": BETWEEN.join(said)}]
