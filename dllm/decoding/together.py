"""Several prompts decoded in one batch, each as alone: the same ids in float32, and the same random numbers.

The rows of a target step are the blocks of several responses, each at its own positions. A response that ends makes
room for the next prompt. Prompts are run one at a time, as they are alone.

Shape suffixes: B rows, L slots of a block, T cache positions, F tapped features, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dllm.decoding.sampling import TargetSampling
from dllm.decoding.speculative import Decoder, Decoding, Generation, Round, block_ids
from dllm.models.slots import SlotCache


def decode_together(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Collection[int] = (),
    samplings: Sequence[TargetSampling | None] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Decode prompts, `batch_size` at a time; yield each response with its prompt's index, as it ends.

    Targets with other than full attention are decoded one prompt at a time. The seconds of a round are those of all of
    its rows together.

    Raises:
        DataError: a prompt is empty or leaves no position for a response.
    """
    drawn = [None] * len(prompts) if samplings is None else samplings
    waiting = [
        _Row(index, Decoding(decoder, ids, max_new_tokens, stop_ids, sampling))
        for index, (ids, sampling) in enumerate(zip(prompts, drawn, strict=True))
    ]
    if batch_size > 1 and can_batch(decoder.model):
        yield from _Batch(decoder, waiting, batch_size).run()
        return
    for row in waiting:
        row.rounds = list(row.decoding.rounds())
        yield row.index, row.generation()


def can_batch(model: PreTrainedModel) -> bool:
    """Tell whether all layers of a target have full attention, of a kind that takes masks."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers) and model.config._attn_implementation in (
        "sdpa",
        "eager",
    )


@dataclass
class _Row:
    index: int
    decoding: Decoding
    rounds: list[Round] = field(default_factory=list)

    def generation(self) -> Generation:
        """Return the finished response, and free what decoding kept: all rows of a call live until its end."""
        self.decoding.cache, self.decoding.context, self.decoding.features_BSF = DynamicCache(), None, None
        return Generation.of(self.rounds[0], self.rounds[1:], self.decoding.stop_ids)


class _Batch:
    """The rows that decode together, each in its slot of the cache, and the prompts that wait."""

    def __init__(self, decoder: Decoder, waiting: Sequence[_Row], batch_size: int) -> None:
        self.decoder, self.waiting, self.batch_size = decoder, list(reversed(waiting)), batch_size
        self.rows: list[_Row] = []
        self.cache = SlotCache(decoder.model.config.get_text_config().num_hidden_layers, 0)

    @torch.inference_mode()
    def run(self) -> Iterator[tuple[int, Generation]]:
        while self.waiting or self.rows:
            if len(self.rows) < self.batch_size:
                yield from self._fill()
            if self.rows:
                self._round()
            yield from self._end()

    def _fill(self) -> Iterator[tuple[int, Generation]]:
        """Run waiting prompts, and give each a slot; yield the responses that end at once."""
        new: list[_Row] = []
        while self.waiting and len(self.rows) + len(new) < self.batch_size:
            row = self.waiting.pop()
            row.rounds = [row.decoding.prefill()]
            if row.decoding.left > 0:
                new.append(row)
            else:
                yield row.index, row.generation()
        self.rows += new
        self.cache.widen(len(self.rows))
        for slot, row in enumerate(new, len(self.rows) - len(new)):
            self.cache.reserve(row.decoding.start + row.decoding.left + self.decoder.block_size)
            self.cache.load(slot, row.decoding.cache)
            row.decoding.cache = DynamicCache()  # frees the memory

    def _round(self) -> None:
        """Draft a block per row, and verify them in one target step."""
        began = time.perf_counter()
        device = self.decoder.model.device
        proposals = self.decoder.propose([row.decoding.request() for row in self.rows])
        blocks = [
            block_ids(row.decoding.newest, proposal, device)[0]
            for row, proposal in zip(self.rows, proposals, strict=True)
        ]
        ids_BL = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)
        start_B = torch.tensor([row.decoding.start for row in self.rows])
        logits_BLV, features_BLF = self._forward(ids_BL, start_B[:, None] + torch.arange(ids_BL.shape[1]))
        found = [
            row.decoding.accept(proposal, logits_LV[: len(ids)], None if features_BLF is None else features_BLF[number])
            for number, (row, proposal, ids, logits_LV) in enumerate(
                zip(self.rows, proposals, blocks, logits_BLV, strict=True)
            )
        ]
        seconds = time.perf_counter() - began
        for row, each in zip(self.rows, found, strict=True):
            row.rounds.append(replace(each, seconds=seconds))

    def _forward(self, ids_BL: Tensor, position_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.decoder.model
        unseen_BLT = self.cache.decode(position_BL, model.device)
        mask_B1LT = torch.zeros(unseen_BLT.shape).masked_fill(unseen_BLT, float("-inf"))[:, None]
        return self.decoder.forward(
            ids_BL,
            self.cache,
            # A padded slot may lie past the last position; nothing reads it.
            position_ids=position_BL.clamp_max(self.decoder.limit - 1).to(model.device),
            attention_mask=mask_B1LT.to(model.device, model.dtype),
        )

    def _end(self) -> Iterator[tuple[int, Generation]]:
        """Yield the responses that have ended, and free their slots."""
        left = [slot for slot, row in enumerate(self.rows) if row.decoding.left > 0]
        if len(left) == len(self.rows):
            return
        ended = [row for row in self.rows if row.decoding.left == 0]
        self.cache.keep(left)
        self.rows = [self.rows[slot] for slot in left]
        for row in ended:
            yield row.index, row.generation()
