"""The in-process engine: batched decoding of many prompts with a static cache and continuous refill.

A fixed number of slots decode together; a slot whose row has finished takes the next prompt. In bfloat16 on a CPU a
row's products have the same bits whatever its neighbours. torch's attention has them on one thread; on several it
rounds differently now and then with the thread a row falls to, and so an answer may part from itself (1 of 42 seen).

Shape suffixes: B slots, S tokens of several prompts end to end, T cache places, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dllm.engines.engine import EngineStats, Request, RequestSource, Response
from dllm.engines.sampling import pick
from dllm.engines.slots import SlotCache, slot_attention
from dllm.errors import ModelError
from dllm.models.packing import packed_linears

REFILL = 16
"""Free slots that are filled in one go: a prompt alone would waste the matrix units."""
LOOK_AHEAD = 16
"""Requests held for each slot, so that rows of like length decode together."""
TICK_S = 1.0


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
        self.pace = EngineStats()

    def describe(self) -> dict[str, Any]:
        """Say that the model runs here, with what."""
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"engine": "local", "batch_size": self.batch_size, "versions": versions}

    @torch.inference_mode()
    def answer(self, feed: RequestSource) -> Iterator[Response | None]:
        """Yield answers as they finish, and None about once a second meanwhile.

        Rows of similar length decode side by side: of the requests at hand the longest prompts go first.
        """
        with slot_attention(self.model), packed_linears(self.model):
            yield from _Decoding(self, feed).run()


class _Decoding:
    """The state of one call of `answer`: who sits in which slot, and how far each is."""

    def __init__(self, engine: LocalEngine, feed: RequestSource) -> None:
        self.engine, self.feed = engine, feed
        self.decoder = engine.model.get_decoder()
        self.head = engine.model.get_output_embeddings()
        self.device = engine.model.device
        self.queue: list[Request] = []
        self.rows: list[Request | None] = []
        self.tokens: list[list[int]] = []
        self.generators: list[torch.Generator] = []
        self.length_B = torch.zeros(0, dtype=torch.int64)
        self.cache = SlotCache(engine.model.config.num_hidden_layers, 0)
        self.ticked = time.monotonic()

    def run(self) -> Iterator[Response | None]:
        while self._look_ahead() or any(self.rows):
            self._widen()
            free = [slot for slot, row in enumerate(self.rows) if row is None]
            if self.queue and len(free) >= min(REFILL, len(self.queue), len(self.rows)):
                yield from self._prefill(free[:REFILL])
            else:
                if not self.queue and len(free) * 2 > len(self.rows):
                    self._shrink(free)
                yield from self._step()
            if time.monotonic() - self.ticked > TICK_S:
                self.ticked = time.monotonic()
                yield None

    def _look_ahead(self) -> bool:
        """Take requests from the feed as far as there is room, and say whether any waits."""
        room = LOOK_AHEAD * self.engine.batch_size - len(self.queue)
        new = 0
        while new < room and (request := self.feed.take()) is not None:
            self.queue.append(request)
            new += 1
        if new:
            self.queue.sort(key=lambda request: (len(request.prompt_ids), request.key))
        return bool(self.queue)

    def _widen(self) -> None:
        """Have as many slots as there is work for."""
        busy = sum(row is not None for row in self.rows)
        slots = min(self.engine.batch_size, busy + len(self.queue))
        more = slots - len(self.rows)
        if more > 0:
            self.rows += [None] * more
            self.tokens += [[] for _ in range(more)]
            self.generators += [torch.Generator() for _ in range(more)]
            self.length_B = torch.cat([self.length_B, torch.zeros(more, dtype=torch.int64)])
            self.cache.widen(slots)

    def _prefill(self, slots: list[int]) -> Iterator[Response]:
        new = [self.queue.pop() for _ in slots[: len(self.queue)]]
        slots = slots[: len(new)]
        self.cache.reserve(max(len(request.prompt_ids) + request.max_new_tokens for request in new))
        ids: list[int] = []
        positions: list[int] = []
        prompts: dict[tuple[int, ...], tuple[list[int], slice]] = {}
        for slot, request in zip(slots, new, strict=True):
            prompt = request.prompt_ids
            if prompt not in prompts:  # samples of one prompt share its prefill
                prompts[prompt] = ([], slice(len(ids), len(ids) + len(prompt)))
                ids.extend(prompt)
                positions.extend(range(len(prompt)))
            prompts[prompt][0].append(slot)
            self.rows[slot], self.tokens[slot] = request, []
            self.generators[slot].manual_seed(request.seed)
            self.length_B[slot] = len(prompt)
        self.cache.prefill(list(prompts.values()))
        parts = [part for _, part in prompts.values()]
        hidden_1SD = self._decode(torch.tensor([ids]), torch.tensor([positions]), None, cu_seq_lens_q=parts)
        last = [prompts[request.prompt_ids][1].stop - 1 for request in new]
        yield from self._commit(slots, self.head(hidden_1SD[0, last]))

    def _step(self) -> Iterator[Response]:
        last_B1 = torch.tensor([[tokens[-1] if tokens else 0] for tokens in self.tokens])
        self.cache.decode(self.length_B, self.device)
        unseen_BT = torch.arange(self.cache.seen) > self.length_B[:, None]
        mask_B11T = torch.zeros(unseen_BT.shape).masked_fill(unseen_BT, float("-inf"))[:, None, None]
        mask_B11T = mask_B11T.to(self.device, self.engine.model.dtype)
        hidden_B1D = self._decode(last_B1, self.length_B[:, None], mask_B11T)
        self.length_B += torch.tensor([row is not None for row in self.rows])
        yield from self._commit(list(range(len(self.rows))), self.head(hidden_B1D[:, 0]))

    def _decode(self, ids: Tensor, positions: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        return self.decoder(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).last_hidden_state

    def _commit(self, slots: list[int], logits_BV: Tensor) -> Iterator[Response]:
        """Add each slot's next token, and give up the slots whose row has ended."""
        rows = [self.rows[slot] for slot in slots]
        picked = pick(logits_BV, rows, [self.generators[slot] for slot in slots])
        pace, finished = self.engine.pace, []
        for slot, row, token in zip(slots, rows, picked, strict=True):
            if row is None:
                continue
            tokens = self.tokens[slot]
            tokens.append(token)
            pace.tokens += 1
            stopped = token in self.engine.stop_ids
            if stopped or len(tokens) == row.max_new_tokens:
                text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True)
                finished.append(Response(row.key, tuple(tokens), text, "stop" if stopped else "length"))
                self.rows[slot], self.tokens[slot], self.length_B[slot] = None, [], 0
        pace.in_flight = sum(row is not None for row in self.rows)
        yield from finished

    def _shrink(self, free: list[int]) -> None:
        """Drop the empty slots once no prompt waits for them."""
        busy = [slot for slot in range(len(self.rows)) if slot not in set(free)]
        self.cache.keep(busy)
        self.rows = [self.rows[slot] for slot in busy]
        self.tokens = [self.tokens[slot] for slot in busy]
        self.generators = [self.generators[slot] for slot in busy]
        self.length_B = self.length_B[busy]
