"""Speed of a hybrid model's block cache and self-speculation against plain decoding, at identical ids: float32, greedy.

    python benchmarks/self_speculation.py --checkpoint DIR [--recipe smollm2-135m-hybrid] [--prompts 16] [--rounds 3]

On the recipe's held-out prompts, one at a time:

* block-causal decoding above a threshold, with the block cache and without: the same passes, fewer columns;
* self-speculation against one token per pass with the same cache (`ar`).

Prints tokens per second, tokens per pass, the ratios with their spread, and on how many prompts the ids agree; exit
status 1 unless they agree on all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.decoding.causal import decode_causally, speculate_on_itself
from dllm.decoding.settings import LengthSettings, SelfSpeculationSettings, Settings
from dllm.decoding.unmasking import Generation, sample
from dllm.models.diffusion.families import load_checkpoint
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.prompts.stream import collect
from dllm.prompts.table import HELDOUT
from dllm.prompts.template import prompt_ids

Decode = Callable[..., list[Generation]]
THRESHOLD = 0.9
PAIRS = (("cached", "uncached"), ("self-spec", "ar"))
"""What is compared: the first's rate over the second's, at the second's ids."""


def heldout(recipe: str, model: DiffusionLM, number: int) -> list[list[int]]:
    """Return held-out prompts of a recipe as ids, the first in order of id."""
    asked = parse_params(yaml.safe_load(recipe_book.text(recipe))).prepare
    found = [prompt for prompt in collect(asked, Path())[0] if prompt.split == HELDOUT]
    return [prompt_ids(model.tokenizer, prompt.messages) for prompt in found[:number]]


def ways(model: DiffusionLM, new_tokens: int) -> dict[str, tuple[Decode, LengthSettings]]:
    """Name what is measured."""
    plain = Settings(max_new_tokens=new_tokens, block_size=model.config.block_size)
    blocks = replace(plain, threshold=THRESHOLD)
    return {
        "cached": (sample, replace(blocks, cache="block")),
        "uncached": (sample, blocks),
        "self-spec": (speculate_on_itself, SelfSpeculationSettings(new_tokens, block_size=plain.block_size)),
        "ar": (decode_causally, plain),
    }


def timed(model: DiffusionLM, decode: Decode, settings: LengthSettings, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Generate from the prompts one at a time. Units: tokens per second, and tokens per forward pass."""
    began = time.perf_counter()
    answers = [decode(model, [prompt], settings)[0] for prompt in prompts]
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "ids": [answer.token_ids for answer in answers],
        "tokens_per_s": tokens / seconds,
        "tokens_per_pass": tokens / sum(answer.passes for answer in answers),
    }


def compare(model: DiffusionLM, prompts: Sequence[list[int]], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Run every way in turn, round by round, and print the table."""
    arms = ways(model, new_tokens)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            runs[name].append(timed(model, *arms[name], prompts))
    for name, found in runs.items():
        rate = statistics.median(run["tokens_per_s"] for run in found)
        print(f"{name:9} {rate:8.1f} tokens/s  {found[0]['tokens_per_pass']:6.2f} tokens per pass")
    result: dict[str, Any] = {}
    for fast, slow in PAIRS:
        pairs = list(zip(runs[fast], runs[slow], strict=True))
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        same = min(sum(x == y for x, y in zip(a["ids"], b["ids"], strict=True)) for a, b in pairs)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)"
        print(f"{fast} / {slow}: {spread}; same ids on {same} of {len(prompts)} prompts")
        result[f"{fast}/{slow}"] = {
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "same_ids": same,
        }
    result["tokens_per_pass"] = {name: found[0]["tokens_per_pass"] for name, found in runs.items()}
    result["tokens_per_s"] = {name: statistics.median(r["tokens_per_s"] for r in found) for name, found in runs.items()}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--recipe", default="smollm2-135m-hybrid")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(args.checkpoint).eval()
    if model.config.context != "causal":
        parser.error(f"{args.checkpoint} has no causal side: give a checkpoint of mode hybrid")
    prompts = heldout(args.recipe, model, args.prompts)
    timed(model, *ways(model, 8)["self-spec"], prompts[:1])  # warms up
    print(
        f"{len(prompts)} held-out prompts, {args.new_tokens} new tokens, blocks of {model.config.block_size},", end=" "
    )
    print(f"threshold {THRESHOLD}, float32, {args.threads} threads")
    result = compare(model, prompts, args.new_tokens, args.rounds)
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "prompts": len(prompts), **result}, indent=2))
    return 0 if all(result[f"{fast}/{slow}"]["same_ids"] == len(prompts) for fast, slow in PAIRS) else 1


if __name__ == "__main__":
    sys.exit(main())
