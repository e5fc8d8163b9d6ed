"""The rounds of greedy speculative decoding, without decoding: on text that the target has generated greedily.

A round that begins at position s depends on the text alone: the draft sees the target's features before s and the token
at s, and accepted are its leading tokens that equal the text. So rounds of many texts are drafted in one pass, and so
are several rounds of one text: one walk begins at the response's first token, others further on. Two walks that meet at
a position are the same from there on, so that the first finds most of its rounds drafted.

In float32 the rounds equal those of decoding. In bfloat16 a pass over many tokens rounds otherwise than a step, and a
few of the draft's choices differ.

Shape suffixes: B texts, N blocks of a text, L slots of a block, P = L - 1 draft tokens, S positions, F tapped features,
D hidden, M blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllm.decoding.acceptance import RoundCounts
from dllm.models.drafts.proposal import most_probable
from dllm.models.drafts.protocol import Draft, TargetIO
from dllm.models.taps import compute

TOKENS_AT_ONCE, TOKENS_A_PASS = 16_384, 2048
"""Most tokens of texts that are walked together, padding counted; and of a pass of the target over them."""
BLOCKS_AT_ONCE = 128
"""Blocks that a pass drafts, about: fewer leave the matrix units idle, more walks of one text draft more in vain."""
STRETCH = 4
"""Fewest blocks between the places where two walks of a text begin: shorter ones end before they meet."""
LOGITS_AT_ONCE = 1 << 26
"""Most logits that exist at one time."""


@dataclass(frozen=True)
class GreedyText:
    """A prompt with the response that the target generated greedily."""

    ids: Sequence[int]
    prompt_length: int
    stopped: bool
    """Whether the last id is a stop id, after which nothing follows."""
    limit: int | None = None
    """Response tokens at which decoding ends, `max_new_tokens`: those after it are only compared with draft tokens.
    None: the end of the text."""


@dataclass(frozen=True)
class Walked:
    """What was found on one text."""

    index: int
    """Which of the texts."""
    rounds: list[RoundCounts]
    greedy_tokens: int
    """Response tokens to which the target gives the highest logit after the text before them, all in one pass. In
    float32 they are all, or another model wrote the text."""


def walk(
    model: PreTrainedModel,
    draft: Draft,
    texts: Sequence[GreedyText],
    *,
    block_size: int = 0,
    max_positions: int | None = None,
) -> Iterator[Walked]:
    """Run the target once over each text, and count the rounds that decoding with a draft would take, text by text.

    Args:
        model: the target, in evaluation mode.
        draft: in evaluation mode, in the target's dtype.
        texts: they come back in another order.
        block_size, max_positions: as `Walker` has them.
    """
    target = TargetIO.of(model)
    walker = Walker(draft, target, block_size, max_positions)
    for batch in _batches([len(text.ids) for text in texts], TOKENS_AT_ONCE):
        features: list[Tensor] = []
        greedy: list[int] = []
        for part in _batches([len(texts[index].ids) for index in batch], TOKENS_A_PASS):
            members = [texts[batch[index]] for index in part]
            known = compute(model, draft.config.target_layer_ids, [text.ids for text in members], with_last=True)
            width = draft.config.hidden_size
            features += [known_SX[:, :-width] for known_SX in known]
            greedy += _count_greedy(target, members, [known_SX[:, -width:] for known_SX in known])
        rounds = walker.rounds([texts[index] for index in batch], features)
        yield from (Walked(*found) for found in zip(batch, rounds, greedy, strict=True))


class Walker:
    """Counts the rounds that decoding with a draft would take.

    Args:
        draft: in evaluation mode, in the dtype of the features.
        target: embeds tokens and maps hidden states to logits, in the same dtype.
        block_size: slots per round; 0 takes the draft's.
        max_positions: the target's, at which decoding cuts the last blocks; None has no limit.
        blocks_at_once: blocks that a pass drafts, about; None takes BLOCKS_AT_ONCE.
    """

    def __init__(
        self,
        draft: Draft,
        target: TargetIO,
        block_size: int = 0,
        max_positions: int | None = None,
        blocks_at_once: int | None = None,
    ) -> None:
        self.draft, self.target, self.max_positions = draft, target, max_positions
        self.block_size = block_size or draft.config.block_size
        self.blocks_at_once = blocks_at_once or BLOCKS_AT_ONCE

    @torch.inference_mode()
    def rounds(self, texts: Sequence[GreedyText], features: Sequence[Tensor]) -> list[list[RoundCounts]]:
        """Return the rounds of each text, its prefill left out.

        The last round of a response that no stop id ended may reach past the text that is known. It is left out unless
        it is certain, as it is where the text goes on for `block_size - 2` tokens after its limit.

        Args:
            texts: of similar lengths, as they are padded to the longest.
            features: of every text, at its positions up to the last token but one at least. Shapes: (S, F) each.
        """
        walks = [self._walk(text, len(texts)) for text in texts]
        context = self.draft.read_context(torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True))
        rows = list(range(len(walks)))
        while rows:
            self._draft([walks[row] for row in rows], context)
            going = [index for index, row in enumerate(rows) if walks[row].advance()]
            # The others run along as empty blocks until they are half.
            if 2 * len(going) <= len(rows):
                context, rows = _take(context, going), [rows[index] for index in going]
        return [walk.result() for walk in walks]

    def _walk(self, text: GreedyText, texts: int) -> _Walk:
        bound = len(text.ids) - 1
        if text.limit is not None:
            bound = min(bound, text.prompt_length + text.limit - 1)
        room = (bound - text.prompt_length) // (STRETCH * self.block_size)
        count = max(1, min(self.blocks_at_once // texts, room))
        return _Walk(text, bound, count)

    def _draft(self, walks: Sequence[_Walk], context: Any) -> None:
        """Draft the blocks at which walks stand. Those cut at the target's last position take passes of their own."""
        places: dict[int, list[list[int]]] = {}
        for row, walk in enumerate(walks):
            for start in walk.starts():
                slots = min(self.block_size, (self.max_positions or len(walk.text.ids) + self.block_size) - start)
                places.setdefault(slots, [[] for _ in walks])[row].append(start)
        for slots, starts in places.items():
            found = self._tokens(walks, starts, slots, context)
            for walk, each in zip(walks, starts, strict=True):
                for start in each:
                    walk.settle(start, next(found))

    def _tokens(self, walks: Sequence[_Walk], starts: list[list[int]], slots: int, context: Any) -> Any:
        """Yield the draft tokens of each block."""
        device = next(self.target.head.parameters()).device
        width = max(map(len, starts))
        shape = (len(starts), width)
        anchor_BN, keep_BN = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        ids_BNL = torch.full((*shape, slots), self.draft.config.mask_token_id)
        for row, (walk, each) in enumerate(zip(walks, starts, strict=True)):
            anchor_BN[row, : len(each)] = torch.tensor(each, dtype=torch.int64)
            keep_BN[row, : len(each)] = True
            ids_BNL[row, : len(each), 0] = torch.tensor([walk.text.ids[start] for start in each], dtype=torch.int64)
        ids_BNL, anchor_BN, keep_BN = ids_BNL.to(device), anchor_BN.to(device), keep_BN.to(device)
        hidden_BNPD = self.draft.forward_blocks(self.target.embed(ids_BNL), context, anchor_BN, keep_BN)
        hidden_MPD, anchor_ids_M = hidden_BNPD[keep_BN][:, : slots - 1], ids_BNL[..., 0][keep_BN]
        size = max(1, LOGITS_AT_ONCE // ((slots - 1) * self.draft.config.vocab_size))
        parts = zip(hidden_MPD.split(size), anchor_ids_M.split(size), strict=True)
        return iter(torch.cat([self.draft.greedy_tokens(*part, self.target) for part in parts]).tolist())


class _Walk:
    """The rounds of one text that are known, and the positions at which its walks stand."""

    def __init__(self, text: GreedyText, bound: int, count: int) -> None:
        self.text, self.bound = text, bound
        self.known: dict[int, RoundCounts | None] = {}
        """Rounds by their first position; None for one that the text does not determine."""
        first, length = text.prompt_length, bound - text.prompt_length
        self.begins = [first + length * index // count for index in range(count)]
        self.at = [(index, begin) for index, begin in enumerate(self.begins) if begin < bound]

    def starts(self) -> list[int]:
        """Return the positions whose rounds are to be drafted now, in order."""
        return sorted({position for _, position in self.at})

    def settle(self, start: int, drafted: Sequence[int]) -> None:
        """Count the round that begins at `start` with these draft tokens."""
        truth = self.text.ids[start + 1 : start + 1 + len(drafted)]
        accepted = 0
        while accepted < len(truth) and drafted[accepted] == truth[accepted]:
            accepted += 1
        at_end = start + accepted == len(self.text.ids) - 1
        if at_end and not self.text.stopped and accepted < len(drafted):
            self.known[start] = None  # the text ends here, and the next draft token may be right
        else:  # a stop id ends the round without a bonus token
            self.known[start] = RoundCounts(accepted + (not (at_end and self.text.stopped)), accepted, len(drafted))

    def advance(self) -> bool:
        """Move every walk behind its round; return whether any is left.

        A walk ends where it meets another, or after the stretch of the one ahead; the first one follows known rounds.
        """
        ahead = []
        for index, position in self.at:
            place: int | None = self._next(position)
            while index == 0 and place in self.known:
                place = self._next(place)
            end = self.begins[index + 2] if index and index + 2 < len(self.begins) else self.bound
            if place is not None and place < end and place not in self.known:
                ahead.append((index, place))
        self.at = ahead
        return bool(ahead)

    def result(self) -> list[RoundCounts]:
        """Return the rounds from the response's first token on."""
        rounds, position = list[RoundCounts](), self.text.prompt_length
        while position < self.bound and (counts := self.known[position]) is not None:
            rounds.append(counts)
            position += counts.num_emitted
        return rounds

    def _next(self, position: int) -> int | None:
        counts = self.known[position]
        return None if counts is None else position + counts.num_emitted


def _take(context: Any, rows: Sequence[int]) -> Any:
    if isinstance(context, Tensor):
        return context[list(rows)]
    return type(context)(_take(part, rows) for part in context)


@torch.inference_mode()
def _count_greedy(target: TargetIO, texts: Sequence[GreedyText], last: Sequence[Tensor]) -> list[int]:
    """Count the response tokens that are the target's argmax. Shapes: last, what it feeds its head, (S, D) each."""
    counts = []
    for text, last_SD in zip(texts, last, strict=True):
        response = torch.tensor(text.ids[text.prompt_length :], device=last_SD.device)
        size = max(1, LOGITS_AT_ONCE // target.head(last_SD[:0]).shape[-1])
        parts = zip(last_SD[text.prompt_length - 1 : -1].split(size), response.split(size), strict=True)
        counts.append(sum(int((most_probable(target.head(last)) == ids).sum()) for last, ids in parts))
    return counts


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield indices from the longest to the shortest, in batches of at most `tokens` when padded, one at least."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
