"""Speculative decoding with one draft: ours against the decoder that z-lab publishes, alternating in one process.

    python benchmarks/draft_decoding.py [--draft dflash2] [--checkpoint DIR] [--target NAME] [--tokens 64] [--prompts 4]
        [--rounds 3] [--threads 2] [--dtype bfloat16] [--clock wall] [--json FILE]

The same export, target, prompts and greedy tokens for both; without --checkpoint the draft is random, which changes the
number of tokens per round but not the time per round. Requires `dflash` 0.1.0, which `make setup` installs. Prints
milliseconds per round of each and their ratio, the prefill included. On a machine that others use, take
--clock cpu --threads 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dflash import model as published

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from dllm.models.drafts.sizing import for_target

Prompt = list[int]
Clock = Callable[[], float]
Arm = Callable[[Prompt], tuple[Prompt, int, float]]
"""Decodes a prompt: its ids, the number of rounds, and the seconds."""
SIZES: dict[str, Any] = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}


def random_export(args: argparse.Namespace, target: Any, folder: Path) -> None:
    """Write a random draft for a target."""
    sizes: dict[str, Any] = {"num_hidden_layers": args.layers, "block_size": args.block, "mask_token_id": 4}
    draft = DFlashDraft(for_target(target.config, **sizes))
    if args.draft == "dflash2":
        plain = for_target(target.config, **sizes, sliding_window=2048, is_causal=False)
        draft = DFlash2Draft(DFlash2Config(**vars(plain), **SIZES))
    draft.reset_parameters(0)
    save_draft(draft, folder, torch.bfloat16)


def ours(target: Any, folder: Path, tokens: int, clock: Clock) -> Arm:
    """Return our decoding, as `evaluate` and `generate` run it, with weights packed once for all prompts."""
    decoder = Decoder(target, load_draft(folder, target.config))

    def decode(prompt: Prompt) -> tuple[Prompt, int, float]:
        with decoder.packed():
            began = clock()
            found = decoder.generate(prompt, max_new_tokens=tokens)
            return found.token_ids, len(found.rounds), clock() - began

    return decode


def theirs(target: Any, folder: Path, tokens: int, clock: Clock) -> Arm:
    """Return the published decoding; it asks CUDA for the time, which a CPU does not have."""
    published._cuda_time = time.perf_counter
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    draft = getattr(published, kind).from_pretrained(folder, dtype=target.dtype).eval()

    def decode(prompt: Prompt) -> tuple[Prompt, int, float]:
        began = clock()
        found = published.dflash_generate(draft, target, torch.tensor([prompt]), tokens, None, return_stats=True)
        return found.output_ids[0, len(prompt) :].tolist(), len(found.acceptance_lengths), clock() - began

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", choices=["dflash", "dflash2"], default="dflash2")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--target", default="builtin:smollm2-135m-instruct")
    for name, default in {"tokens": 64, "prompts": 4, "rounds": 3, "layers": 2, "block": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    target = targets.load_target(Target(model=args.target, dtype=args.dtype), args.dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 4000, (90,), generator=generator).tolist() for _ in range(args.prompts)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        if args.checkpoint is None:
            random_export(args, target, folder)
        result = measure(args, target, folder, prompts, clock)
    for key, value in result.items():
        print(f"{key:24} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


def measure(args: argparse.Namespace, target: Any, folder: Path, prompts: list[Prompt], clock: Clock) -> dict[str, Any]:
    """Decode all prompts in both ways, round after round."""
    arms = {name: build(target, folder, args.tokens, clock) for name, build in (("dllm", ours), ("z-lab", theirs))}
    milliseconds: dict[str, list[float]] = {name: [] for name in arms}
    same = 0
    for turn in range(args.rounds + 1):
        for prompt in prompts:
            ids = {}
            for name in sorted(arms, reverse=bool(turn % 2)):
                ids[name], rounds, taken = arms[name](prompt)
                if turn:  # the first round warms up
                    milliseconds[name].append(1e3 * taken / max(1, rounds))
            same += ids["dllm"] == ids["z-lab"]
    ratios = [b / a for a, b in zip(milliseconds["dllm"], milliseconds["z-lab"], strict=True)]
    return {
        "draft": args.draft,
        "ms_per_round": {name: statistics.median(each) for name, each in milliseconds.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "same_ids": f"{same} of {len(prompts) * (args.rounds + 1)}",
        "threads": args.threads,
    }


if __name__ == "__main__":
    main()
