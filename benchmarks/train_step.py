"""One exact draft training step, ours against NeMo AutoModel's, alternating in one process.

    python benchmarks/train_step.py [--draft dflash2] [--batch 8 --length 240 --anchors 48 --block 8]
        [--rounds 8] [--threads 2] [--clock wall] [--memory] [--json FILE]

The same work for both: SmolLM2-135M's shapes, 2 layers, cached features, the full vocabulary, loss, backward, clipping
and AdamW; for dflash2 also the convolutions, the selector (rank 256, 16 candidates), its loss and its figures. Needs
`pip install --no-deps nemo-automodel==0.7.0`; nothing of it is part of dllm. Prints block positions per second of each,
their ratio per round, and the share of the arithmetic bound that this machine's own matrix product allows; with
--memory the peak memory of each, in a process of its own. As in `python -m dllm train`, malloc asks for huge pages, for
both. On a machine that others use, take --clock cpu --threads 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from dllm.methods.dflash.anchors import draw_anchors
from dllm.methods.dflash.objective import Batch, dflash_terms
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.dflash2 import DFlash2Config, DFlash2Draft
from dllm.models.drafts.dflash2_settings import DFlash2Settings
from dllm.process.huge_pages import restart_with_huge_pages
from dllm.training.cross_entropy import FrozenHead

Step = Callable[[Batch], float]
HIDDEN, VOCAB, LAYERS, TAPS, GAMMA = 576, 49152, 2, 5, 4.0
OWN = DFlash2Settings()


def config(args: argparse.Namespace) -> DFlashConfig:
    """Return the draft's config."""
    plain = DFlashConfig(
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        block_size=args.block,
        mask_token_id=4,
        target_layer_ids=(1, 8, 14, 20, 27),
        num_target_layers=30,
    )
    if args.draft == "dflash":
        return plain
    sizes = OWN.model_dump(include={"conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"})
    return DFlash2Config(**vars(plain), **sizes)


def ours(args: argparse.Namespace, head: nn.Linear, embedding: nn.Embedding) -> Step:
    """Return our step: float32 masters, bfloat16 compute."""
    family: type[DFlashDraft] = DFlash2Draft if args.draft == "dflash2" else DFlashDraft
    draft = family(config(args))
    draft.reset_parameters(0)
    settings = SimpleNamespace(dflash2=OWN)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=6e-4, fused=True)
    frozen, seeds = FrozenHead(head.weight), iter(range(10**6))

    def step(batch: Batch) -> float:
        anchors = draw_anchors(
            batch.loss_mask_BS,
            num_blocks=args.anchors,
            block_size=args.block,
            sampling="without_replacement",
            seeds=[next(seeds) for _ in range(args.batch)],
        )
        terms = dflash_terms(draft, embedding.weight, frozen, batch, anchors, settings, gamma=GAMMA)
        loss = terms.numerator / terms.denominator
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def nemo(args: argparse.Namespace, head: nn.Linear, embedding: nn.Embedding) -> Step:
    """Return NeMo AutoModel's step: its trainer module on a bfloat16 draft, as its recipe builds it."""
    from nemo_automodel.components.speculative.dflash.core import DFlashTrainerModule
    from nemo_automodel.components.speculative.dflash.dflash2_core import DFlash2TrainerModule
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel
    from nemo_automodel.components.speculative.dflash.draft_qwen3_dflash2 import Qwen3DFlash2DraftModel
    from transformers import Qwen3Config

    whole = config(args).to_json()
    raw = {key: value for key, value in whole.items() if key not in ("architectures", "dtype", "model_type")}
    theirs = Qwen3Config(**raw)
    theirs.dflash_config = whole["dflash_config"]
    theirs._attn_implementation = "sdpa"
    kinds = (DFlashTrainerModule, Qwen3DFlashDraftModel)
    if args.draft == "dflash2":
        kinds = (DFlash2TrainerModule, Qwen3DFlash2DraftModel)
    trainer, model = kinds
    draft = model(theirs).to(torch.bfloat16)
    module = trainer(draft, head, embedding, 4, args.block, "sdpa", args.anchors, loss_decay_gamma=GAMMA)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=6e-4, fused=True)

    def step(batch: Batch) -> float:
        out = module(batch.input_ids_BS, batch.features_BSF, batch.loss_mask_BS.float())
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


