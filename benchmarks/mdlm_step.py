"""One mdlm training step of SmolLM2-135M against a plain causal fine-tuning step of the same model, in turn.

    python benchmarks/mdlm_step.py [--rounds 8] [--batch 16] [--threads 2] [--json FILE]

Both in one process: the same rows of GSM8K (question, and the answer that the data give), the same float32 weights,
bfloat16 autocast, AdamW and clipping. Ours is a step of dllm's own loop. The plain one is what transformers' users
write: AutoModelForCausalLM with labels, backward, clip, step. Prints tokens per second of each, padding aside, their
ratio round by round, and, from a process of its own for each, the most memory it held.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.config.params import Params, Source
from dllm.methods.diffusion.build import initial_model
from dllm.models import targets
from dllm.process.signals import Interrupt
from dllm.prompts import sources
from dllm.prompts import template as chat
from dllm.prompts.files.readers import records
from dllm.registry import METHODS
from dllm.tracking.runs import NullTracker
from dllm.training.batches import Example, collate
from dllm.training.distributed import Ranks
from dllm.training.loop import Loop
from dllm.training.optimizer import Optimizers
from dllm.training.order import Order
from dllm.training.strategy import Rows

RECIPE, ROWS, IGNORED = "smollm2-135m-mdlm", 512, -100
ARMS = ("mdlm", "causal")

Step = Callable[[], object]


def settings_of(batch: int) -> Params:
    """Take the recipe with that batch, and without end tokens that the plain step would not train on."""
    raw = yaml.safe_load(recipe_book.text(RECIPE))
    raw["train"] |= {"batch_size": batch, "grad_accumulation": 1}
    raw["train"]["mdlm"]["eos_padding"] = 0
    return parse_params(raw)


def gsm8k(params: Params) -> list[Example]:
    """Return questions with the answers that the data give."""
    tokenizer = targets.load_tokenizer(params.target)
    (file,) = sources.inputs(Source(name="gsm8k"), Path()).values()
    found = []
    for where, record in records(file):
        asked = [{"role": "user", "content": record["question"]}]
        ids = chat.prompt_ids(tokenizer, asked)
        answer = chat.answer_ids(tokenizer, asked, {"role": "assistant", "content": record["answer"]})
        found.append(Example(where, array("i", [*ids, *answer])[: params.train.max_length], len(ids)))
        if len(found) == ROWS:
            break
    return found


def mdlm(params: Params, examples: list[Example], work: Path) -> Step:
    """Return a step of dllm's loop."""
    model = initial_model(params.target, params.train, "cpu")
    strategy = METHODS[params.train.mode].strategy(model, {"train": examples, "heldout": []}, params.train)
    loop = Loop(strategy, params.train, Ranks(0, 1, torch.device("cpu")), work=work, tracker=NullTracker())
    interrupt = Interrupt()
    return lambda: loop._step(interrupt)


def causal(params: Params, examples: list[Example], order: Order) -> Step:
    """Return a step as a plain script takes it."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(targets.locate(params.target), dtype=torch.float32).train()
    optimizer = Optimizers(model, params.train.optimizer)
    steps = iter(range(10**6))

    def step() -> float:
        part = [examples[row] for row in order.step_rows(next(steps))]
        ids_BS, answer_BS = collate(part)
        lengths_B = torch.tensor([len(example) for example in part])
        valid_BS = torch.arange(ids_BS.shape[1]) < lengths_B[:, None]
        labels_BS = ids_BS.masked_fill(~answer_BS, IGNORED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids_BS, attention_mask=valid_BS.long(), labels=labels_BS, use_cache=False).loss
        loss.backward()
        optimizer.clip()
        optimizer.step()
        return float(loss.detach())

    return step


def order_of(params: Params, examples: list[Example]) -> Order:
    """Return the loop's order of these rows."""
    rows = Rows([example.id for example in examples], [len(example) for example in examples])
    return Order(rows, params.train.batch_size, params.train.seed)


def arm_of(name: str, params: Params, examples: list[Example], work: Path) -> Step:
    """Build one arm by its name."""
    if name == "mdlm":
        return mdlm(params, examples, work)
    return causal(params, examples, order_of(params, examples))


def peak_gib(name: str, args: argparse.Namespace) -> float:
    """Run two steps of one arm in a process of its own; return its peak. Units: GiB resident."""
    asked = [sys.executable, __file__, "--arm", name, "--batch", str(args.batch), "--threads", str(args.threads)]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    params = settings_of(args.batch)
    examples = gsm8k(params)
    with tempfile.TemporaryDirectory() as work:
        if args.arm:
            step = arm_of(args.arm, params, examples, Path(work))
            step(), step()
            # Not getrusage: a child starts with its parent's peak.
            (kib,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
            print(int(kib) / 2**20)
            return
        arms = {name: arm_of(name, params, examples, Path(work)) for name in ARMS}
        order = order_of(params, examples)
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(args.rounds + 1):
            tokens = sum(len(examples[row]) for row in order.step_rows(turn))
            for name in sorted(arms, reverse=bool(turn % 2)):
                began = time.perf_counter()
                arms[name]()
                if turn:  # the first round warms up
                    rates[name].append(tokens / (time.perf_counter() - began))
            if turn:
                line = ", ".join(f"{name} {found[-1]:.0f} tokens/s" for name, found in rates.items())
                print(f"round {turn}: {line}", flush=True)
        del arms
    ratios = [a / b for a, b in zip(rates["mdlm"], rates["causal"], strict=True)]
    result = {
        "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_gib": {name: peak_gib(name, args) for name in ARMS},
        "batch": args.batch,
        "threads": args.threads,
    }
    for key, value in result.items():
        print(f"{key:16} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
