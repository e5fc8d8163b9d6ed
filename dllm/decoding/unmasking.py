"""Decode by unmasking a canvas, block by block, the most confident tokens first.

Every sampler of masked diffusion is this loop with other settings: LLaDA's plan, Fast-dLLM's threshold and factor,
entropy bounds, LLaDA2's editing, with any cache. Rows are independent: each gets what it would get alone.

Shape suffixes: B batch, K columns, C columns of a block, M masked positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm.decoding import rules
from dllm.decoding.cache_passes import Passes
from dllm.decoding.canvas import Canvas, for_filling, for_responses
from dllm.decoding.proposals import propose, row_generators
from dllm.decoding.settings import CacheKind, Settings
from dllm.errors import ConfigError, DataError, ModelError
from dllm.models.diffusion.config import Origin
from dllm.models.diffusion.protocol import DiffusionLM


@dataclass
class Generation:
    """The response to one prompt, and what it took.

    `token_ids` ends with the first end token; `passes` counts forward passes in which this row was decoded (guidance
    counts twice). `steps` has what each step committed or edited, as (position in the response, token) pairs.
    """

    token_ids: list[int] = field(default_factory=list)
    passes: int = 0
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    stopped: bool = False


Watch = Callable[[int, list[tuple[int, int]]], None]
"""Called after each step of a row with its number and what the step committed, as in `Generation.steps`."""


@torch.no_grad()
def sample(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate from prompts, all in one batch.

    Args:
        copies: which of equal prompts each is, over all batches: see `row_generators`.

    Raises:
        ConfigError: the settings do not fit the model.
        ModelError: it supports no cache.
        DataError: a prompt is empty, or holds the mask token.
    """
    check_prompts(model, prompts, masks=False)
    _check_cache(model, settings.cache)
    block_size = settings.block_size or model.config.block_size or settings.max_new_tokens
    origin: Origin = "sequence" if model.config.context == "block" else "response"
    device = model.head_VD.device
    canvas = for_responses(
        prompts, settings.max_new_tokens, block_size, model.mask_token_id, origin, model.prompt_blocks, device
    )
    generators = row_generators(prompts, settings.seed, copies, device)
    generations = _Loop(model, canvas, settings, generators, watch).run(block_size)
    return [trimmed(each, model.eos_ids) for each in generations]


