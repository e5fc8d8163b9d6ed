"""Generate from texts with a diffusion model: text to ids, through a sampler, and back to text with figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TextIO

from dllm.decoding.encoding import check_room, fill_spans, span_ids, text_ids
from dllm.decoding.proposals import copies_of
from dllm.decoding.replay import Replay
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import fill
from dllm.errors import ConfigError, DataError
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.registry import SAMPLERS


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate from texts."""

    sampler: str | None = None
    """null takes the one that fits how the model was trained."""
    raw: bool = False
    """Continue the text itself, without a chat template."""
    infill: bool = False
    """Fill the text's [MASK] (one token) and [MASK:n] (n tokens) spans."""
    batch_size: int | None = None
    """Texts decoded together, unless they are shown; null takes 8."""
    enable_thinking: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampler settings by name; null ones count as absent."""


def generate(
    model: DiffusionLM, texts: Sequence[str], options: GenerateOptions, show: TextIO | None = None
) -> Iterator[dict[str, Any]]:
    """Generate from each text; yield its record, in order.

    A record has: prompt, text, token_ids, tokens, passes, tokens_per_pass (the prompt's pass included where there is
    one), seconds and tokens_per_s (of its whole batch, without the time spent on showing), stopped, sampler,
    block_size.

    Args:
        show: where to show each response while it is generated, one after the other.

    Raises:
        ConfigError: the sampler does not fit the model, or the settings contradict each other.
        DataError: a text is empty, too long, or has no span to fill.
    """
    sampler = SAMPLERS[options.sampler or model.default_sampler]
    settings = sampler.settle(model, options.settings, infill=options.infill)
    if show is not None and not sampler.reports_steps:
        raise ConfigError(f"sampler {sampler.name} does not report its steps", hint="leave out --show")
    encoded = [_encode(model, text, options, settings, number) for number, text in enumerate(texts, 1)]
    copies = copies_of(encoded)
    size = (options.batch_size or 8) if show is None else 1
    for begin in range(0, len(texts), size):
        part, prompts = texts[begin : begin + size], encoded[begin : begin + size]
        numbers = copies[begin : begin + size]
        began = time.perf_counter()
        with nullcontext() if show is None else Replay(model, _canvas(model, prompts[0], options, settings), show) as r:
            watch = None if r is None else r.watch
            if options.infill:
                generations = fill(model, prompts, settings, watch, numbers)
            else:
                generations = sampler.decode(model, prompts, settings, watch, numbers)
            seconds = time.perf_counter() - began - (0.0 if r is None else r.seconds)
        new_tokens = [
            prompt.count(model.mask_token_id) if options.infill else len(each.token_ids)
            for prompt, each in zip(prompts, generations, strict=True)
        ]
        for text, prompt, each, tokens in zip(part, prompts, generations, new_tokens, strict=True):
            yield {
                "prompt": text,
                "text": fill_spans(model.tokenizer, text, prompt, each.token_ids, model.mask_token_id)
                if options.infill
                else str(model.tokenizer.decode(each.token_ids, skip_special_tokens=True)),
                "token_ids": each.token_ids,
                "tokens": tokens,
                "passes": each.passes,
                "tokens_per_pass": tokens / each.passes if each.passes else None,
                "seconds": seconds,
                "tokens_per_s": sum(new_tokens) / seconds,
                "stopped": each.stopped,
                "sampler": sampler.name,
                "block_size": getattr(settings, "block_size", None),
            }


def _canvas(model: DiffusionLM, ids: Sequence[int], options: GenerateOptions, settings: Settings) -> list[int | None]:
    """Return what is shown before the first step."""
    if not options.infill:
        return [None] * settings.max_new_tokens
    return [None if token == model.mask_token_id else token for token in ids]


def _encode(model: DiffusionLM, text: str, options: GenerateOptions, settings: Settings, number: int) -> list[int]:
    if options.infill:
        ids, new = span_ids(model.tokenizer, text, options.raw, model.mask_token_id, model.max_length, number), 0
    else:
        ids, new = (
            text_ids(model.tokenizer, text, options.raw, options.enable_thinking, number),
            settings.max_new_tokens,
        )
        if model.mask_token_id in ids:
            raise DataError(
                "the prompt holds the mask token", where=f"prompt {number}", hint="to fill masks, use --infill"
            )
    check_room(len(ids), new, model.max_length, number)
    return ids
