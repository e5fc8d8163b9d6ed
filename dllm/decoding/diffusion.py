"""Generate from texts with a diffusion model: text to ids, through a sampler, and back to text with figures.

Owns which sampler fits which model, and what each takes where nothing is said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, get_args

from dllm.decoding.causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.decoding.encoding import check_room, filled, span_ids, text_ids
from dllm.decoding.own_generate import generate_with_own_code, unknown_to_own_code
from dllm.decoding.proposals import copies_of
from dllm.decoding.replay import Replay
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import Generation, Watch, fill, sample
from dllm.errors import ConfigError, DataError
from dllm.models.diffusion.bidirectional import BidirectionalLM

Sampler = Literal["llada", "llada2", "nemotron", "self-spec", "ar"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
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
class GenerateOptions:
    """How texts are to be answered."""

    sampler: Sampler | None = None
    """null takes the one that fits how the model was trained."""
    raw: bool = False
    """Continue the text itself, without a chat template."""
    infill: bool = False
    """Write the text's [MASK] (one token) and [MASK:n] (n tokens) spans."""
    batch_size: int | None = None
    """Texts written together, unless they are shown; null takes 8."""
    own_generate: bool | None = None
    """Through the generation code that the model brings; null does so for Nemotron-Labs-Diffusion's blocks alone."""
    enable_thinking: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `Settings`, for those that were named."""


def write(
    model: BidirectionalLM, texts: Sequence[str], wishes: GenerateOptions, show: TextIO | None = None
) -> Iterator[dict[str, Any]]:
    """Generate from each text; yield its record, in order.

    A record has: prompt, text, token_ids, tokens, passes, tokens_per_pass (the prompt's pass included where there is
    one), seconds and tokens_per_s (of its whole batch, what was spent on showing left out), stopped, sampler,
    block_size.

    Args:
        show: where to show each answer while it is written, one after the other.

    Raises:
        ConfigError: the sampler does not fit the model, or the settings do not go together.
        DataError: a text is empty, too long, or has no span to fill.
    """
    sampler = wishes.sampler or default_sampler(model)
    settings = settle(model, sampler, wishes)
    own = _by_own_code(model, sampler, wishes)
    if own and show is not None:
        raise ConfigError("the model's own generate cannot be watched", hint="leave out --show")
    encoded = [_encode(model, text, wishes, settings, number) for number, text in enumerate(texts, 1)]
    copies = copies_of(encoded)
    size = (wishes.batch_size or 8) if show is None else 1
    for begin in range(0, len(texts), size):
        part, ids = texts[begin : begin + size], encoded[begin : begin + size]
        began = time.perf_counter()
        with nullcontext() if show is None else Replay(model, _canvas(model, ids[0], wishes, settings), show) as replay:
            watch = None if replay is None else replay.watch
            answers = write_ids(model, sampler, ids, wishes, settings, watch, copies[begin : begin + size])
            seconds = time.perf_counter() - began - (0.0 if replay is None else replay.seconds)
        written = [
            row.count(model.mask_token_id) if wishes.infill else len(answer.token_ids)
            for row, answer in zip(ids, answers, strict=True)
        ]
        for text, given, answer, tokens in zip(part, ids, answers, written, strict=True):
            yield {
                "prompt": text,
                "text": filled(model.tokenizer, text, given, answer.token_ids, model.mask_token_id)
                if wishes.infill
                else str(model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)),
                "token_ids": answer.token_ids,
                "tokens": tokens,
                "passes": answer.passes,
                "tokens_per_pass": tokens / answer.passes if answer.passes else None,
                "seconds": seconds,
                "tokens_per_s": sum(written) / seconds,
                "stopped": answer.stopped,
                "sampler": "own" if own else sampler,
                "block_size": settings.block_size,
            }


def default_sampler(model: BidirectionalLM) -> Sampler:
    """Return the sampler that shows a model its text as training did."""
    return "nemotron" if model.note.mode == "hybrid" and model.note.context == "causal" else "llada"


def _canvas(
    model: BidirectionalLM, ids: Sequence[int], wishes: GenerateOptions, settings: Settings
) -> list[int | None]:
    """Return what is shown before the first step."""
    if not wishes.infill:
        return [None] * settings.max_new_tokens
    return [None if token == model.mask_token_id else token for token in ids]


def settle(model: BidirectionalLM, sampler: str, wishes: GenerateOptions) -> Settings:
    """Complete what was named by what the model and the sampler take.

    Raises:
        ConfigError: they do not go together.
    """
    context, own = model.note.context, _by_own_code(model, sampler, wishes)
    if sampler == "llada2" and context == "full":
        raise ConfigError(
            "sampler llada2 is for block-causal models, and this one sees all of its canvas", hint="take llada"
        )
    if wishes.infill and (own or sampler != "llada"):
        what = "the model's own generate" if own else f"sampler {sampler}"
        raise ConfigError(f"{what} cannot infill", hint="take a model with full attention, and sampler llada")
    if model.lays_out_pairs and sampler in ("llada", "llada2"):
        raise ConfigError(f"sampler {sampler} cannot set this model's masks", hint="take nemotron, self-spec or ar")
    named = {name: value for name, value in wishes.settings.items() if value is not None}
    unknown = unknown_to_own_code(model, sampler, named) if own else [name for name in named if name in UNUSED[sampler]]
    if unknown:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ConfigError(
            f"{'the own generate of this model' if own else f'sampler {sampler}'} has no use for {flags}",
            hint="leave it out" if own else "leave it out, or take sampler llada",
        )
    defaults = dict(DEFAULTS[sampler])
    if model.note.block_size is not None and sampler != "ar":
        defaults["block_size"] = model.note.block_size
    if wishes.infill:
        defaults.pop("block_size", None)  # spans lie anywhere: all of the text is one block
    if {"factor", "entropy_bound"} & named.keys() or named.get("remasking") in ("entropy", "random"):
        defaults.pop("threshold", None)
    if context != "full" and model.kind is None and sampler in ("llada", "llada2"):
        defaults["cache"] = "block"
    return Settings(**{**defaults, **named})


_UNMASKING = (
    "steps", "schedule", "remasking", "threshold", "factor", "entropy_bound", "cfg_scale", "cache", "editing_threshold",
    "max_post_steps",
)  # fmt: skip
UNUSED: dict[str, tuple[str, ...]] = {
    "llada": (),
    "llada2": (),
    "nemotron": ("cfg_scale", "cache", "editing_threshold", "max_post_steps"),
    "self-spec": (*_UNMASKING, "top_p"),
    "ar": (*_UNMASKING, "block_size"),
}
"""What each sampler would pass over in silence."""


def _by_own_code(model: BidirectionalLM, sampler: str, wishes: GenerateOptions) -> bool:
    if wishes.own_generate is not None:
        return wishes.own_generate
    return model.lays_out_pairs and sampler == "nemotron"


def write_ids(
    model: BidirectionalLM,
    sampler: str,
    ids: list[list[int]],
    wishes: GenerateOptions,
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate from prompts given as ids, all in one batch, with settings that `settle` has completed.

    `copies` as in `sample`.

    Raises:
        ConfigError: the settings do not fit the model.
        DataError: a prompt is empty, or holds the mask token.
    """
    if wishes.infill:
        return fill(model, ids, settings, watch, copies)
    if _by_own_code(model, sampler, wishes):
        return generate_with_own_code(model, ids, settings, sampler, copies)
    if sampler in ("llada", "llada2"):
        return sample(model, ids, settings, watch, copies=copies)
    decode = {"nemotron": decode_seeded, "self-spec": speculate_on_itself, "ar": decode_causally}[sampler]
    return decode(model, ids, settings, watch, copies)


def _encode(model: BidirectionalLM, text: str, wishes: GenerateOptions, settings: Settings, number: int) -> list[int]:
    longest = model.longest
    if wishes.infill:
        ids, new = span_ids(model.tokenizer, text, wishes.raw, model.mask_token_id, longest, number), 0
    else:
        ids, new = text_ids(model.tokenizer, text, wishes.raw, wishes.enable_thinking, number), settings.max_new_tokens
        if model.mask_token_id in ids:
            raise DataError(
                "the prompt holds the mask token", where=f"prompt {number}", hint="to fill masks, use --infill"
            )
    check_room(len(ids), new, longest, number)
    return ids