@torch.no_grad()
def fill(
    model: DiffusionLM,
    texts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Replace the masks inside texts; `token_ids` are then whole texts, and `max_new_tokens` is ignored.

    Neither end tokens nor other special tokens are generated, as text follows a span. `copies` as in `sample`.

    Raises:
        ConfigError: the model is block-causal, and cannot attend to what follows a mask.
        DataError: a text is empty.
    """
    check_prompts(model, texts, masks=True)
    if model.config.context != "full":
        raise ConfigError(
            "this model is block-causal: it cannot see what follows a mask", hint="infill needs full attention"
        )
    _check_cache(model, settings.cache)
    canvas = for_filling(texts, settings.block_size, model.mask_token_id, model.head_VD.device)
    generators = row_generators(texts, settings.seed, copies, model.head_VD.device)
    loop = _Loop(model, canvas, settings, generators, watch, stop=False)
    return loop.run(settings.block_size or canvas.width)


def check_prompts(model: DiffusionLM, prompts: Sequence[Sequence[int]], masks: bool) -> None:
    """Refuse empty prompts, and unless `masks` those with the mask token.

    Raises:
        DataError: there is one.
    """
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) == 0:
            raise DataError("empty prompt", where=f"prompt {number}")
        if not masks and model.mask_token_id in prompt:
            raise DataError(
                "the prompt holds the mask token", where=f"prompt {number}", hint="to fill masks, use --infill"
            )


def trimmed(generation: Generation, eos_ids: set[int]) -> Generation:
    """Cut a response after its first end token."""
    end = next((index for index, token in enumerate(generation.token_ids) if token in eos_ids), None)
    if end is not None:
        generation.token_ids, generation.stopped = generation.token_ids[: end + 1], True
    return generation


def _check_cache(model: DiffusionLM, cache: CacheKind) -> None:
    """Refuse a cache that the model does not support.

    Raises:
        ConfigError: it is for another kind of attention.
        ModelError: there is none for this model.
    """
    if cache in model.caches:
        return
    context = model.config.context
    if cache == "block" and context == "full":
        raise ConfigError(
            "cache block is for block-causal models, and this one's attention is full", hint="take prefix or dual"
        )
    if cache in ("prefix", "dual") and context != "full":
        raise ConfigError(f"cache {cache} is for full attention, and this model is block-causal", hint="take block")
    raise ModelError("no cache of ours with this model", where=model.model_config.model_type, hint="--cache none")


class _Loop:
    """Decodes the blocks of one canvas, one after the other."""

    def __init__(
        self,
        model: DiffusionLM,
        canvas: Canvas,
        settings: Settings,
        generators: Sequence[torch.Generator],
        watch: Watch | None,
        stop: bool = True,
    ) -> None:
        self.model, self.canvas, self.settings, self.generators, self.watch = model, canvas, settings, generators, watch
        self.stops = stop and settings.early_stop
        special = set() if stop else {*model.eos_ids, *model.tokenizer.all_special_ids}
        self.never = torch.tensor(sorted({model.mask_token_id, *special}), device=canvas.ids_BK.device)
        self.eos_M = torch.tensor(sorted(model.eos_ids), dtype=torch.int64, device=canvas.ids_BK.device)
        context, runs = model.config.context, 2 if settings.cfg_scale else 1
        self.passes = [Passes(model, canvas, context, settings.cache) for _ in range(runs)]
        self.generations = [Generation() for _ in canvas.row_of_B]
        # Where responses begin; for texts with masks inside, where the text does.
        fixed_BK = canvas.given_BK if stop else torch.zeros_like(canvas.given_BK)
        self.offset = [int((~fixed_BK[row] & canvas.valid_BK[row]).long().argmax()) for row in canvas.row_of_B]

    def run(self, block_size: int) -> list[Generation]:
        blocks = [
            (begin, min(begin + block_size, self.canvas.width))
            for begin in range(self.canvas.start, self.canvas.width, block_size)
        ]
        # A row's steps are divided among the blocks that it has masks in: a longer row may have more of them.
        masked_BN = torch.stack([self._decoded(begin, end).any(1) for begin, end in blocks], 1)
        shares = masked_BN.sum(1).clamp_min(1).tolist()
        self.steps_of_block = [-(-(self.settings.steps or 1 << 60) // share) for share in shares]  # by prompt
        for begin, end in blocks:
            self._block(begin, end)
            self._drop_finished(end == self.canvas.width, end)
            if not self.canvas.row_of_B:
                break
        return self.generations

    def _block(self, begin: int, end: int) -> None:
        decoded_BC = self._decoded(begin, end)
        masked_BC = decoded_BC.clone()
        editing = self.settings.editing_threshold
        if editing is not None and editing >= 1:  # no probability is above it
            editing = None
        plans = [
            rules.plan(masks, self.steps_of_block[number], self.settings.schedule)
            for number, masks in zip(self.canvas.row_of_B, masked_BC.sum(1).tolist(), strict=True)
        ]
        for passes in self.passes:
            passes.enter(begin, end)
        busy_B = masked_BC.any(1)
        post_B = torch.zeros_like(busy_B, dtype=torch.int64)
        step = 0
        while bool(busy_B.any()):
            candidates_BC = (masked_BC if editing is None else decoded_BC) & busy_B[:, None]
            # After the first pass, finished rows need not be run.
            rows = None if step == 0 or bool(busy_B.all()) else busy_B.nonzero()[:, 0]
            token_BC, score_BC = self._proposals(candidates_BC, rows)
            unmask_BC = score_BC.masked_fill(~masked_BC, float("-inf"))
            planned = [plan[step] if step < len(plan) else 1 for plan in plans]
            planned_B = torch.tensor(planned, device=unmask_BC.device)
            chosen_BC = rules.best(unmask_BC, rules.commit_counts(unmask_BC, planned_B, self.settings))
            unsettled_B = masked_BC.any(1) if editing is not None else torch.zeros_like(busy_B)
            post_B += busy_B & ~masked_BC.any(1)
            masked_BC = masked_BC & ~chosen_BC
            if editing is not None:
                edits_BC = candidates_BC & ~masked_BC & ~chosen_BC & (score_BC > editing)
                edits_BC &= token_BC != self.canvas.ids_BK[:, begin:end]
                chosen_BC, unsettled_B = chosen_BC | edits_BC, unsettled_B | edits_BC.any(1)
            self.canvas.ids_BK[:, begin:end] = torch.where(chosen_BC, token_BC, self.canvas.ids_BK[:, begin:end])
            self._record(chosen_BC, busy_B, begin)
            # Only a later pass can edit what a pass has committed.
            busy_B = masked_BC.any(1) | (unsettled_B & busy_B & (post_B < self.settings.max_post_steps))
            if self.stops and editing is None:  # an edit could still replace the end token
                busy_B = busy_B & ~self._ended(begin, end, masked_BC)
            step += 1

    def _decoded(self, begin: int, end: int) -> Tensor:
        """Return which columns of a block are decoded."""
        canvas, part = self.canvas, slice(begin, end)
        return canvas.valid_BK[:, part] & ~canvas.given_BK[:, part]

    def _proposals(self, active_BC: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the model and propose a token at each active position.

        Shapes: rows int64, all that have an active position, or None for all. Returns token_BC and score_BC.
        """
        canvas, settings = self.canvas, self.settings
        run_BC = active_BC if rows is None else active_BC[rows]
        logits_MV = self.model.logits(self.passes[0].hidden(canvas.ids_BK, rows)[run_BC])
        if settings.cfg_scale:
            blind_BK = canvas.ids_BK.masked_fill(canvas.given_BK, self.model.mask_token_id)
            without_MV = self.model.logits(self.passes[1].hidden(blind_BK, rows)[run_BC])
            logits_MV = logits_MV + settings.cfg_scale * (logits_MV - without_MV)
        logits_MV[:, self.never] = float("-inf")
        token_M, score_M = propose(
            logits_MV,
            active_BC.sum(1).tolist(),
            [self.generators[number] for number in canvas.row_of_B],
            temperature=settings.temperature,
            top_p=settings.top_p,
            remasking=settings.remasking,
        )
        token_BC = torch.zeros(active_BC.shape, dtype=torch.int64, device=active_BC.device)
        score_BC = torch.full(active_BC.shape, float("-inf"), device=active_BC.device)
        token_BC[active_BC], score_BC[active_BC] = token_M, score_M
        return token_BC, score_BC

    def _record(self, chosen_BC: Tensor, busy_B: Tensor, begin: int) -> None:
        found: dict[int, list[tuple[int, int]]] = {row: [] for row in busy_B.nonzero()[:, 0].tolist()}
        tokens = self.canvas.ids_BK[:, begin : begin + chosen_BC.shape[1]][chosen_BC].tolist()
        for (row, column), token in zip(chosen_BC.nonzero().tolist(), tokens, strict=True):
            found[row].append((begin + column - self.offset[self.canvas.row_of_B[row]], token))
        for row, pairs in found.items():
            number = self.canvas.row_of_B[row]
            generation = self.generations[number]
            generation.passes += len(self.passes)
            generation.steps.append(pairs)
            if self.watch is not None:
                self.watch(number, pairs)

    def _ended(self, begin: int, end: int, masked_BC: Tensor) -> Tensor:
        """Return which rows have an end token in the block with no mask before it."""
        committed_BC = self._decoded(begin, end) & ~masked_BC
        eos_BC = committed_BC & torch.isin(self.canvas.ids_BK[:, begin:end], self.eos_M)
        return (eos_BC & (masked_BC.long().cumsum(1) == 0)).any(1)

    def _drop_finished(self, last: bool, end: int) -> None:
        """Drop finished rows from the canvas."""
        canvas = self.canvas
        kept = []
        for row, number in enumerate(canvas.row_of_B):
            upto = slice(self.offset[number], end)
            ids = canvas.ids_BK[row, upto][canvas.valid_BK[row, upto]].tolist()
            if last or (self.stops and not self.model.eos_ids.isdisjoint(ids)):
                self.generations[number].token_ids = ids
            else:
                kept.append(row)
        if len(kept) < len(canvas.row_of_B):
            canvas.keep(kept)
            for passes in self.passes:
                passes.keep(kept)
