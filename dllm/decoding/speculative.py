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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.sampling import TargetSampling, verify
from dllm.errors import DataError, ModelError
from dllm.models.drafts.proposal import BlockRequest, Proposal
from dllm.models.drafts.protocol import Draft, TargetIO
from dllm.models.packing import packed_linears
from dllm.models.positions import UNBOUNDED, positions_in
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

    @classmethod
    def of(cls, first: Round, rounds: list[Round], stop_ids: Collection[int]) -> Generation:
        """Put a response together from its prefill and its rounds."""
        token_ids = [token for each in (first, *rounds) for token in each.tokens]
        return cls(token_ids, rounds, first.seconds, stopped=token_ids[-1] in stop_ids)

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
        config = model.config.get_text_config()
        self.limit = positions_in(config.to_dict()) or UNBOUNDED
        self.target = TargetIO.of(model)
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

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Multiply by packed weights while the context lasts, where that is faster: for other decoders of the same
        model as well."""
        with packed_linears(self.model, *([] if self.draft is None else [self.draft])):
            yield

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
        return Generation.of(first, rounds, stop_ids)

    def propose(self, requests: Sequence[BlockRequest | None]) -> list[Proposal | None]:
        """Draft a block for each request, in one pass if the draft can; none for None."""
        asked = [each for each in requests if each is not None]
        drafted = iter(self.draft.propose_together(asked, self.target) if self.draft is not None and asked else [])
        return [None if each is None else next(drafted) for each in requests]

    def forward(self, ids_BS: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Run the target. Shapes: returns logits_BSV, and features_BSF for a draft."""
        if self.draft is None:
            return self.model(input_ids=ids_BS, past_key_values=cache, use_cache=True, **options).logits, None
        with capture(self.model, self.draft.config.target_layer_ids) as tap:
            logits_BSV = self.model(input_ids=ids_BS, past_key_values=cache, use_cache=True, **options).logits
        return logits_BSV, tap.read()


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
    left: int = field(init=False)
    """Tokens to generate at most."""
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
        self.left = min(self.max_new_tokens, room)
        self.cache = DynamicCache(config=self.decoder.model.config)
        if self.decoder.draft is not None:
            self.context = self.decoder.draft.new_cache()
            self.cache.activate_past_recording()  # lets sliding-window layers take tokens back

    def rounds(self) -> Iterator[Round]:
        """Yield the prefill, then one round after another until the response ends."""
        yield self.prefill()
        while self.left > 0:
            yield self._round()

    @torch.inference_mode()
    def prefill(self) -> Round:
        """Run the prompt, which brings the first token."""
        began = time.perf_counter()
        ids_BS = torch.tensor([list(self.prompt_ids)], device=self.decoder.model.device)
        logits_BLV, self.features_BSF = self.decoder.forward(ids_BS, self.cache, logits_to_keep=1)
        if self.decoder.draft is not None:
            if not self.cache.is_croppable:
                raise ModelError("this target keeps a recurrent state and cannot take back rejected tokens")
            self.cache.crop(0)
        self.start = ids_BS.shape[1]
        (self.newest,) = verify(None, logits_BLV[0, -1:], self.sampling).tokens
        self.left = 0 if self.newest in self.stop_ids else self.left - 1
        return Round((self.newest,), RoundCounts(1, 0, 0), time.perf_counter() - began, is_prefill=True)

    def request(self) -> BlockRequest | None:
        """Ask for draft tokens, as many as fit the target's positions; None if there is no draft or no room."""
        room = self.decoder.limit - self.start
        if self.decoder.draft is None or room == 1:
            return None
        assert self.features_BSF is not None
        return BlockRequest(
            self.newest,
            min(self.decoder.block_size, room) - 1,
            self.features_BSF,
            self.start,
            self.context,
            None if self.sampling is None else self.sampling.sampling,
        )

    def accept(self, proposal: Proposal | None, logits_LV: Tensor, features_LF: Tensor | None) -> Round:
        """Verify draft tokens by the target's pass over them, and go on to the newest token; `seconds` is 0.

        Shapes: a row for the token before the draft tokens, and one for each of them.
        """
        verified = verify(proposal, logits_LV, self.sampling)
        tokens, chances, drafted = verified.tokens, verified.chances, len(logits_LV) - 1
        accepted = len(tokens) - 1
        if features_LF is not None:
            self.features_BSF = features_LF[None, : accepted + 1]
        self.start, self.newest = self.start + accepted + 1, tokens[-1]
        ends = next((index for index, token in enumerate(tokens, 1) if token in self.stop_ids), None)
        if ends is not None:
            tokens, chances, accepted = tokens[:ends], chances[:ends], min(accepted, ends)
        counts = RoundCounts(len(tokens), accepted, drafted)
        tokens = tokens[: self.left]
        self.left = 0 if ends is not None else self.left - len(tokens)
        return Round(tokens, counts, 0.0, chances=chances)

    @torch.inference_mode()
    def _round(self) -> Round:
        began, before = time.perf_counter(), self.start
        (proposal,) = self.decoder.propose([self.request()])
        ids_BL = block_ids(self.newest, proposal, self.decoder.model.device)
        logits_BLV, features_BLF = self.decoder.forward(ids_BL, self.cache)
        found = self.accept(proposal, logits_BLV[0], None if features_BLF is None else features_BLF[0])
        if proposal is not None:
            self.cache.crop(self.start - before - ids_BL.shape[1])
        return replace(found, seconds=time.perf_counter() - began)


def block_ids(newest: int, proposal: Proposal | None, device: torch.device) -> Tensor:
    """Return the tokens of a target step: the newest and the draft's. Shapes: (1, L)."""
    newest_1 = torch.tensor([newest], device=device)
    return (newest_1 if proposal is None else torch.cat([newest_1, proposal.ids_P]))[None]
