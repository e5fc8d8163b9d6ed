"""Responses that a diffusion model generates to held-out prompts, compared with those of the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from dllm.decoding.settings import Settings
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.prompts.references import is_right
from dllm.registry import SAMPLERS
from dllm.responses.shards import Row


@dataclass(frozen=True)
class Generated:
    """One generated response, and the expected one.

    Units: seconds are those of the batch, divided by its rows.
    """

    id: str
    text: str
    expected: str
    tokens: int
    passes: int
    seconds: float
    reference: str | None = None
    """The correct final answer, where the source has it."""


def generate_responses(
    model: DiffusionLM,
    rows: Sequence[Row],
    sampler: str,
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], object] = lambda responses: None,
    known: Mapping[str, str] | None = None,
) -> list[Generated]:
    """Generate a response to the prompt of each row, batch by batch, as the verb `generate` does.

    Args:
        advance: called with the number of responses that each batch adds.
        known: references by prompt id.
    """
    found = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        clock = time.perf_counter()
        generations = SAMPLERS[sampler].decode(model, [row.prompt_ids for row in part], settings)
        seconds = (time.perf_counter() - clock) / len(part)
        for row, each in zip(part, generations, strict=True):
            text = str(model.tokenizer.decode(each.token_ids, skip_special_tokens=True))
            expected = str(row.messages[-1]["content"])
            costs = (len(each.token_ids), each.passes, seconds)
            found.append(Generated(row.prompt_id, text, expected, *costs, (known or {}).get(row.prompt_id)))
        advance(len(part))
    return found


def figures(responses: Sequence[Generated], seen: AbstractSet[str]) -> dict[str, Any]:
    """Return the fractions of exact responses and words, and the cost of generation.

    Words are compared by position: the third word of a response with the third of the expected one. Unseen words are
    those that occur in no training response. Tokens per pass are tokens up to the end token over passes of their row.
    `answers_right` is the fraction of correct final answers, among responses whose source has a reference.

    Args:
        responses: generated ones.
        seen: the words of all training responses; those that are expected nowhere may be left out.
    """
    words = right = unseen = unseen_right = 0
    for each in responses:
        got, expected = each.text.split(), each.expected.split()
        for place, word in enumerate(expected):
            hit = place < len(got) and got[place] == word
            words, right = words + 1, right + hit
            if word not in seen:
                unseen, unseen_right = unseen + 1, unseen_right + hit
    tokens, seconds = sum(a.tokens for a in responses), sum(a.seconds for a in responses)
    exact = sum(a.text.strip() == a.expected.strip() for a in responses)
    checked = [is_right(a.text, a.reference) for a in responses if a.reference is not None]
    return {
        "answers": len(responses),
        "answers_exact": exact / len(responses) if responses else None,
        "answers_checked": len(checked),
        "answers_right": sum(checked) / len(checked) if checked else None,
        "words": words,
        "words_exact": right / words if words else None,
        "words_unseen": unseen,
        "words_unseen_exact": unseen_right / unseen if unseen else None,
        "tokens": tokens,
        "tokens_per_pass": tokens / max(1, sum(a.passes for a in responses)),
        "tokens_per_s": tokens / seconds if seconds else None,
    }
