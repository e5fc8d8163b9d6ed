"""The in-process engine: batched decoding of many prompts with a static cache and continuous refill.

A fixed number of slots decode together; a slot whose row has finished takes the next prompt. Keys and values are
written in place, so nothing is copied as answers grow, and query heads read their shared keys without repeating them.

Shape suffixes: B slots, S prompt, T cache places, V vocabulary, H query heads, G key/value heads, R = H / G,
E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import ModelError
from dllm.models.packing import packed_linears
from dllm.serving.engine import Answer, Request
from dllm.serving.sampling import pick

ATTENTION = "dllm_slots"
REFILL = 16
"""Free slots that are filled in one go: a prompt alone would waste the matrix units."""


class SlotCache:
    """Keys and values of every slot, written in place; has what transformers' decoders ask of a cache."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.shape: tuple[int, int] = (0, 0)
        self.slots = torch.empty(0, dtype=torch.int64)
        self.places = torch.empty(0, dtype=torch.int64)
        self.is_prefill = False
        self.seen = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those the queries may read. Shapes: (B, G, S, E)."""
        if not len(self.keys[layer]):
            slots, places = self.shape
            self.keys[layer] = key.new_zeros(slots, key.shape[1], places, key.shape[3])
            self.values[layer] = value.new_zeros(slots, value.shape[1], places, value.shape[3])
        if self.is_prefill:
            self.keys[layer][self.slots, :, : key.shape[2]] = key
            self.values[layer][self.slots, :, : value.shape[2]] = value
            return key, value
        self.keys[layer][self.slots, :, self.places] = key[:, :, 0]
        self.values[layer][self.slots, :, self.places] = value[:, :, 0]
        return self.keys[layer][:, :, : self.seen], self.values[layer][:, :, : self.seen]

    def keep(self, slots: Tensor) -> None:
        """Drop all other slots."""
        self.keys = [key[slots] for key in self.keys]
        self.values = [value[slots] for value in self.values]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    if query.shape[2] > 1 or mask is None:  # prefill: right padding lies behind every real token
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None
    # One token a slot: the R query heads that share a key head become the query's length.
    batch, heads, size = query.shape[0], query.shape[1], query.shape[3]
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(batch, 1, heads, size), None


@contextmanager
def _slot_attention(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class LocalEngine:
    """Answer requests with a transformers causal model in this process.

    Args:
        model: the target, in evaluation mode.
        tokenizer: its tokenizer, for the answers' text.
        stop_ids: tokens that end an answer (kept as its last).
        batch_size: slots decoded together.

    Raises:
        ModelError: the model's attention is not plain and full, which the static cache needs.
    """

    def __init__(self, model: Any, tokenizer: Any, stop_ids: set[int], batch_size: int) -> None:
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "final_logit_softcapping", None):
            raise ModelError(
                f"the local engine decodes full attention only, this target has {sorted(kinds)}",
                where="regenerate.engine",
                hint="serve the target and use engine: openai",
            )
        self.model, self.tokenizer, self.stop_ids, self.batch_size = model, tokenizer, stop_ids, batch_size

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield answers as they finish. Neighbours have similar lengths: longest prompts go first."""
        queue = sorted(requests, key=lambda r: (len(r.prompt_ids), r.key))
        if not queue:
            return
        places = max(len(r.prompt_ids) + r.max_new_tokens for r in queue)
        with _slot_attention(self.model), packed_linears(self.model):
            yield from _Decoding(self, queue, places).run()


class _Decoding:
    """The state of one call of `answer`: who sits in which slot, and how far each is."""

    def __init__(self, engine: LocalEngine, queue: list[Request], places: int) -> None:
        self.engine, self.queue = engine, queue
        self.decoder = engine.model.get_decoder()
        self.head = engine.model.get_output_embeddings()
        slots = min(engine.batch_size, len(queue))
        self.rows: list[Request | None] = [None] * slots
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.generators: list[torch.Generator] = [torch.Generator() for _ in range(slots)]
        self.length_B = torch.zeros(slots, dtype=torch.int64)
        self.cache = SlotCache(engine.model.config.num_hidden_layers)
        self.cache.shape = (slots, places)

    def run(self) -> Iterator[Answer]:
        while self.queue or any(self.rows):
            free = [slot for slot, row in enumerate(self.rows) if row is None]
            if self.queue and len(free) >= min(REFILL, len(self.queue), len(self.rows)):
                yield from self._prefill(free[:REFILL])
                continue
            if not self.queue and len(free) * 2 > len(self.rows):
                self._shrink()
            yield from self._step()

    def _prefill(self, slots: list[int]) -> Iterator[Answer]:
        new = [self.queue.pop() for _ in slots[: len(self.queue)]]
        slots = slots[: len(new)]
        width = max(len(r.prompt_ids) for r in new)
        ids_BS = torch.zeros(len(new), width, dtype=torch.int64)
        for index, request in enumerate(new):
            ids_BS[index, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
            self.rows[slots[index]], self.tokens[slots[index]] = request, []
            self.generators[slots[index]].manual_seed(request.seed)
            self.length_B[slots[index]] = len(request.prompt_ids)
        device = self.engine.model.device
        self.cache.is_prefill, self.cache.slots = True, torch.tensor(slots, device=device)
        hidden_BSD = self._decode(ids_BS, torch.arange(width).expand(len(new), -1), None)
        last_B = self.length_B[slots] - 1
        yield from self._commit(slots, self.head(hidden_BSD[torch.arange(len(new)), last_B]))

    def _step(self) -> Iterator[Answer]:
        last_B1 = torch.tensor([[tokens[-1] if tokens else 0] for tokens in self.tokens])
        seen = int(self.length_B.max()) + 1
        hidden_BT = torch.arange(seen) > self.length_B[:, None]
        device = self.engine.model.device
        mask_B11T = torch.zeros(hidden_BT.shape).masked_fill(hidden_BT, float("-inf"))[:, None, None]
        mask_B11T = mask_B11T.to(device, self.engine.model.dtype)
        self.cache.is_prefill, self.cache.seen = False, seen
        self.cache.slots, self.cache.places = torch.arange(len(self.rows), device=device), self.length_B.to(device)
        hidden_B1D = self._decode(last_B1, self.length_B[:, None], mask_B11T)
        self.length_B += 1
        yield from self._commit(list(range(len(self.rows))), self.head(hidden_B1D[:, 0]))

    def _decode(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        device = self.engine.model.device
        return self.decoder(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _commit(self, slots: list[int], logits_BV: Tensor) -> Iterator[Answer]:
        """Add each slot's next token, and give up the slots whose row has ended."""
        rows = [self.rows[slot] for slot in slots]
        picked = pick(logits_BV, rows, [self.generators[slot] for slot in slots])
        for slot, row, token in zip(slots, rows, picked, strict=True):
            if row is None:
                continue
            tokens = self.tokens[slot]
            tokens.append(token)
            stopped = token in self.engine.stop_ids
            if stopped or len(tokens) == row.max_new_tokens:
                text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True)
                yield Answer(row.key, tuple(tokens), text, "stop" if stopped else "length")
                self.rows[slot], self.tokens[slot], self.length_B[slot] = None, [], 0

    def _shrink(self) -> None:
        """Drop the empty slots once no prompt waits for them."""
        busy = [slot for slot, row in enumerate(self.rows) if row is not None]
        self.cache.keep(torch.tensor(busy, device=self.engine.model.device))
        self.rows = [self.rows[slot] for slot in busy]
        self.tokens = [self.tokens[slot] for slot in busy]
        self.generators = [self.generators[slot] for slot in busy]
        self.length_B = self.length_B[busy]
