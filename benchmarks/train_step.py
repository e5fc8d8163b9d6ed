"""One exact DFlash training step, ours against NeMo AutoModel's, alternating in one process.

    python benchmarks/train_step.py [--rounds 8] [--threads 2] [--json FILE]

The same work for both: SmolLM2-135M's shapes, batch 8, length 240, 48 anchors, block 8, 2 layers, cached features, the
full vocabulary, loss, backward, clipping and AdamW. Needs `pip install --no-deps nemo-automodel==0.7.0`; nothing of it
is part of dllm. Prints block positions per second of each, their ratio per round, and the share of the arithmetic
bound that this machine's own matrix product allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objective import Batch, dflash_terms
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft

BATCH, LENGTH, ANCHORS, BLOCK, LAYERS, PROMPT, GAMMA = 8, 240, 48, 8, 2, 92, 4.0
CONFIG = DFlashConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=LAYERS,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position_embeddings=8192,
    block_size=BLOCK,
    mask_token_id=4,
    target_layer_ids=(1, 8, 14, 20, 27),
    num_target_layers=30,
)


def ours(head: nn.Linear, embedding: nn.Embedding) -> Callable[[Batch], float]:
    """Return our step: float32 masters, bfloat16 compute."""
    draft = DFlashDraft(CONFIG)
    draft.reset_parameters(0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=6e-4, fused=True)
    seeds = iter(range(10**6))

    def step(batch: Batch) -> float:
        anchors = draw_anchors(
            batch.loss_mask_BS,
            num_blocks=ANCHORS,
            block_size=BLOCK,
            sampling="without_replacement",
            seeds=[next(seeds) for _ in range(BATCH)],
        )
        terms = dflash_terms(draft, embedding.weight, head.weight, batch, anchors, gamma=GAMMA)
        loss = terms.numerator / terms.denominator
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def nemo(head: nn.Linear, embedding: nn.Embedding) -> Callable[[Batch], float]:
    """Return NeMo AutoModel's step: its trainer module on a bfloat16 draft, as its recipe builds it."""
    from nemo_automodel.components.speculative.dflash.core import DFlashTrainerModule
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel
    from transformers import Qwen3Config

    raw = {k: v for k, v in CONFIG.to_json().items() if k not in ("architectures", "dtype", "model_type")}
    config = Qwen3Config(**raw)
    config.dflash_config = {"block_size": BLOCK, **CONFIG.to_json()["dflash_config"]}
    config._attn_implementation = "sdpa"
    draft = Qwen3DFlashDraftModel(config).to(torch.bfloat16)
    module = DFlashTrainerModule(
        draft, head, embedding, CONFIG.mask_token_id, BLOCK, "sdpa", ANCHORS, loss_decay_gamma=GAMMA
    )
    optimizer = torch.optim.AdamW(draft.parameters(), lr=6e-4, fused=True)

    def step(batch: Batch) -> float:
        out = module(batch.input_ids_BS, batch.features_BSF, batch.loss_mask_BS.float())
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


def peak_flops() -> float:
    """Measure this machine's best bfloat16 matrix product. Units: FLOP/s."""
    x, w = torch.randn(2048, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    best = min(_timed(lambda _: x @ w.T, None) for _ in range(50))
    return 2 * 2048 * 576 * 1536 / best


def bound_flops() -> float:
    """Count the arithmetic no exact step can avoid: the draft forward and twice backward, the head both ways."""
    rows, predicted = BATCH * ANCHORS * BLOCK, BATCH * ANCHORS * (BLOCK - 1)
    attention = 2 * 576 * 576 + 2 * 576 * 192
    block = LAYERS * (attention + 3 * 576 * 1536)
    context = 5 * 576 * 576 + LAYERS * 2 * 576 * 192
    return 6 * (rows * block + BATCH * LENGTH * context) + 4 * predicted * 576 * 49152


def make_batch() -> Batch:
    """Make random sequences of one length, the prompt part unsupervised."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[:, PROMPT:] = True
    ids = torch.randint(0, 49152, (BATCH, LENGTH))
    return Batch(ids, mask, torch.randn(BATCH, LENGTH, 5 * 576).bfloat16())


def _timed(step: Callable[..., object], batch: Batch | None) -> float:
    begin = time.perf_counter()
    step(batch)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    embedding = nn.Embedding(49152, 576, dtype=torch.bfloat16).requires_grad_(False)
    head = nn.Linear(576, 49152, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight = embedding.weight
    torch.nn.init.normal_(embedding.weight, 0, 0.05)
    arms = {"dllm": ours(head, embedding), "nemo": nemo(head, embedding)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds + 1):
        batch = make_batch()
        for name in sorted(arms, reverse=bool(turn % 2)):
            taken = _timed(arms[name], batch)
            if turn:  # the first round warms up
                seconds[name].append(taken)
    positions = BATCH * ANCHORS * BLOCK
    rates = {name: positions / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["dllm"], seconds["nemo"], strict=True)]
    peak = peak_flops()
    result = {
        "positions_per_s": rates,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_gflops": peak / 1e9,
        "bound_positions_per_s": positions * peak / bound_flops(),
        "share_of_bound": rates["dllm"] * bound_flops() / peak / positions,
        "threads": args.threads,
    }
    for key, value in result.items():
        print(f"{key:24} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
