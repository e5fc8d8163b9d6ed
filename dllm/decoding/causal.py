"""Decode a model that was trained to write both ways: causally, by seeded blocks, or by speculating on itself.

The text before a block is always seen causally, so that its keys and values are final once written.

Shape suffixes: B batch (1), C columns of a block, D hidden, V vocabulary.
Source: Nemotron-Labs-Diffusion (arXiv 2607.05722), section on inference, and its remote code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm.decoding import rules as schedule
from dllm.decoding.proposals import propose, row_generators
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import Generation, Watch, check_prompts, trimmed
from dllm.errors import ConfigError
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.models.diffusion.columns import columns_of


@torch.no_grad()
def decode_causally(
    model: BidirectionalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Write one token a pass, each from what is before it."""
    return _each(model, prompts, settings, watch, copies, _causally)


@torch.no_grad()
def decode_seeded(
    model: BidirectionalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Write block by block: the first token is the causal prediction, the others are unmasked around it.

    `passes` counts the prompt's, each step's, and one a block that makes it final and predicts the next seed.
    """
    return _each(model, prompts, settings, watch, copies, _seeded)


@torch.no_grad()
def speculate_on_itself(
    model: BidirectionalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Draft a block in one pass with attention both ways, and keep what causal decoding would have written.

    The text is `decode_causally`'s, token for token (as far as arithmetic is exact). Two passes an iteration, and the
    prompt's.

    Raises:
        ConfigError: a temperature above 0, for which this acceptance rule would be wrong.
    """
    if settings.temperature > 0:
        raise ConfigError("self-speculation is greedy", hint="leave --temperature at 0, or take another sampler")
    return _each(model, prompts, settings, watch, copies, _speculated)


class _Row:
    """One prompt, what is written of its answer, and the keys and values of both."""

    def __init__(
        self,
        model: BidirectionalLM,
        prompt: Sequence[int],
        settings: Settings,
        generator: torch.Generator,
        columns: int,
        number: int,
        watch: Watch | None,
    ) -> None:
        self.model, self.settings, self.generator, self.number, self.watch = model, settings, generator, number, watch
        self.device = model.head_VD.device
        self.start, self.answer = len(prompt), Generation()
        self.columns = columns_of(model, len(prompt) + columns)
        self.first_logits_V = self.run_causally(list(prompt), 0)

    def run_causally(self, ids: Sequence[int], begin: int) -> Tensor:
        """Run some columns, none of which sees a later one; return what is to follow. Shapes: logits_V."""
        return self.run(ids, begin, causal=True, wanted=slice(len(ids) - 1, None))[0]

    def run(self, ids: Sequence[int], begin: int, *, causal: bool, wanted: slice = slice(None)) -> Tensor:
        """Run some columns over those before them; return logits of those wanted, the mask's left out.

        Shapes: returns logits_CV.
        """
        ids_BC = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        hidden_BCD = self.columns.run(ids_BC, begin, causal)
        self.answer.passes += 1
        logits_CV = self.model.logits(hidden_BCD[0, wanted])
        logits_CV[:, self.model.mask_token_id] = float("-inf")
        return logits_CV

    def choose(self, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Propose a token for each column, with its score."""
        settings = self.settings
        return propose(
            logits_CV,
            [len(logits_CV)],
            [self.generator],
            temperature=settings.temperature,
            top_p=settings.top_p,
            remasking=settings.remasking,
        )

    def commit(self, pairs: list[tuple[int, int]]) -> None:
        """Note what a step has written, as (place in the answer, token)."""
        self.answer.steps.append(pairs)
        if self.watch is not None:
            self.watch(self.number, pairs)

    def ended(self, ids: Sequence[int]) -> bool:
        """Tell whether some finished text ends the answer."""
        return self.settings.early_stop and not self.model.eos_ids.isdisjoint(ids)


def _each(
    model: BidirectionalLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    watch: Watch | None,
    copies: Sequence[int] | None,
    write: Callable[[_Row, int], list[int]],
) -> list[Generation]:
    check_prompts(model, prompts, masks=False)
    if settings.cfg_scale:
        raise ConfigError("this sampler has no guidance", hint="leave --cfg-scale at 0, or take sampler llada")
    generators = row_generators(prompts, settings.seed, copies, model.head_VD.device)
    size = settings.block_size or model.note.block_size or 32
    answers = []
    for number, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
        row = _Row(model, prompt, settings, generator, settings.max_new_tokens + size, number, watch)
        row.answer.token_ids = write(row, size)[: settings.max_new_tokens]
        answers.append(trimmed(row.answer, model.eos_ids))
    return answers


def _causally(row: _Row, _: int) -> list[int]:
    written: list[int] = []
    logits_V = row.first_logits_V
    while True:
        token = int(row.choose(logits_V[None])[0])
        row.commit([(len(written), token)])
        written.append(token)
        if row.ended([token]) or len(written) == row.settings.max_new_tokens:
            return written
        logits_V = row.run_causally([token], row.start + len(written) - 1)


def _seeded(row: _Row, size: int) -> list[int]:
    written: list[int] = []
    logits_V, limit = row.first_logits_V, row.settings.max_new_tokens
    blocks = -(-limit // size)
    while True:
        begin, length = len(written), min(size, limit - len(written))
        seed = int(row.choose(logits_V[None])[0])
        block = [seed] + [row.model.mask_token_id] * (length - 1)
        row.commit([(begin, seed)])
        masked_BC = torch.ones(1, length, dtype=torch.bool, device=row.device)
        masked_BC[:, 0] = False
        plan = schedule.plan(length - 1, -(-(row.settings.steps or limit) // blocks), row.settings.schedule)
        while bool(masked_BC.any()) and not _ends_whole(row, block):
            token_C, score_C = row.choose(row.run(block, row.start + begin, causal=False))
            score_BC = score_C[None].masked_fill(~masked_BC, float("-inf"))
            chosen_BC = schedule.best(score_BC, _count(row.settings, score_BC, plan))
            columns = chosen_BC[0].nonzero()[:, 0].tolist()
            for column in columns:
                block[column] = int(token_C[column])
            row.commit([(begin + column, block[column]) for column in columns])
            masked_BC &= ~chosen_BC
        written += block
        if row.ended(block) or len(written) == limit:
            return written
        logits_V = row.run_causally(block, row.start + begin)


def _ends_whole(row: _Row, block: Sequence[int]) -> bool:
    """Tell whether a block has an end token with no mask before it."""
    masks = [place for place, token in enumerate(block) if token == row.model.mask_token_id]
    return row.ended(block[: masks[0]] if masks else block)


def _count(settings: Settings, score_BC: Tensor, plan: list[int]) -> Tensor:
    planned = torch.tensor([max(1, plan.pop(0) if plan else 1)], device=score_BC.device)
    if settings.factor is not None:
        return schedule.factor_counts(score_BC, settings.factor)
    if settings.entropy_bound is not None:
        return schedule.entropy_bound_counts(-score_BC, settings.entropy_bound)
    if settings.threshold is not None:
        least = planned if settings.steps is not None else torch.ones_like(planned)
        return schedule.threshold_counts(score_BC, settings.threshold, least)
    return planned


def _speculated(row: _Row, size: int) -> list[int]:
    limit, mask = row.settings.max_new_tokens, row.model.mask_token_id
    written = [int(row.first_logits_V.argmax())]
    row.commit([(0, written[0])])
    while not row.ended(written) and len(written) < limit:
        begin = row.start + len(written) - 1
        asked = [written[-1]] + [mask] * (size - 1)
        draft = row.run(asked, begin, causal=False, wanted=slice(1, None)).argmax(-1).tolist()
        verified = row.run([written[-1], *draft], begin, causal=True).argmax(-1).tolist()
        agreed = next((n for n, (a, b) in enumerate(zip(draft, verified, strict=False)) if a != b), len(draft))
        new = [*draft[:agreed], verified[agreed]]  # after the agreed ones, causal decoding's own next token
        row.commit([(len(written) + n, token) for n, token in enumerate(new)])
        written += new
    return written
