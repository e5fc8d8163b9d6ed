"""Acceptance counted on known text, without decoding, against real speculative decoding of the same prompts.

    python benchmarks/acceptance_walk.py [--checkpoint DIR] [--prompts 64] [--decoded 8] [--json FILE]

SmolLM2-135M on GSM8K questions, greedy. Without a checkpoint a draft is trained on half of the responses first, for as
many steps as give it a usual acceptance length. Both ways in turn, in the target's dtype: seconds per response of real
decoding, its prefill included, over those of the walk, the target's pass over the text included and the generation of
the text left out. The walk is timed on all prompts, with a few pass sizes: one block per text and pass, several, and
all anchors at once. Then the rounds of both are compared in float32, prompt by prompt. Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from dllm.config.params import Prepare, Source, Target, Train
from dllm.decoding import walk as walking
from dllm.decoding.acceptance import Acceptance
from dllm.decoding.speculative import Decoder
from dllm.decoding.walk import GreedyText, walk
from dllm.engines.engine import Request, RequestList, Response
from dllm.engines.local import LocalEngine
from dllm.methods.dflash.build import initial_draft
from dllm.methods.dflash.features import Part
from dllm.methods.dflash.settings import Dflash
from dllm.methods.dflash.strategy import DflashStrategy
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft
from dllm.models.drafts.protocol import Draft
from dllm.models.packing import packed_linears
from dllm.models.taps import compute
from dllm.prompts import template as chat
from dllm.prompts.stream import collect
from dllm.training.batches import Example
from dllm.training.optimizer import Optimizers

TARGET = Target(model="builtin:smollm2-135m-instruct")
BLOCK, STEPS, ROWS = 5, 40, 8
PASS_SIZES = {"one walk a text": 1, "as shipped": walking.BLOCKS_AT_ONCE, "every anchor": 1 << 20}


def generate(model: Any, tokenizer: Any, stops: set[int], prompts: int, new_tokens: int) -> list[GreedyText]:
    """Generate responses greedily, with the tokens that a last round may reach beyond the limit."""
    asked = collect(Prepare(sources=[Source(name="gsm8k", limit=max(64, prompts))]), Path())[0][:prompts]
    requests = [
        Request(p.id, tuple(chat.prompt_ids(tokenizer, p.messages)), p.messages, new_tokens + BLOCK - 2, 0.0, 1.0, 0)
        for p in asked
    ]
    engine = LocalEngine(model, tokenizer, stops, 64)
    found = {a.key: a for a in engine.answer(RequestList(requests)) if isinstance(a, Response)}
    texts = []
    for request in requests:
        answer = found[request.key]
        ids = [*request.prompt_ids, *answer.token_ids]
        texts.append(GreedyText(ids, len(request.prompt_ids), answer.finish_reason == "stop", new_tokens))
    return texts


class KnownFeatures:
    """The target's features of a few texts, in memory."""

    def __init__(self, features: list[torch.Tensor]) -> None:
        self.known = features

    def features(self, split: Part, rows: Sequence[int]) -> list[torch.Tensor]:
        """Return those of some rows."""
        return [self.known[row] for row in rows]


