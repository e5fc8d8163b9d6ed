"""Answers a diffusion model writes to held-out prompts, held against those the data give."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from dllm.decoding.settings import Settings
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.prompts.references import is_right
from dllm.registry import SAMPLERS
from dllm.responses.shards import Row


@dataclass(frozen=True)
class Written:
    """One answer, and what it was to be.

    Units: seconds are the batch's, shared out evenly.
    """

    id: str
    text: str
    wanted: str
    tokens: int
    passes: int
    seconds: float
    reference: str | None = None
    """What the right answer comes to, where it is known."""


def name_of(sampler: str, settings: Settings) -> str:
    """Name a way of decoding in tables: by what decides how many tokens a pass writes."""
    if sampler in ("ar", "self-spec"):
        return sampler
    if settings.threshold is not None:
        return f"threshold {settings.threshold:g}"
    if settings.steps is None:
        return "one token a pass"
    return f"{settings.steps} pass{'' if settings.steps == 1 else 'es'}"


def write_answers(
    model: BidirectionalLM,
    rows: Sequence[Row],
    sampler: str,
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], object] = lambda answers: None,
    known: Mapping[str, str] | None = None,
) -> list[Written]:
    """Generate from the rows' prompts, batch by batch, as `generate` would.

    Args:
        advance: told how many more answers are done.
        known: references by prompt id.
    """
    found = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        clock = time.perf_counter()
        answers = SAMPLERS[sampler].decode(model, [row.prompt_ids for row in part], settings)
        seconds = (time.perf_counter() - clock) / len(part)
        for row, answer in zip(part, answers, strict=True):
            text = str(model.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
            wanted = str(row.messages[-1]["content"])
            costs = (len(answer.token_ids), answer.passes, seconds)
            found.append(Written(row.prompt_id, text, wanted, *costs, (known or {}).get(row.prompt_id)))
        advance(len(part))
    return found


def figures(answers: Sequence[Written], seen: AbstractSet[str]) -> dict[str, Any]:
    """Return how often answers and their words are met, and what they cost.

    A word counts where it stands: the third word of an answer against the third that was wanted. Unseen words are
    those no training answer holds. Tokens per pass counts tokens up to the end token, over passes of their row.
    `answers_right` is the share that comes to what the source knows to be right, of those where it does.

    Args:
        seen: the words of all training answers.
    """
    words = right = unseen = unseen_right = 0
    for answer in answers:
        got, wanted = answer.text.split(), answer.wanted.split()
        for place, word in enumerate(wanted):
            hit = place < len(got) and got[place] == word
            words, right = words + 1, right + hit
            if word not in seen:
                unseen, unseen_right = unseen + 1, unseen_right + hit
    tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
    exact = sum(a.text.strip() == a.wanted.strip() for a in answers)
    checked = [is_right(a.text, a.reference) for a in answers if a.reference is not None]
    return {
        "answers": len(answers),
        "answers_exact": exact / len(answers) if answers else None,
        "answers_checked": len(checked),
        "answers_right": sum(checked) / len(checked) if checked else None,
        "words": words,
        "words_exact": right / words if words else None,
        "words_unseen": unseen,
        "words_unseen_exact": unseen_right / unseen if unseen else None,
        "tokens": tokens,
        "tokens_per_pass": tokens / max(1, sum(a.passes for a in answers)),
        "tokens_per_s": tokens / seconds if seconds else None,
    }
