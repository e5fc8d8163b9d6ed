"""Acceptance on many held-out prompts without speculative decoding: the target's own greedy responses are walked.

The responses are generated once for a target, in batches, and kept in `work/greedy/` for the next checkpoint. In
float32 the rounds are those of speculative decoding, prompt by prompt. In bfloat16 they are those of the responses at
hand, which a decoding of another batch size would not give to the letter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from dllm.decoding.acceptance import Acceptance, RoundCounts
from dllm.decoding.comparison import Pair
from dllm.decoding.speculative import Decoder
from dllm.decoding.walk import GreedyText, Walked, walk
from dllm.methods.dflash.greedy import greedy_responses
from dllm.methods.dflash.sets import Question
from dllm.methods.dflash.settings import Walk
from dllm.methods.method import EvaluateContext
from dllm.progress import Progress


def walked_figures(
    ctx: EvaluateContext,
    decoder: Decoder,
    questions: Sequence[Question],
    stop_ids: Collection[int],
    pairs: Sequence[Pair],
) -> dict[str, Any]:
    """Return the acceptance of a draft on prompts, per source too, and beside that of decoding where there is one.

    Call it without packed weights: passes over many tokens are slower with them.

    Args:
        ctx: its folder keeps the responses.
        decoder: target and draft.
        questions: the prompts.
        stop_ids: ids that end a response.
        pairs: those of the prompts that were decoded.
    """
    draft, size = decoder.draft, decoder.block_size
    assert draft is not None
    texts = _greedy_texts(ctx, decoder, questions, stop_ids)
    found: dict[int, Walked] = {}
    options = {"block_size": size, "max_positions": decoder.limit}
    with Progress("evaluate: acceptance", len(texts), "prompts") as progress:
        for each in walk(decoder.model, draft, texts, **options):
            found[each.index] = each
            progress.update(1)
    rounds = {question.id: found[index].rounds for index, question in enumerate(questions)}
    response_tokens = sum(len(text.ids) - text.prompt_length for text in texts)
    figures = {
        **_figures(list(rounds.values()), size),
        "by_source": {
            source: _figures([rounds[q.id] for q in questions if q.source == source], size)
            for source in sorted({q.source for q in questions})
        },
        "tokens": response_tokens,
        "greedy_fraction": sum(each.greedy_tokens for each in found.values()) / response_tokens,
    }
    if both := [pair for pair in pairs if pair.prompt_id in rounds]:
        figures["on_decoded_prompts"] = {
            "prompts": len(both),
            "tau_micro": _figures([rounds[pair.prompt_id] for pair in both], size)["tau_micro"],
            "tau_micro_decoded": _figures([pair.rounds for pair in both], size)["tau_micro"],
            "same_rounds": sum(rounds[pair.prompt_id] == list(pair.rounds) for pair in both),
        }
    return figures


def differing_round(decoder: Decoder, question: Question, pair: Pair, stop_ids: Collection[int]) -> int | None:
    """Return the first round, from 1, in which decoding and a walk over its text count differently, or None.

    In float32 none should: the draft's `forward`, `propose` and `greedy_tokens` choose the same tokens for the same
    block. Only two logits that are equal up to rounding can decide otherwise, for the shapes of the passes differ.
    """
    assert decoder.draft is not None
    text = GreedyText([*question.ids, *pair.token_ids], len(question.ids), stopped=pair.token_ids[-1] in stop_ids)
    options = {"block_size": decoder.block_size, "max_positions": decoder.limit}
    (found,) = walk(decoder.model, decoder.draft, [text], **options)
    # The last round may have looked at tokens behind the limit, which are not in the text.
    if list(pair.rounds[: len(found.rounds)]) == found.rounds and len(pair.rounds) - len(found.rounds) <= 1:
        return None
    differ = [index for index, (a, b) in enumerate(zip(pair.rounds, found.rounds, strict=False)) if a != b]
    return 1 + (differ[0] if differ else min(len(pair.rounds), len(found.rounds)))


def _figures(responses: Sequence[Sequence[RoundCounts]], block_size: int) -> dict[str, Any]:
    acceptance = Acceptance(block_size)
    for rounds in responses:
        acceptance.add(rounds)
    return {**acceptance.figures(), "prompts": len(responses)}


def _greedy_texts(
    ctx: EvaluateContext, decoder: Decoder, questions: Sequence[Question], stop_ids: Collection[int]
) -> list[GreedyText]:
    """Return the target's greedy responses, with the tokens that a last round may look at behind the limit."""
    params, tokens = ctx.params, ctx.params.evaluate.max_new_tokens
    known = greedy_responses(
        ctx.root,
        params.target,
        decoder.model,
        [question.ids for question in questions],
        limit=tokens + decoder.block_size - 2,
        stop_ids=stop_ids,
        stage="evaluate",
        batch_size=(getattr(params.evaluate, "walk", None) or Walk()).batch_size,
    )
    return [
        GreedyText([*question.ids, *known[index]], len(question.ids), known[index][-1] in stop_ids, tokens)
        for index, question in enumerate(questions)
    ]
