"""Proposed tokens at masked positions, and their confidence.

Shape suffixes: M masked positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.decoding.settings import Remasking
from dllm.errors import ModelError
from dllm.training.order import derive_seed


def copies_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Number each prompt among those equal to it, from 1."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        seen[prompt] += 1
        found.append(seen[prompt])
    return found


def row_generators(
    prompts: Sequence[Sequence[int]],
    seed: int,
    copies: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.Generator]:
    """Make a random generator per prompt, independent of the batch; equal prompts get different ones.

    Numbers are drawn on the model's device, one per token of the vocabulary: a GPU's differ from a CPU's.

    Args:
        copies: as `copies_of` numbers them over all batches; by default over these prompts alone.
    """
    pairs = zip(map(tuple, prompts), copies or copies_of(prompts), strict=True)
    return [torch.Generator(device).manual_seed(derive_seed(seed, "sampler", *pair)) for pair in pairs]


def propose(
    logits_MV: Tensor,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    temperature: float,
    top_p: float,
    remasking: Remasking,
) -> tuple[Tensor, Tensor]:
    """Sample a token for each position, and score it by the logits at temperature 1.

    Shapes: counts has the number of positions per row, row after row; each row has a generator. Returns token_M int64
        and score_M float32, larger for those to commit first: a probability (low_confidence), u (random), minus the
        entropy in nats (entropy), the gap between the two largest probabilities (margin).

    Raises:
        ModelError: a logit is not finite, as after training has diverged.

    Source: LLaDA's generation code; argmax of z / T + Gumbel noise is a draw from softmax(z / T), and needs float64
        (arXiv 2409.02908).
    """
    log_MV = torch.log_softmax(logits_MV.float(), -1)
    if temperature == 0:
        token_M = logits_MV.argmax(-1)
    else:
        noisy_MV = _nucleus(logits_MV.double() / temperature, top_p) + _gumbel(logits_MV, counts, generators)
        token_M = noisy_MV.argmax(-1)
    log_M = log_MV.gather(1, token_M[:, None])[:, 0]
    if not bool(log_M.isfinite().all()):
        raise ModelError("the model's logits are not numbers", hint="training may have diverged")
    if remasking == "low_confidence":
        return token_M, log_M.exp()
    if remasking == "entropy":
        return token_M, torch.xlogy(log_MV.exp(), log_MV.exp()).sum(-1)
    if remasking == "margin":
        top_M2 = log_MV.topk(2, -1).values.exp()
        return token_M, top_M2[:, 0] - top_M2[:, 1]
    return token_M, _uniform(counts, (), generators, torch.float32)


def _gumbel(logits_MV: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    u_MV = _uniform(counts, logits_MV.shape[1:], generators, torch.float64).clamp_min(1e-300)  # 0 would be infinite
    return -torch.log(-torch.log(u_MV))


def _uniform(
    counts: Sequence[int], shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """Draw each row's numbers from its own generator. Shapes: returns (M, *shape)."""
    drawn = [
        torch.rand(n, *shape, generator=generator, dtype=dtype, device=generator.device)
        for n, generator in zip(counts, generators, strict=True)
    ]
    return torch.cat(drawn)


def _nucleus(logits_MV: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of most probable tokens whose probability reaches `top_p`."""
    if top_p >= 1:
        return logits_MV
    by_MV, order_MV = logits_MV.sort(-1, descending=True)
    before_MV = torch.softmax(by_MV, -1).cumsum(-1) - torch.softmax(by_MV, -1)
    out_MV = torch.zeros_like(before_MV, dtype=torch.bool).scatter(1, order_MV, before_MV >= top_p)
    return logits_MV.masked_fill(out_MV, float("-inf"))
