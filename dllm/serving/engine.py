"""What every engine is asked and answers: one request, one answer, in any order.

Owns the seam between the regenerate stage and whatever generates: a model in this process, or a server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One prompt to answer once."""

    key: str
    """Names the request among all others: prompt id and sample."""
    prompt_ids: tuple[int, ...]
    messages: list[dict[str, str]]
    """The same prompt as `prompt_ids`, before the chat template."""
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    """From `request_seed`: a request draws the same random numbers whatever it is batched with. In bfloat16 the logits
    themselves can still differ in the last bit with the shape of a batch."""


@dataclass(frozen=True)
class Answer:
    """What the target said to one request."""

    key: str
    token_ids: tuple[int, ...]
    """The answer's ids, with the stop id at the end where `finish_reason` is `stop`."""
    text: str
    """The answer without the stop token."""
    finish_reason: str
    """`stop`: the target ended its turn; `length`: it was cut at `max_new_tokens`."""


class Engine(Protocol):
    """Something that answers requests with the target."""

    def answer(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Answer every request once, yielding each answer as it finishes, in any order."""
        ...


def request_key(prompt_id: str, sample: int) -> str:
    """Name the request for one sample of one prompt."""
    return f"{prompt_id}:{sample}"


def request_origin(key: str) -> tuple[str, int]:
    """Take a request's name apart again: prompt id and sample."""
    prompt_id, _, sample = key.partition(":")
    return prompt_id, int(sample)


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Derive a request's own seed, 31 bits, from the stage's seed."""
    text = f"{seed} {request_key(prompt_id, sample)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
