"""What `generate` gains from a draft: tokens per second with it and without, one prompt at a time and in batches.

    python benchmarks/generate.py --checkpoint out/train [--prompts 8] [--new-tokens 64] [--rounds 3]
        [--batch 1 4 8] [--temperature 0 1] [--cpu]

On the project's held-out prompts. The two arms take turns; a rate is the median over rounds of all tokens over all
seconds, prefill included, and the ratio is of pairs. `--cpu` measures processor time on one thread, where other work
disturbs the wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dllm.decoding.acceptance import Acceptance
from dllm.decoding.sampling import samplings
from dllm.decoding.settings import SampledSettings
from dllm.decoding.speculative import Decoder
from dllm.decoding.together import decode_together
from dllm.models import checkpoints, targets
from dllm.models.drafts.checkpoint import load_draft
from dllm.prompts import template as chat
from dllm.prompts.table import HELDOUT, read_prompts


def timed(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    stop_ids: set[int],
    settings: SampledSettings,
    batch: int,
    clock: Callable[[], float],
) -> tuple[float, float | None]:
    """Decode all prompts. Units: tokens per second, and tokens per round."""
    acceptance, tokens, began = Acceptance(decoder.block_size), 0, clock()
    for _, response in decode_together(
        decoder,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch,
        stop_ids=stop_ids,
        samplings=samplings(prompts, settings),
    ):
        tokens += len(response.token_ids)
        acceptance.add(each.counts for each in response.rounds)
    return tokens / (clock() - began), acceptance.tau_micro


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="out/train")
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu else time.perf_counter
    path = checkpoints.find(args.checkpoint, args.root.resolve())
    target = checkpoints.target_of(path, args.root.resolve())
    model, tokenizer = targets.load_target(target), targets.load_tokenizer(target)
    stop_ids = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
    table = read_prompts(args.root / "out" / "prepare", HELDOUT)
    prompts = [
        chat.prompt_ids(tokenizer, prompt.messages, target.enable_thinking, tools=prompt.tools)
        for prompt, _ in zip(table, range(args.prompts), strict=False)
    ]
    ar, dflash = Decoder(model), Decoder(model, load_draft(path, model.config))
    print(f"{len(prompts)} held-out prompts, {args.new_tokens} new tokens, {torch.get_num_threads()} threads")
    rows: list[dict[str, Any]] = []
    with dflash.packed():
        for decoder in (ar, dflash):
            timed(decoder, prompts[:1], stop_ids, SampledSettings(max_new_tokens=8), 1, clock)  # warms up
        for temperature in args.temperature:
            settings = SampledSettings(max_new_tokens=args.new_tokens, temperature=temperature)
            for batch in args.batch:
                runs: dict[Decoder, list[tuple[float, float | None]]] = {ar: [], dflash: []}
                for turn in range(args.rounds):
                    for decoder in (ar, dflash) if turn % 2 else (dflash, ar):
                        runs[decoder].append(timed(decoder, prompts, stop_ids, settings, batch, clock))
                ratios = [b / a for (a, _), (b, _) in zip(runs[ar], runs[dflash], strict=True)]
                rows.append(
                    {
                        "temperature": temperature,
                        "batch": batch,
                        "ar": statistics.median(rate for rate, _ in runs[ar]),
                        "dflash": statistics.median(rate for rate, _ in runs[dflash]),
                        "ratio": statistics.median(ratios),
                        "ratio_min": min(ratios),
                        "ratio_max": max(ratios),
                        "tau": runs[dflash][0][1],
                    }
                )
                print(
                    "temperature {temperature:g}, batch {batch:2}: {ar:6.1f} tokens/s without, {dflash:6.1f} with the "
                    "draft: {ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f}), tau {tau:.2f}".format(**rows[-1]),
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
