"""Greedy decoding of one sequence: speculative with a draft, or one token at a time without.

Owns the only decoding loop that is timed. Both ways run the same code, so that their times can be compared; without a
draft a round is a single target step.

At the head of a round, `start` is the position of the newest token. That token is known but in no cache; the target's
cache and the draft's context (once the round's features are in it) hold exactly `start` positions.

Shape suffixes: B batch (always 1), L slots of a block, F tapped features, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm.errors import DataError, ModelError
from dllm.models.drafts.dflash import ContextCache, DFlashDraft
from dllm.models.taps import capture

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Round:
    """What one target forward brought. The first, over the prompt, brings one token and has `accepted` 0.

    Units: seconds of wall clock, the draft included.
    """

    tokens: tuple[int, ...]
    """New tokens of the answer, cut after a stop id and at the answer's limit."""
    accepted: int
    """Tokens that hold: the accepted drafts and the target's own next one; cut after a stop id, not at the limit."""
    run: int
    """Drafts accepted."""
    drafted: int
    """Drafts offered."""
    seconds: float


@dataclass
class Answer:
    """A finished answer and what it took.

    Units: seconds of wall clock; `decode_s` starts after the first token and holds the draft's look at the prompt.
    """

    token_ids: list[int]
    rounds: list[Round]
    prefill_s: float
    stopped: bool
    """Whether a stop id ended it, rather than its limit."""

    @property
    def decode_s(self) -> float:
        """Time from the first token to the last."""
        return sum(r.seconds for r in self.rounds)

    @property
    def decoded(self) -> int:
        """Tokens after the first one."""
        return len(self.token_ids) - 1


