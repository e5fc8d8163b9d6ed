"""Decoding of one sequence, greedily or by sampling: speculative with a draft, or one token at a time without.

Owns the only decoding loop that is timed. Both arms run the same code, so that their times can be compared; without a
draft a round is a single target step.

At the beginning of a round, `start` is the position of the newest token. That token is known but in no cache; the
target's cache and the draft's context (once the round's features are in it) hold exactly `start` positions.

Shape suffixes: B batch (always 1), L slots of a block, F tapped features, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.sampling import TargetSampling, Verified, verify
from dllm.errors import DataError, ModelError
from dllm.models.drafts.protocol import Draft, TargetIO
from dllm.models.taps import capture


@dataclass(frozen=True)
class Round:
    """What one target forward pass brought.

    Units: seconds of wall clock, the draft included.
    """

    tokens: tuple[int, ...]
    """New tokens of the response, cut after a stop id and at the response's limit."""
    counts: RoundCounts
    """Cut after a stop id, not at the limit."""
    seconds: float
    is_prefill: bool = False
    """Whether it is the first pass, over the prompt, which brings one token and is no round of decoding."""
    chances: tuple[float, ...] = ()
    """As in `dllm.decoding.sampling.Verified`, up to a stop id; empty if decoding is greedy."""


@dataclass
class Generation:
    """A finished response and its times.

    Units: seconds of wall clock; `decode_s` starts after the first token and includes the draft's pass over the
        prompt's features.
    """

    token_ids: list[int]
    rounds: list[Round]
    """Without the prefill."""
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
    """Generates responses with a target and, optionally, a draft.

    Args:
        model: the target, a transformers causal model in evaluation mode.
        draft: its draft; None decodes one token at a time. Weights of another dtype than the model's are copied.
        block_size: slots per round, at most the draft's; 0 takes the draft's.
        named_by: the setting or flag that errors name.

    Raises:
        ModelError: the draft does not fit the target or the block size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: Draft | None = None,
        block_size: int = 0,
        named_by: str = "evaluate.block_size",
    ) -> None:
        self.model, self.draft, self.block_size = model, draft, 1
        self.limit: int = model.config.get_text_config().max_position_embeddings
        self.target = TargetIO(model.get_input_embeddings(), model.get_output_embeddings())
        if draft is None:
            return
        trained = draft.config.block_size
        self.block_size = block_size or trained
        if not 2 <= self.block_size <= trained:
            raise ModelError(
                f"block size {self.block_size} for a draft that was trained on blocks of {trained}",
                where=named_by,
                hint=f"choose a size from 2 to {trained}, or 0 for the draft's",
            )
        mask_id, rows = draft.config.mask_token_id, model.config.get_text_config().vocab_size
        if mask_id >= rows:
            raise ModelError(f"mask id {mask_id} is outside the target's embedding of {rows} rows", where="config.json")
        weight = next(draft.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (model.dtype, model.device):
            self.draft = copy.deepcopy(draft).to(model.device, model.dtype)

    def decode(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: TargetSampling | None = None,
    ) -> Iterator[Round]:
        """Decode one response, round by round.

        It ends after the first stop id, at `max_new_tokens`, or where the target's positions end.

        Args:
            sampling: None decodes greedily.

        Raises:
            DataError: the prompt is empty or leaves no position for a response.
        """
        return Decoding(self, prompt_ids, max_new_tokens, stop_ids, sampling).rounds()

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: TargetSampling | None = None,
    ) -> Generation:
        """Decode one response to its end."""
        first, *rounds = self.decode(prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)
        token_ids = [token for r in (first, *rounds) for token in r.tokens]
        return Generation(token_ids, rounds, first.seconds, stopped=token_ids[-1] in stop_ids)


@dataclass
class Decoding:
    """One response in progress: the caches and the position they have reached."""

    decoder: Decoder
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int]
    sampling: TargetSampling | None = None
    start: int = 0
    newest: int = -1
    cache: DynamicCache = field(init=False)
    context: Any = None
    """The draft's cache."""
    features_BSF: Tensor | None = None
    """Tapped features of the positions that the draft has not read yet."""

    def __post_init__(self) -> None:
        room = self.decoder.limit - len(self.prompt_ids)
        if not self.prompt_ids or room < 1:
            raise DataError(
                f"a prompt of {len(self.prompt_ids)} tokens leaves no room for a response: the target has "
                f"{self.decoder.limit} positions"
            )
        self.max_new_tokens = min(self.max_new_tokens, room)
        self.cache = DynamicCache(config=self.decoder.model.config)
        draft, device = self.decoder.draft, self.decoder.model.device
        self.block_BL = torch.full((1, self.decoder.block_size), 0, device=device)
        if draft is not None:
            self.context = draft.new_cache()
            self.cache.activate_past_recording()  # lets sliding-window layers take tokens back

    def rounds(self) -> Iterator[Round]:
        """Yield the prefill, then one round after another until the response ends."""
        began = time.perf_counter()
        self._prefill()
        left = self.max_new_tokens - 1
        yield Round((self.newest,), RoundCounts(1, 0, 0), time.perf_counter() - began, is_prefill=True)
        stopped = self.newest in self.stop_ids
        while left > 0 and not stopped:
            began = time.perf_counter()
            verified, drafted = self._step()
            tokens, chances, accepted = verified.tokens, verified.chances, len(verified.tokens) - 1
            for index, token in enumerate(tokens):
                if token in self.stop_ids:
                    stopped, tokens, chances = True, tokens[: index + 1], chances[: index + 1]
                    accepted = min(accepted, index + 1)
                    break
            counts = RoundCounts(len(tokens), accepted, drafted)
            yield Round(tokens[:left], counts, time.perf_counter() - began, chances=chances)
            left -= len(tokens)

    @torch.inference_mode()
    def _prefill(self) -> None:
        ids_BS = torch.tensor([list(self.prompt_ids)], device=self.decoder.model.device)
        logits_BLV = self._forward(ids_BS, tapped=self.decoder.draft is not None, logits_to_keep=1)
        if self.decoder.draft is not None:
            if not self.cache.is_croppable:
                raise ModelError("this target keeps a recurrent state and cannot take back rejected tokens")
            self.cache.crop(0)
        self.start, self.newest = ids_BS.shape[1], verify(None, logits_BLV[0, -1:], self.sampling).tokens[0]

    @torch.inference_mode()
    def _step(self) -> tuple[Verified, int]:
        """Draft a block and verify it; return what it brought, and how many tokens were drafted."""
        draft = self.decoder.draft
        slots = min(self.decoder.block_size, self.decoder.limit - self.start)
        block_BL = self.block_BL[:, :slots]
        block_BL[0, 0] = self.newest
        proposal, drafted = None, 0
        if draft is not None and slots > 1:
            assert self.features_BSF is not None
            proposal = draft.propose(
                self.newest,
                slots - 1,
                self.features_BSF,
                self.start,
                self.context,
                self.decoder.target,
                None if self.sampling is None else self.sampling.sampling,
            )
            drafted = len(proposal.ids_P)
            block_BL = block_BL[:, : drafted + 1]
            block_BL[0, 1:] = proposal.ids_P
        logits_BLV = self._forward(block_BL, tapped=proposal is not None)
        verified = verify(proposal, logits_BLV[0], self.sampling)
        accepted = len(verified.tokens) - 1
        if proposal is not None and self.features_BSF is not None:
            self.cache.crop(accepted - drafted)
            self.features_BSF = self.features_BSF[:, : accepted + 1]
        self.start, self.newest = self.start + accepted + 1, verified.tokens[-1]
        return verified, drafted

    def _forward(self, ids_BS: Tensor, *, tapped: bool, **options: Any) -> Tensor:
        model, draft = self.decoder.model, self.decoder.draft
        if draft is None or not tapped:
            return model(input_ids=ids_BS, past_key_values=self.cache, use_cache=True, **options).logits
        with capture(model, draft.config.target_layer_ids) as tap:
            logits_BLV = model(input_ids=ids_BS, past_key_values=self.cache, use_cache=True, **options).logits
        self.features_BSF = tap.read()
        return logits_BLV
