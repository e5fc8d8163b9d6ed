"""Which number of draft tokens pays at which concurrency: measured step times and an acceptance curve put together.

A round of d draft tokens brings 1 + a_1 + .. + a_d tokens a response, a_k being the share of rounds in which the draft
tokens up to k are all accepted. It costs a step of the target over d + 1 slots of every response, and a pass of the
draft. Both are measured here, as transformers runs them: a serving engine has other times, and its own best choice.

Shape suffixes: B responses, S context, L slots of a block, F tapped features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from dllm.decoding.speculative import Decoder
from dllm.models.drafts.proposal import most_probable

REPEATS = 5
"""Most measurements of a time, whose median counts; a first one is left out."""
NEW_FEATURES = 2
"""Context positions that a draft pass reads for the first time, about as many as a round emits tokens."""


@dataclass
class StepTimes:
    """Times at one concurrency, by slots.

    Units: seconds.
    """

    concurrency: int
    target_s: dict[int, float] = field(default_factory=dict)
    draft_s: dict[int, float] = field(default_factory=dict)

    def tokens_per_s(self, draft_tokens: int, acceptance: Sequence[float]) -> float:
        """Return the expected tokens per second of all responses together.

        Args:
            draft_tokens: per round; 0 decodes without a draft.
            acceptance: by offset, unconditional.
        """
        slots = draft_tokens + 1
        seconds = self.target_s[slots] + (self.draft_s[slots] if draft_tokens else 0.0)
        return self.concurrency * (1 + sum(acceptance[:draft_tokens])) / seconds


@torch.inference_mode()
def measure_steps(
    decoder: Decoder, *, context: int, concurrencies: Sequence[int], seconds: float, clock: Callable[[], float]
) -> list[StepTimes]:
    """Measure a target step and a draft pass for every number of slots, concurrency by concurrency.

    Args:
        decoder: target and draft.
        context: tokens of each response's context.
        concurrencies: rising; those that do not fit into the time any more are left out, except the first.
        seconds: of wall clock for all.
        clock: `time.perf_counter`, or another.
    """
    began, found = clock(), list[StepTimes]()
    for concurrency in concurrencies:
        times = StepTimes(concurrency)
        target_step = _target_step(decoder, context, concurrency)
        draft_pass = _draft_pass(decoder, context, concurrency)
        for slots in range(1, decoder.block_size + 1):
            if found and clock() - began > seconds:
                return found
            share = (seconds - (clock() - began)) / (2 * (decoder.block_size + 1 - slots) * len(concurrencies))
            times.target_s[slots] = _timed(partial(target_step, slots), share, clock)
            if slots > 1:
                times.draft_s[slots] = _timed(partial(draft_pass, slots), share, clock)
        found.append(times)
    return found


def expected_throughput(times: Sequence[StepTimes], acceptance: Sequence[float | None]) -> dict[str, Any]:
    """Return tokens per second by concurrency and draft tokens, the best choices, and where drafts stop to pay.

    Units: tokens per second, over all responses of a concurrency together.
    """
    shares = [share or 0.0 for share in acceptance]
    table = {t.concurrency: {d: t.tokens_per_s(d, shares) for d in range(len(t.target_s))} for t in times}
    best = {concurrency: max(row, key=row.__getitem__) for concurrency, row in table.items()}
    # From there on, at every concurrency that was measured.
    losing: int | None = None
    for concurrency in sorted(table, reverse=True):
        if best[concurrency]:
            break
        losing = concurrency
    first = table[times[0].concurrency]
    return {
        "tokens_per_s": {str(c): {str(d): value for d, value in row.items()} for c, row in table.items()},
        "best_draft_tokens": {str(c): value for c, value in best.items()},
        "loses_from_concurrency": losing,
        "predicted_speedup": first[max(first)] / first[0] if times[0].concurrency == 1 else None,
    }


def measure(
    decoder: Decoder,
    acceptance: Sequence[float | None],
    *,
    context: int,
    concurrencies: Sequence[int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Mapping[str, Any]:
    """Measure and put together; arguments as `measure_steps` and `expected_throughput` have them."""
    times = measure_steps(decoder, context=context, concurrencies=concurrencies, seconds=seconds, clock=clock)
    milliseconds = {
        str(t.concurrency): {
            "target_ms": {str(slots): 1000 * value for slots, value in t.target_s.items()},
            "draft_ms": {str(slots): 1000 * value for slots, value in t.draft_s.items()},
        }
        for t in times
    }
    return {"context": context, **expected_throughput(times, acceptance), "steps": milliseconds}


def _timed(step: Callable[[], None], seconds: float, clock: Callable[[], float]) -> float:
    step()
    found, began = list[float](), clock()
    while not found or (len(found) < REPEATS and clock() - began < seconds):
        start = clock()
        step()
        found.append(clock() - start)
    return statistics.median(found)


def _target_step(decoder: Decoder, context: int, concurrency: int) -> Callable[[int], None]:
    """Return a step over new slots of responses that have a context; it leaves the cache as it was."""
    model = decoder.model
    plain, cache = Decoder(model), DynamicCache(config=model.config)
    cache.activate_past_recording()  # lets sliding-window layers take tokens back
    plain.forward(torch.zeros(1, context, dtype=torch.int64, device=model.device), cache, logits_to_keep=1)
    cache.crop(0)
    if concurrency > 1:
        cache.batch_repeat_interleave(concurrency)

    def run(slots: int) -> None:
        ids_BL = torch.zeros(concurrency, slots, dtype=torch.int64, device=model.device)
        logits_BLV, _ = (decoder if slots > 1 else plain).forward(ids_BL, cache)
        most_probable(logits_BLV).tolist()
        cache.crop(-slots)

    return run


def _draft_pass(decoder: Decoder, context: int, concurrency: int) -> Callable[[int], None]:
    """Return a draft's pass over a block of each response, the new features of its context included."""
    draft, target, device = decoder.draft, decoder.target, decoder.model.device
    assert draft is not None
    width = draft.config.hidden_size * len(draft.config.target_layer_ids)
    features_BSF = torch.zeros(1, context, width, dtype=decoder.model.dtype, device=device)
    features_BSF = features_BSF.expand(concurrency, -1, -1).contiguous()
    known = draft.read_context(features_BSF)
    anchor_BN = torch.full((concurrency, 1), context, device=device)
    keep_BN = torch.ones_like(anchor_BN, dtype=torch.bool)

    def run(slots: int) -> None:
        ids_BNL = torch.full((concurrency, 1, slots), draft.config.mask_token_id, device=device)
        draft.read_context(features_BSF[:, :NEW_FEATURES])
        hidden_BNPD = draft.forward_blocks(target.embed(ids_BNL), known, anchor_BN, keep_BN)
        draft.greedy_tokens(hidden_BNPD[:, 0, : slots - 1], ids_BNL[:, 0, 0], target).tolist()

    return run