class Decoder:
    """Answers prompts greedily with a target and, where there is one, a draft.

    Args:
        model: the target, a transformers causal model in evaluation mode.
        draft: its draft; None decodes one token at a time. Weights of another dtype than the model's are copied.
        block_size: slots a round, at most the draft's; 0 takes the draft's.
        named_by: what a person set it by, for complaints.

    Raises:
        ModelError: the draft does not fit the target or the block size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: DFlashDraft | None = None,
        block_size: int = 0,
        named_by: str = "evaluate.block_size",
    ) -> None:
        self.model, self.draft, self.block_size = model, draft, 1
        self.limit: int = model.config.get_text_config().max_position_embeddings
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        if draft is None:
            return
        own = draft.config.block_size
        self.block_size = block_size or own
        if not 2 <= self.block_size <= own:
            raise ModelError(
                f"block size {self.block_size} for a draft that was trained on blocks of {own}",
                where=named_by,
                hint=f"name a size from 2 to {own}, or 0 for the draft's",
            )
        mask_id, rows = draft.config.mask_token_id, model.config.get_text_config().vocab_size
        if mask_id >= rows:
            raise ModelError(f"mask id {mask_id} is outside the target's embedding of {rows} rows", where="config.json")
        weight = next(draft.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (model.dtype, model.device):
            self.draft = copy.deepcopy(draft).to(model.device, model.dtype)

    def decode(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()
    ) -> Iterator[Round]:
        """Decode one answer, round by round.

        It ends after the first stop id, at `max_new_tokens`, or where the target's positions end.

        Raises:
            DataError: the prompt is empty or leaves no position for an answer.
        """
        return Decoding(self, prompt_ids, max_new_tokens, stop_ids).rounds()

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()) -> Answer:
        """Decode one answer to its end."""
        first, *rounds = self.decode(prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        token_ids = [token for r in (first, *rounds) for token in r.tokens]
        return Answer(token_ids, rounds, first.seconds, stopped=token_ids[-1] in stop_ids)


@dataclass
class Decoding:
    """One answer under way: the caches and where they stand."""

    decoder: Decoder
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int]
    start: int = 0
    newest: int = -1
    cache: DynamicCache = field(init=False)
    context: ContextCache | None = None
    features_BSF: Tensor | None = None
    """Tapped features of the positions the draft has not seen yet."""

    def __post_init__(self) -> None:
        from transformers import DynamicCache

        room = self.decoder.limit - len(self.prompt_ids)
        if not self.prompt_ids or room < 1:
            raise DataError(
                f"a prompt of {len(self.prompt_ids)} tokens leaves no answer room in {self.decoder.limit} positions"
            )
        self.max_new_tokens = min(self.max_new_tokens, room)
        self.cache = DynamicCache(config=self.decoder.model.config)
        draft, device = self.decoder.draft, self.decoder.model.device
        self.block_BL = torch.full((1, self.decoder.block_size), 0, device=device)
        if draft is not None:
            self.context = draft.new_cache()
            self.block_BL[:] = draft.config.mask_token_id
            self.cache.activate_past_recording()  # lets sliding-window layers take tokens back

    def rounds(self) -> Iterator[Round]:
        """Yield the prompt's round, then one round after another until the answer ends."""
        began = time.perf_counter()
        self._prefill()
        left = self.max_new_tokens - 1
        yield Round((self.newest,), 0, 0, 0, time.perf_counter() - began)
        stopped = self.newest in self.stop_ids
        while left > 0 and not stopped:
            began = time.perf_counter()
            tokens, drafted = self._step()
            run = len(tokens) - 1
            for index, token in enumerate(tokens):
                if token in self.stop_ids:
                    stopped, tokens = True, tokens[: index + 1]
                    run = min(run, index + 1)
                    break
            yield Round(tuple(tokens[:left]), len(tokens), run, drafted, time.perf_counter() - began)
            left -= len(tokens)

    @torch.inference_mode()
    def _prefill(self) -> None:
        ids_BS = torch.tensor([list(self.prompt_ids)], device=self.decoder.model.device)
        logits_BLV = self._forward(ids_BS, tapped=self.decoder.draft is not None, logits_to_keep=1)
        if self.decoder.draft is not None:
            if not self.cache.is_croppable:
                raise ModelError("this target keeps a recurrent state and cannot take back rejected tokens")
            self.cache.crop(0)
        self.start, self.newest = ids_BS.shape[1], int(logits_BLV[0, -1].argmax())

    @torch.inference_mode()
    def _step(self) -> tuple[list[int], int]:
        """Draft a block, verify it, keep what holds; return the tokens that follow `newest`, and the drafts offered."""
        draft = self.decoder.draft
        slots = min(self.decoder.block_size, self.decoder.limit - self.start)
        block_BL = self.block_BL[:, :slots]
        block_BL[0, 0] = self.newest
        if draft is None or slots == 1:
            logits_BLV = self._forward(block_BL, tapped=False)
            self.start, self.newest = self.start + 1, int(logits_BLV[0, 0].argmax())
            return [self.newest], 0
        assert self.context is not None and self.features_BSF is not None
        block_BL[:, 1:] = draft.config.mask_token_id
        hidden_BLD = draft.propose(self.decoder.embed(block_BL), self.features_BSF, self.start, self.context)
        block_BL[:, 1:] = self.decoder.head(hidden_BLD[:, 1:]).argmax(-1)
        logits_BLV = self._forward(block_BL, tapped=True)
        proposed, truth = torch.cat([block_BL, logits_BLV.argmax(-1)]).tolist()
        run = 0
        while run < slots - 1 and proposed[run + 1] == truth[run]:
            run += 1
        self.cache.crop(run + 1 - slots)
        self.features_BSF = self.features_BSF[:, : run + 1]
        self.start, self.newest = self.start + run + 1, truth[run]
        return truth[: run + 1], slots - 1

    def _forward(self, ids_BS: Tensor, *, tapped: bool, **options: Any) -> Tensor:
        model, draft = self.decoder.model, self.decoder.draft
        if draft is None or not tapped:
            return model(input_ids=ids_BS, past_key_values=self.cache, use_cache=True, **options).logits
        with capture(model, draft.config.target_layer_ids) as tap:
            logits_BLV = model(input_ids=ids_BS, past_key_values=self.cache, use_cache=True, **options).logits
        self.features_BSF = tap.read()
        return logits_BLV
