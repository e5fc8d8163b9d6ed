"""Answer texts with a diffusion model: from what is typed to ids, through a sampler, and back to text with figures.

Owns which sampler fits which model, and what each takes where nothing is said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, get_args

from dllm.data.chat import prompt_ids
from dllm.diffusion.own_generate import generate_with_own_code
from dllm.diffusion.replay import Replay
from dllm.diffusion.sampler import Answer, Watch, fill, sample
from dllm.diffusion.sampler_causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.diffusion.sampler_settings import Settings
from dllm.errors import ConfigError, DataError
from dllm.models.bidirectional import BidirectionalLM

Sampler = Literal["llada", "llada2", "nemotron", "self-spec", "ar"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SPAN = re.compile(r"\[MASK(?::([1-9]\d*))?\]")
DEFAULTS: dict[str, dict[str, Any]] = {
    "llada": {"block_size": 32},
    "llada2": {"block_size": 32, "threshold": 0.95},
    "nemotron": {"block_size": 32, "threshold": 0.9},
    "self-spec": {"block_size": 32},
    "ar": {},
}
"""What each sampler takes where nothing is said; a model's own block size goes before.
Source: the models' published generation code; LLaDA2.0 (arXiv 2512.15745), section on inference."""


@dataclass(frozen=True)
class Wishes:
    """How texts are to be answered."""

    sampler: Sampler | None = None
    """null takes the one that fits how the model was trained."""
    raw: bool = False
    """Continue the text itself, without a chat template."""
    infill: bool = False
    """Write the text's [MASK] (one token) and [MASK:n] (n tokens) spans."""
    batch_size: int = 8
    """Texts written together."""
    own_generate: bool = False
    """Through the generation code that the model brings; always so where ours cannot set its masks."""
    enable_thinking: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `Settings`, for those that were named."""


def write(
    model: BidirectionalLM, texts: Sequence[str], wishes: Wishes, show: TextIO | None = None
) -> Iterator[dict[str, Any]]:
    """Answer each text; yield its record, in order.

    A record has: prompt, text, token_ids, tokens, passes, tokens_per_pass (the prompt's pass included where there is
    one), seconds and tokens_per_s (of its whole batch), stopped, sampler, block_size.

    Raises:
        ConfigError: the sampler does not fit the model, or the settings do not go together.
        DataError: a text is empty, or has no span to fill.
    """
    sampler = wishes.sampler or ("nemotron" if model.note.mode == "hybrid" else "llada")
    settings = settle(model, sampler, wishes)
    for begin in range(0, len(texts), wishes.batch_size):
        part = texts[begin : begin + wishes.batch_size]
        ids = [_encode(model, text, wishes) for text in part]
        canvases = [_canvas(model, row, wishes, settings) for row in ids]
        began = time.perf_counter()
        with nullcontext() if show is None else Replay(model.tokenizer, canvases, show) as replay:
            answers = _sample(model, sampler, ids, wishes, settings, None if replay is None else replay.watch)
        seconds = time.perf_counter() - began
        written = [
            row.count(model.mask_token_id) if wishes.infill else len(answer.token_ids)
            for row, answer in zip(ids, answers, strict=True)
        ]
        for text, answer, tokens in zip(part, answers, written, strict=True):
            yield {
                "prompt": text,
                "text": str(model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)),
                "token_ids": answer.token_ids,
                "tokens": tokens,
                "passes": answer.passes,
                "tokens_per_pass": tokens / answer.passes if answer.passes else None,
                "seconds": seconds,
                "tokens_per_s": sum(written) / seconds,
                "stopped": answer.stopped,
                "sampler": sampler,
                "block_size": settings.block_size,
            }


def _canvas(model: BidirectionalLM, ids: Sequence[int], wishes: Wishes, settings: Settings) -> list[int | None]:
    """Return what is shown before the first step."""
    if not wishes.infill:
        return [None] * settings.max_new_tokens
    return [None if token == model.mask_token_id else token for token in ids]


def settle(model: BidirectionalLM, sampler: str, wishes: Wishes) -> Settings:
    """Complete what was named by what the model and the sampler take.

    Raises:
        ConfigError: they do not go together.
    """
    context = model.note.context
    if sampler == "llada2" and context == "full":
        raise ConfigError(
            "sampler llada2 is for block-causal models, and this one sees all of its canvas", hint="take llada"
        )
    if wishes.infill and sampler != "llada":
        raise ConfigError(f"sampler {sampler} cannot infill", hint="take llada")
    named = {name: value for name, value in wishes.settings.items() if value is not None}
    if unknown := [name for name in named if sampler in ("ar", "self-spec") and name in _UNMASKING]:
        raise ConfigError(f"sampler {sampler} has no {', '.join(unknown)}", hint="leave it out, or take llada")
    defaults = dict(DEFAULTS[sampler])
    if model.note.block_size is not None and sampler != "ar":
        defaults["block_size"] = model.note.block_size
    if wishes.infill:
        defaults.pop("block_size", None)  # spans lie anywhere: all of the text is one block
    if "factor" in named:
        defaults.pop("threshold", None)
    if context != "full" and model.kind is None and sampler in ("llada", "llada2"):
        defaults["cache"] = "block"
    return Settings(**{**defaults, **named})


_UNMASKING = ("steps", "remasking", "threshold", "factor", "cfg_scale", "cache", "editing_threshold")


def _sample(
    model: BidirectionalLM, sampler: str, ids: list[list[int]], wishes: Wishes, settings: Settings, watch: Watch | None
) -> list[Answer]:
    if wishes.infill:
        return fill(model, ids, settings, watch)
    if wishes.own_generate or (model.kind is not None and model.kind.masks == "own"):
        return generate_with_own_code(model, ids, settings)
    if sampler in ("llada", "llada2"):
        return sample(model, ids, settings, watch)
    decode = {"nemotron": decode_seeded, "self-spec": speculate_on_itself, "ar": decode_causally}[sampler]
    return decode(model, ids, settings, watch)


def _encode(model: BidirectionalLM, text: str, wishes: Wishes) -> list[int]:
    tokenizer, chat = model.tokenizer, [{"role": "user", "content": text}]
    if not wishes.infill:
        if wishes.raw:
            return list(tokenizer(text)["input_ids"])
        return prompt_ids(tokenizer, chat, wishes.enable_thinking)
    if SPAN.search(text) is None:
        raise DataError("nothing to fill in", where=f"prompt {text[:40]!r}", hint="write [MASK] or [MASK:n] into it")
    rendered = (
        text if wishes.raw else str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False))
    )
    ids: list[int] = []
    # Split at spans: text, number, text, number, ..., text.
    for place, piece in enumerate(SPAN.split(rendered)):
        if place % 2:
            ids += [model.mask_token_id] * int(piece or 1)
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids
