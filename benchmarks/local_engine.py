"""`regenerate` in process against transformers' `generate` on left-padded batches of 16, over the same prompts.

Same model, same process, bfloat16, greedy, in turn. Prints tokens per second of both, their ratio, and the number of
prompts with the same ids; in float32, where rounding does not change an argmax, the ids must be the same for all.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dllm.config.params import Prepare, Source, Target
from dllm.engines.engine import Request, RequestList, Response
from dllm.engines.local import LocalEngine
from dllm.models import targets
from dllm.prompts import template as chat
from dllm.prompts.stream import collect

TARGET = Target(model="builtin:smollm2-135m-instruct")
PROMPTS, NEW_TOKENS, BATCH, SLOTS, ROUNDS = 256, 64, 16, 128, 3
CHECKED = 32
"""Prompts decoded in float32 as well."""

Ids = dict[str, tuple[int, ...]]


def ours(model: Any, tokenizer: Any, stops: set[int], requests: Sequence[Request]) -> Ids:
    """Decode with continuous refill."""
    engine = LocalEngine(model, tokenizer, stops, SLOTS)
    return {a.key: a.token_ids for a in engine.answer(RequestList(requests)) if isinstance(a, Response)}


def theirs(model: Any, tokenizer: Any, stops: set[int], requests: Sequence[Request]) -> Ids:
    """Decode with `generate`, prompts of similar length in a batch."""
    found: Ids = {}
    queue = sorted(requests, key=lambda request: len(request.prompt_ids))
    for begin in range(0, len(queue), BATCH):
        batch = queue[begin : begin + BATCH]
        width = max(len(request.prompt_ids) for request in batch)
        ids_BS = torch.zeros(len(batch), width, dtype=torch.int64)
        mask_BS = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, request in enumerate(batch):
            ids_BS[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_BS[row, width - len(request.prompt_ids) :] = 1
        with torch.inference_mode():
            out_BS = model.generate(
                ids_BS,
                attention_mask=mask_BS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=sorted(stops),
                pad_token_id=0,
            )
        for request, ids in zip(batch, out_BS[:, width:].tolist(), strict=True):
            end = next((place + 1 for place, id in enumerate(ids) if id in stops), len(ids))
            found[request.key] = tuple(ids[:end])
    return found


def make_requests(tokenizer: Any) -> list[Request]:
    """Make requests of GSM8K questions."""
    sources = [Source(name="gsm8k", limit=PROMPTS)]
    asked, _ = collect(Prepare(sources=sources), Path())
    return [
        Request(p.id, tuple(chat.prompt_ids(tokenizer, p.messages)), p.messages, NEW_TOKENS, 0.0, 1.0, 0) for p in asked
    ]


def timed(decode: Callable[..., Ids], *arguments: Any) -> tuple[Ids, float]:
    """Return the ids and tokens per second."""
    began = time.perf_counter()
    ids = decode(*arguments)
    return ids, sum(map(len, ids.values())) / (time.perf_counter() - began)


def main() -> int:
    tokenizer = targets.load_tokenizer(TARGET)
    requests = make_requests(tokenizer)
    model = targets.load_target(TARGET)
    stops = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
    rates: dict[str, list[float]] = {"dllm": [], "generate": []}
    for turn in range(ROUNDS):
        mine, rate = timed(ours, model, tokenizer, stops, requests)
        rates["dllm"].append(rate)
        other, rate = timed(theirs, model, tokenizer, stops, requests)
        rates["generate"].append(rate)
        print(f"round {turn + 1}: dllm {rates['dllm'][-1]:.0f} tokens/s, generate {rate:.0f}", flush=True)
    ratios = [a / b for a, b in zip(rates["dllm"], rates["generate"], strict=True)]
    same = sum(mine[key] == other[key] for key in mine)
    exact = targets.load_target(TARGET, dtype="float32")
    checked = requests[:CHECKED]
    equal = ours(exact, tokenizer, stops, checked) == theirs(exact, tokenizer, stops, checked)
    print(f"{len(requests)} prompts, {NEW_TOKENS} new tokens, {torch.get_num_threads()} threads")
    print(f"dllm      {statistics.median(rates['dllm']):7.0f} tokens/s  ({SLOTS} slots)")
    print(f"generate  {statistics.median(rates['generate']):7.0f} tokens/s  (batches of {BATCH})")
    print(f"ratio     {statistics.median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"same ids: bfloat16 {same} of {len(requests)}; float32 {'all' if equal else 'NOT ALL'} of {CHECKED}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
