"""Cached threshold decoding against LLaDA's default, one token per pass over the whole canvas, on pages of numbers.

    python benchmarks/diffusion_decoding.py --checkpoint DIR [--prompts 24] [--rounds 3] [--batches 1 8] [--json FILE]

One trained `tiny-mdlm` checkpoint, its recipe's held-out pages, 256 new tokens, greedy, both ways through the same
loop. For each batch size the cache, the block and the threshold are chosen on pages of their own: the fastest that
loses no more than half a point of them there. Then, on other pages, both ways in turn, each round on its own share
of them: tokens per second up to the end token and their ratio, round by round; tokens per pass and the share that
is right, over all rounds. Exit status 1 if the plain way gets over a point more of the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.decoding.settings import CacheKind, Settings
from dllm.methods.diffusion.responses import Generated, figures, generate_responses
from dllm.models.diffusion.families import load_checkpoint
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.prompts.stream import collect
from dllm.prompts.table import HELDOUT
from dllm.prompts.template import prompt_ids
from dllm.responses.shards import Row

RECIPE, SAMPLER, NEW_TOKENS, POINT = "tiny-mdlm", "llada", 256, 0.01
PLAIN = Settings(max_new_tokens=NEW_TOKENS)
CACHES: tuple[CacheKind, ...] = ("dual", "prefix")
BLOCKS, THRESHOLDS = (32, 64, 256), (0.5, 0.7, 0.9, 0.95)


def heldout_rows(model: DiffusionLM) -> list[Row]:
    """Return the recipe's held-out pages, in order of id."""
    asked = parse_params(yaml.safe_load(recipe_book.text(RECIPE))).prepare
    found = []
    for prompt in collect(asked, Path())[0]:
        if prompt.split == HELDOUT:
            ids = prompt_ids(model.tokenizer, prompt.messages)
            answer = {"role": "assistant", "content": prompt.given}
            found.append(Row(prompt.id, 0, RECIPE, HELDOUT, [*prompt.messages, answer], ids, [], "stop", 0))
    return found


def measure(model: DiffusionLM, rows: Sequence[Row], way: Settings, batch: int) -> dict[str, Any]:
    """Write the rows' answers; return what `answering.figures` makes of them."""
    return figures(generate_responses(model, rows, SAMPLER, way, batch), set())


def candidates() -> Iterator[Settings]:
    """Yield the cached settings to choose from; in one block the two caches are the same."""
    for cache, block, threshold in itertools.product(CACHES, BLOCKS, THRESHOLDS):
        if (cache, block) != ("prefix", NEW_TOKENS):
            yield replace(PLAIN, cache=cache, block_size=block, threshold=threshold)


def choose(model: DiffusionLM, rows: Sequence[Row], batch: int, plain: float) -> Settings:
    """Return the fastest cached settings that lose at most half a point against the plain ones on these rows."""
    wanted = plain - POINT / 2
    tried = []
    for way in candidates():
        found = measure(model, rows, way, batch)
        tried.append((found["words_exact"] >= wanted, found["tokens_per_s"], way, found))
    tried.sort(key=lambda one: one[:2], reverse=True)
    print(f"batch {batch}: chosen on {len(rows)} other pages, {plain:.1%} of whose numbers the plain way gets")
    for fits, rate, way, found in tried[:5]:
        name = f"{way.cache} cache, blocks of {way.block_size}, threshold {way.threshold}"
        share = f"{found['words_exact']:.1%} of numbers"
        print(f"  {name}: {rate:.0f} tokens/s, {share}{'' if fits else ', too few'}", flush=True)
    return tried[0][2]


def compare(model: DiffusionLM, rows: Sequence[Row], way: Settings, batch: int, rounds: int) -> dict[str, Any]:
    """Run both in turn, each round on other rows; return medians and ratios."""
    arms = {"plain": PLAIN, "cached": way}
    written: dict[str, list[Generated]] = {name: [] for name in arms}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in sorted(arms, reverse=bool(turn % 2)):
            answers = generate_responses(model, rows[turn::rounds], SAMPLER, arms[name], batch)
            rates[name].append(figures(answers, set())["tokens_per_s"])
            written[name] += answers
    found = {name: figures(answers, set()) for name, answers in written.items()}
    ratios = [a / b for a, b in zip(rates["cached"], rates["plain"], strict=True)]
    result: dict[str, Any] = {
        "batch": batch,
        "cache": way.cache,
        "block_size": way.block_size,
        "threshold": way.threshold,
        "tokens_per_s": {name: statistics.median(one) for name, one in rates.items()},
        "tokens_per_pass": {name: one["tokens_per_pass"] for name, one in found.items()},
        "numbers_exact": {name: one["words_exact"] for name, one in found.items()},
        "pages_exact": {name: one["answers_exact"] for name, one in found.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    lost = result["numbers_exact"]["plain"] - result["numbers_exact"]["cached"]
    result["within_a_point"] = lost <= POINT
    for name in arms:
        print(
            f"  {name:6} {result['tokens_per_s'][name]:8.0f} tokens/s  {result['tokens_per_pass'][name]:6.2f} tokens"
            f" a pass  {result['numbers_exact'][name]:.2%} of numbers, {result['pages_exact'][name]:.1%} of pages"
        )
    spread = f"({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)"
    print(f"  ratio  {result['ratio_median']:8.2f} {spread}, {lost:+.2%} of numbers lost", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tuning-prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(args.checkpoint).eval()
    rows = heldout_rows(model)
    if args.prompts % args.rounds or args.tuning_prompts + args.prompts > len(rows):
        parser.error(f"--prompts must be a multiple of --rounds, and with --tuning-prompts at most {len(rows)}")
    tuning, measured = rows[: args.tuning_prompts], rows[args.tuning_prompts :][: args.prompts]
    measure(model, tuning[:1], replace(PLAIN, threshold=0.9, cache="dual", block_size=32), 1)  # warms up
    print(f"{len(measured)} held-out pages, {NEW_TOKENS} new tokens, float32, {args.threads} threads")
    # Rows never meet, so the plain way gets the same numbers in any batch.
    plain = measure(model, tuning, PLAIN, len(tuning))["words_exact"]
    results = []
    for batch in args.batches:
        way = choose(model, tuning, batch, plain)
        results.append(compare(model, measured, way, batch, args.rounds))
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "prompts": len(measured), "runs": results}, indent=2))
    return 0 if all(result["within_a_point"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
