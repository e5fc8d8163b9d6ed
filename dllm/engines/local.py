"""The in-process engine: batched decoding of many prompts with a static cache and continuous batching.

A fixed number of slots decode together; a slot whose row has finished takes the next prompt. In bfloat16 on a CPU a
row's matrix products have the same bits in any batch. torch's attention does on one thread; on several threads its
rounding sometimes depends on which thread computes a row, so a response may differ between batches (1 of 42 did).

Shape suffixes: B slots, S tokens of several prompts concatenated, T cache positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dllm.config.params import Params, Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import EngineStats, Request, RequestSource, Response, refuse_servers
from dllm.engines.next_token import sample
from dllm.errors import ModelError
from dllm.models import precision, targets
from dllm.models.packing import packed_linears
from dllm.models.slots import SlotCache, slot_attention
from dllm.models.target_config import built_config, check_config, logit_switch
from dllm.prompts import template as chat

REFILL = 16
"""Free slots that are filled by one prefill: a single prompt would leave the matrix units idle."""
LOOK_AHEAD = 16
"""Requests queued per slot, so that rows of similar length decode together."""
TICK_S = 1.0
ENGINE, SERVE = "regenerate.engine", "serve the target and use engine: openai"


class LocalEngine:
    """Generate with a transformers causal model in this process.

    Args:
        model: the target, in evaluation mode.
        tokenizer: its tokenizer, to decode responses.
        stop_ids: tokens that end a response, kept as its last id.
        batch_size: slots that decode together.

    Raises:
        ModelError: the model's attention is not plain full attention, which the static cache requires, or its logits
            are not what its head returns.
    """

    affects = frozenset({"batch_size"})
    ignores = frozenset({"concurrency", "timeout_s", "max_retries"})
    is_external = False
    generates = True

    def __init__(self, model: Any, tokenizer: Any, stop_ids: set[int], batch_size: int) -> None:
        check_attention(model.config, type(model))
        self.model, self.tokenizer, self.stop_ids, self.batch_size = model, tokenizer, stop_ids, batch_size
        self.stats = EngineStats()

    @classmethod
    def check(cls, settings: Regenerate) -> None:
        refuse_servers(settings)

    @classmethod
    def check_target(cls, target: Target) -> None:
        path = targets.locate(target, weights=False)
        check_config(target, path)
        try:
            config = built_config(target, path)
        except ModelError:  # transformers does not know it; whoever loads it says so
            return
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        check_attention(config, known[0] if isinstance(known, tuple) else known)

    @classmethod
    def num_slots(cls, settings: Regenerate) -> int:
        return settings.batch_size

    @classmethod
    @contextmanager
    def open(cls, params: Params, tokenizer: Any, root: Path, servers: Sequence[str] | None = None) -> Iterator[Any]:
        model = targets.load_target(params.target)
        if line := precision.note(params.target.dtype, model.device):
            print(f"regenerate: {line}", file=sys.stderr, flush=True)
        stop_ids = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
        yield cls(model, tokenizer, stop_ids, params.regenerate.batch_size)

    def describe(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        dtype = precision.name_of(self.model.dtype)
        return {"engine": "local", "batch_size": self.batch_size, "dtype": dtype, "versions": versions}

    @torch.inference_mode()
    def answer(self, requests: RequestSource) -> Iterator[Response | None]:
        """Yield responses as they finish, and None about once per second in between.

        Rows of similar length decode together: of the queued requests the longest prompts go first.
        """
        with slot_attention(self.model), packed_linears(self.model):
            yield from _Decoding(self, requests).run()


def check_attention(config: Any, model_class: type[Any] | None) -> None:
    """Check that the static cache and its attention serve all layers of a target, and that its head returns its logits.

    Args:
        config: the target's.
        model_class: the class that builds it; None where its code is not of transformers.

    Raises:
        ModelError: a layer has other than full attention, such as a window or a recurrent state, the model's code
            takes no attention from outside, or its logits are scaled or capped.
    """
    config = config.get_text_config()
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if window and others and not kinds and window >= getattr(config, "max_position_embeddings", 0):
        others = set()
    if kinds or others:
        what = ", ".join(sorted(kinds)) or (f"sliding_window {window}" if window else ", ".join(sorted(others)))
    elif model_class and not (model_class._supports_attention_backend and model_class._supports_sdpa):
        what = f"the attention of {model_class.__name__}"
    elif switch := logit_switch(config, "lm_head_bias"):
        raise ModelError(f"the local engine does not apply {switch}, which this target has", where=ENGINE, hint=SERVE)
    else:
        return
    raise ModelError(f"the local engine supports full attention only; this target has {what}", where=ENGINE, hint=SERVE)


class _Decoding:
    """The state of one call of `answer`: the request in each slot and the tokens generated for it."""

    def __init__(self, engine: LocalEngine, requests: RequestSource) -> None:
        self.engine, self.requests = engine, requests
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
        """Queue requests while there is room, and return whether any is queued."""
        room = LOOK_AHEAD * self.engine.batch_size - len(self.queue)
        new = 0
        while new < room and (request := self.requests.take()) is not None:
            self.queue.append(request)
            new += 1
        if new:
            self.queue.sort(key=lambda request: (len(request.prompt_ids), request.key))
        return bool(self.queue)

    def _widen(self) -> None:
        """Add slots for queued requests, up to `batch_size`."""
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
        unseen_B1T = self.cache.decode(self.length_B[:, None], self.device)
        mask_B11T = torch.zeros(unseen_B1T.shape).masked_fill(unseen_B1T, float("-inf"))[:, None]
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
        """Append each slot's next token, and free the slots whose row has finished."""
        rows = [self.rows[slot] for slot in slots]
        sampled = sample(logits_BV, rows, [self.generators[slot] for slot in slots])
        stats, finished = self.engine.stats, []
        for slot, row, token in zip(slots, rows, sampled, strict=True):
            if row is None:
                continue
            tokens = self.tokens[slot]
            tokens.append(token)
            stats.tokens += 1
            stopped = token in self.engine.stop_ids
            if stopped or len(tokens) == row.max_new_tokens:
                text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True)
                finished.append(Response(row.key, tuple(tokens), text, "stop" if stopped else "length"))
                self.rows[slot], self.tokens[slot], self.length_B[slot] = None, [], 0
        stats.in_flight = sum(row is not None for row in self.rows)
        yield from finished

    def _shrink(self, free: list[int]) -> None:
        """Drop the free slots once no request is queued for them."""
        busy = [slot for slot in range(len(self.rows)) if slot not in set(free)]
        self.cache.keep(busy)
        self.rows = [self.rows[slot] for slot in busy]
        self.tokens = [self.tokens[slot] for slot in busy]
        self.generators = [self.generators[slot] for slot in busy]
        self.length_B = self.length_B[busy]
