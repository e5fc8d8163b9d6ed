"""Decode a model that also learned causal prediction: token by token, by seeded blocks, or by self-speculation.

The text before a block is always attended to causally, so that its keys and values are final.

Shape suffixes: B batch (1), C columns of a block, D hidden, V vocabulary.
Source: Nemotron-Labs-Diffusion (arXiv 2607.05722), section on inference, and its remote code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm.decoding import rules
from dllm.decoding.proposals import propose, row_generators
from dllm.decoding.settings import CausalSettings, Remasking, SeededSettings, SelfSpeculationSettings, UnmaskingSettings
from dllm.decoding.unmasking import Generation, Watch, check_prompts, trimmed
from dllm.errors import ConfigError
from dllm.models.diffusion.protocol import DiffusionLM


@torch.no_grad()
def decode_causally(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: CausalSettings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate one token per pass, each from those before it."""

    def decode(row: _Row) -> list[int]:
        return _causally(row, settings)

    return _each(model, prompts, settings, _block_size(model, None), watch, copies, decode)


@torch.no_grad()
def decode_seeded(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: UnmaskingSettings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate block by block: the first token is the causal prediction, the others are unmasked around it.

    `passes` counts the prompt's, each step's, and one per block that makes it final and predicts the next first token.
    """
    size = _block_size(model, settings.block_size)

    def decode(row: _Row) -> list[int]:
        return _seeded(row, settings, size)

    return _each(model, prompts, settings, size, watch, copies, decode)


@torch.no_grad()
def speculate_on_itself(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: SelfSpeculationSettings,
    watch: Watch | None = None,
    copies: Sequence[int] | None = None,
) -> list[Generation]:
    """Draft a block in one pass with attention both ways, and keep what causal decoding would have generated.

    The text is `decode_causally`'s, token for token (as far as arithmetic is exact). Two passes per iteration, and the
    prompt's.

    Raises:
        ConfigError: a temperature above 0, for which this acceptance rule would be wrong.
    """
    if settings.temperature > 0:
        raise ConfigError("self-speculation is greedy", hint="leave --temperature at 0, or take another sampler")
    size = _block_size(model, settings.block_size)

    def decode(row: _Row) -> list[int]:
        return _speculated(row, settings, size)

    return _each(model, prompts, settings, size, watch, copies, decode)


def _block_size(model: DiffusionLM, named: int | None) -> int:
    return named or model.config.block_size or 32


class _Row:
    """One prompt, its response so far, and the keys and values of both."""

    def __init__(
        self,
        model: DiffusionLM,
        prompt: Sequence[int],
        settings: SeededSettings,
        generator: torch.Generator,
        columns: int,
        number: int,
        watch: Watch | None,
    ) -> None:
        self.model, self.settings, self.generator, self.number, self.watch = model, settings, generator, number, watch
        self.device = model.head_VD.device
        self.start, self.generation = len(prompt), Generation()
        self.columns = model.columns(len(prompt) + columns)
        self.first_logits_V = self.run_causally(list(prompt), 0)

    def run_causally(self, ids: Sequence[int], begin: int) -> Tensor:
        """Run some columns with the causal mask; return the next token's logits. Shapes: logits_V."""
        return self.run(ids, begin, causal=True, kept=slice(len(ids) - 1, None))[0]

    def run(self, ids: Sequence[int], begin: int, *, causal: bool, kept: slice = slice(None)) -> Tensor:
        """Run some columns over those before them; return logits of those kept, the mask token's at -inf.

        Shapes: returns logits_CV.
        """
        ids_BC = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        hidden_BCD = self.columns.run(ids_BC, begin, causal)
        self.generation.passes += 1
        logits_CV = self.model.logits(hidden_BCD[0, kept])
        logits_CV[:, self.model.mask_token_id] = float("-inf")
        return logits_CV

    def propose(
        self, logits_CV: Tensor, settings: CausalSettings, remasking: Remasking = "low_confidence"
    ) -> tuple[Tensor, Tensor]:
        """Propose a token for each column, with its score."""
        return propose(
            logits_CV,
            [len(logits_CV)],
            [self.generator],
            temperature=settings.temperature,
            top_p=settings.top_p,
            remasking=remasking,
        )

    def commit(self, pairs: list[tuple[int, int]]) -> None:
        """Record what a step has committed, as (position in the response, token)."""
        self.generation.steps.append(pairs)
        if self.watch is not None:
            self.watch(self.number, pairs)

    def ended(self, ids: Sequence[int]) -> bool:
        """Tell whether finished text ends the response."""
        return self.settings.early_stop and not self.model.eos_ids.isdisjoint(ids)


def _each(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    settings: SeededSettings,
    size: int,
    watch: Watch | None,
    copies: Sequence[int] | None,
    decode: Callable[[_Row], list[int]],
) -> list[Generation]:
    check_prompts(model, prompts, masks=False)
    generators = row_generators(prompts, settings.seed, copies, model.head_VD.device)
    generations = []
    for number, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
        row = _Row(model, prompt, settings, generator, settings.max_new_tokens + size, number, watch)
        row.generation.token_ids = decode(row)[: settings.max_new_tokens]
        generations.append(trimmed(row.generation, model.eos_ids))
    return generations


def _causally(row: _Row, settings: CausalSettings) -> list[int]:
    ids: list[int] = []
    logits_V = row.first_logits_V
    while True:
        token = int(row.propose(logits_V[None], settings)[0])
        row.commit([(len(ids), token)])
        ids.append(token)
        if row.ended([token]) or len(ids) == settings.max_new_tokens:
            return ids
        logits_V = row.run_causally([token], row.start + len(ids) - 1)


def _seeded(row: _Row, settings: UnmaskingSettings, size: int) -> list[int]:
    ids: list[int] = []
    logits_V, limit = row.first_logits_V, settings.max_new_tokens
    blocks = -(-limit // size)
    while True:
        begin, length = len(ids), min(size, limit - len(ids))
        seed = int(row.propose(logits_V[None], settings, settings.remasking)[0])
        block = [seed] + [row.model.mask_token_id] * (length - 1)
        row.commit([(begin, seed)])
        masked_BC = torch.ones(1, length, dtype=torch.bool, device=row.device)
        masked_BC[:, 0] = False
        plan = rules.plan(length - 1, -(-(settings.steps or limit) // blocks), settings.schedule)
        while bool(masked_BC.any()) and not _is_final(row, block):
            token_C, score_C = row.propose(
                row.run(block, row.start + begin, causal=False), settings, settings.remasking
            )
            score_BC = score_C[None].masked_fill(~masked_BC, float("-inf"))
            planned_B = torch.tensor([max(1, plan.pop(0) if plan else 1)], device=row.device)
            chosen_BC = rules.best(score_BC, rules.commit_counts(score_BC, planned_B, settings))
            columns = chosen_BC[0].nonzero()[:, 0].tolist()
            for column in columns:
                block[column] = int(token_C[column])
            row.commit([(begin + column, block[column]) for column in columns])
            masked_BC &= ~chosen_BC
        ids += block
        if row.ended(block) or len(ids) == limit:
            return ids
        logits_V = row.run_causally(block, row.start + begin)


def _is_final(row: _Row, block: Sequence[int]) -> bool:
    """Tell whether a block has an end token with no mask before it."""
    masks = [column for column, token in enumerate(block) if token == row.model.mask_token_id]
    return row.ended(block[: masks[0]] if masks else block)


def _speculated(row: _Row, settings: SelfSpeculationSettings, size: int) -> list[int]:
    limit, mask = settings.max_new_tokens, row.model.mask_token_id
    ids = [int(row.first_logits_V.argmax())]
    row.commit([(0, ids[0])])
    while not row.ended(ids) and len(ids) < limit:
        begin = row.start + len(ids) - 1
        block = [ids[-1]] + [mask] * (size - 1)
        draft = row.run(block, begin, causal=False, kept=slice(1, None)).argmax(-1).tolist()
        verified = row.run([ids[-1], *draft], begin, causal=True).argmax(-1).tolist()
        accepted = next((n for n, (a, b) in enumerate(zip(draft, verified, strict=False)) if a != b), len(draft))
        new = [*draft[:accepted], verified[accepted]]  # after the accepted tokens, causal decoding's own next one
        row.commit([(len(ids) + n, token) for n, token in enumerate(new)])
        ids += new
    return ids