ARMS = {"dllm": ours, "nemo": nemo}


def peak_flops(clock: Callable[[], float]) -> float:
    """Measure this machine's best bfloat16 matrix product. Units: FLOP/s."""
    x, w = torch.randn(2048, HIDDEN).bfloat16(), torch.randn(1536, HIDDEN).bfloat16()
    best = min(_timed(lambda _: x @ w.T, None, clock) for _ in range(50))
    return 2 * 2048 * HIDDEN * 1536 / best


def bound_flops(args: argparse.Namespace) -> float:
    """Count the arithmetic no exact step can avoid: the draft forward and twice backward, the head both ways."""
    rows, predicted = args.batch * args.anchors * args.block, args.batch * args.anchors * (args.block - 1)
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 192
    block = LAYERS * (attention + 3 * HIDDEN * 1536)
    context = TAPS * HIDDEN * HIDDEN + LAYERS * 2 * HIDDEN * 192
    selector = 0
    if args.draft == "dflash2":
        block += LAYERS * 2 * HIDDEN * 2 * OWN.conv_kernel_size * HIDDEN // OWN.conv_group_size
        selector = OWN.selector_rank * (HIDDEN + OWN.selector_top_k)
    trained = 6 * (rows * block + args.batch * args.length * context + predicted * selector)
    return trained + 4 * predicted * HIDDEN * VOCAB


def make_batch(args: argparse.Namespace) -> Batch:
    """Make random sequences of one length, the prompt part unsupervised."""
    mask = torch.zeros(args.batch, args.length, dtype=torch.bool)
    mask[:, args.length * 92 // 240 :] = True
    ids = torch.randint(0, VOCAB, (args.batch, args.length))
    return Batch(ids, mask, torch.randn(args.batch, args.length, TAPS * HIDDEN).bfloat16())


def _timed(step: Callable[..., object], batch: Batch | None, clock: Callable[[], float]) -> float:
    begin = clock()
    step(batch)
    return clock() - begin


def _shared() -> tuple[nn.Linear, nn.Embedding]:
    embedding = nn.Embedding(VOCAB, HIDDEN, dtype=torch.bfloat16).requires_grad_(False)
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight = embedding.weight
    torch.nn.init.normal_(embedding.weight, 0, 0.05)
    return head, embedding


def _own_memory(args: argparse.Namespace) -> None:
    """Print how much two steps of one arm add to the memory of this process, in GiB."""
    step, batch = ARMS[args.only](args, *_shared()), make_batch(args)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for _ in range(2):
        step(batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - now) / 2**30)


def peak_memory(name: str) -> float:
    """Measure one arm in a process of its own. Units: GiB."""
    command = [sys.executable, *sys.argv, "--only", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", choices=["dflash", "dflash2"], default="dflash")
    for name, default in {"batch": 8, "length": 240, "anchors": 48, "block": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.only:
        return _own_memory(args)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    shared = _shared()
    arms = {name: build(args, *shared) for name, build in ARMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds + 1):
        batch = make_batch(args)
        for name in sorted(arms, reverse=bool(turn % 2)):
            taken = _timed(arms[name], batch, clock)
            if turn:  # the first round warms up
                seconds[name].append(taken)
    positions = args.batch * args.anchors * args.block
    rates = {name: positions / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["dllm"], seconds["nemo"], strict=True)]
    peak, bound = peak_flops(clock), bound_flops(args)
    result = {
        "draft": args.draft,
        "positions_per_s": rates,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_gflops": peak / 1e9,
        "bound_positions_per_s": positions * peak / bound,
        "share_of_bound": rates["dllm"] * bound / peak / positions,
        "threads": args.threads,
    }
    if args.memory:
        result["peak_memory_gib"] = {name: peak_memory(name) for name in ARMS}
    for key, value in result.items():
        print(f"{key:24} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