def train(model: Any, tokenizer: Any, texts: list[GreedyText]) -> Draft:
    """Train a draft on some of the texts."""
    examples = [Example(str(index), array("i", text.ids), text.prompt_length) for index, text in enumerate(texts)]
    draft_settings = {"num_hidden_layers": 2}
    dflash = {"block_size": BLOCK, "num_blocks_per_sample": 24, "loss_vocab": "corpus", "draft": draft_settings}
    settings = Train.model_validate({"dflash": dflash, "optimizer": {"name": "muon", "lr": 4e-3}})
    draft = initial_draft(cast(Dflash, settings.method_settings), model, tokenizer, seed=0)
    splits: Any = {"train": examples, "heldout": []}
    source = KnownFeatures([f for text in texts for f in compute(model, draft.config.target_layer_ids, [text.ids])])
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    strategy = DflashStrategy(draft, *weights, splits, source, settings)
    optimizers = Optimizers(draft, settings.optimizer)
    for step in range(STEPS):
        rows = [(ROWS * step + row) % len(examples) for row in range(min(ROWS, len(examples)))]
        terms = strategy.terms("train", rows, step)
        (terms.numerator / terms.denominator).backward()
        optimizers.step()
        for parameter in draft.parameters():
            parameter.grad = None
    return draft.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--decoded", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = targets.load_tokenizer(TARGET)
    model = targets.load_target(TARGET)
    stops = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
    texts = generate(model, tokenizer, stops, args.prompts, args.new_tokens)
    trained = load_draft(args.checkpoint, model.config) if args.checkpoint else train(model, tokenizer, texts[::2])
    print(f"{len(texts)} responses; the draft is there", file=sys.stderr, flush=True)
    draft = load_copy(trained, model)
    positions = model.config.max_position_embeddings
    options = {"max_positions": positions}
    rates: dict[str, list[float]] = {name: [] for name in PASS_SIZES}
    decode_s: list[float] = []
    acceptance: dict[str, Acceptance] = {name: Acceptance(draft.config.block_size) for name in ("decoded", "walked")}
    decoder = Decoder(model, draft)
    for begin in range(0, args.decoded, 4):
        with packed_linears(model, draft):  # steps of few tokens gain from it, and passes over many lose
            for text in texts[begin : min(begin + 4, args.decoded)]:
                began = time.perf_counter()
                prompt = list(text.ids[: text.prompt_length])
                answer = decoder.generate(prompt, max_new_tokens=args.new_tokens, stop_ids=stops)
                decode_s.append(time.perf_counter() - began)
                acceptance["decoded"].add(r.counts for r in answer.rounds)
                print(f"decoded in {decode_s[-1]:.2f} s", file=sys.stderr, flush=True)
        for name, size in PASS_SIZES.items():
            walking.BLOCKS_AT_ONCE = size
            began = time.perf_counter()
            found = list(walk(model, draft, texts, **options))
            rates[name].append((time.perf_counter() - began) / len(texts))
            print(f"walked, {name}: {rates[name][-1]:.3f} s each", file=sys.stderr, flush=True)
    for each in found:
        acceptance["walked"].add(each.rounds)
    walking.BLOCKS_AT_ONCE = PASS_SIZES["as shipped"]
    wrong = differing(trained, tokenizer, stops, args)
    per_response = statistics.median(decode_s)
    figures: dict[str, Any] = {
        "decoding_s_per_response": per_response,
        "tau_decoded": acceptance["decoded"].tau_micro,
        "tau_walked": acceptance["walked"].tau_micro,
        "greedy_tokens": sum(each.greedy_tokens for each in found),
        "tokens": sum(len(text.ids) - text.prompt_length for text in texts),
        "differing_in_float32": wrong,
    }
    for name, seconds in rates.items():
        figures |= {f"{name}: s_per_response": statistics.median(seconds)}
        figures |= {f"{name}: ratio": per_response / statistics.median(seconds)}
    for name, value in figures.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if wrong else 0


def load_copy(draft: Draft, model: Any) -> Draft:
    """Return the draft in the model's dtype."""
    return copy.deepcopy(draft).to(model.device, model.dtype)


def differing(trained: Draft, tokenizer: Any, stops: set[int], args: argparse.Namespace) -> int:
    """Decode and walk in float32; return the number of prompts whose rounds differ."""
    exact = targets.load_target(TARGET, "float32")
    texts = generate(exact, tokenizer, stops, args.decoded, args.new_tokens)
    draft = load_copy(trained, exact)
    decoder, wrong = Decoder(exact, draft), 0
    positions = exact.config.max_position_embeddings
    for each in walk(exact, draft, texts, max_positions=positions):
        text = texts[each.index]
        prompt = list(text.ids[: text.prompt_length])
        answer = decoder.generate(prompt, max_new_tokens=args.new_tokens, stop_ids=stops)
        wrong += each.rounds != [r.counts for r in answer.rounds]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
