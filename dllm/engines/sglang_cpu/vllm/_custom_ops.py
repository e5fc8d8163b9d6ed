"""Rotary embedding in plain torch, under the name by which SGLang asks for it where there is no GPU.

SGLang's wheel serves on the CPU but for this one function, which it imports from `vllm._custom_ops`. `dllm serve` puts
this folder on the server's PYTHONPATH when the machine has no GPU. It is there so that tests can run a real server
anywhere; it is not fast.

Shape suffixes: T tokens, H heads, D width of a head, R its rotated part, W all heads side by side (H * D).
"""

from __future__ import annotations

from torch import Tensor


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    """Turn query and key in place by their positions.

    Args:
        positions: T positions.
        query: (T, W), changed in place; so is `key` where there is one.
        head_size: D.
        cos_sin_cache: one row a position: R/2 cosines, then R/2 sines.
        is_neox: the partners of a rotation are R/2 apart (Llama, Qwen); otherwise they are neighbours (GPT-J).
    """
    cos, sin = cos_sin_cache[positions.flatten()].float().unsqueeze(1).chunk(2, dim=-1)
    for states_TW in (query, key):
        if states_TW is not None:
            states_THD = states_TW.view(len(cos), -1, head_size)
            _rotate(states_THD[..., : 2 * cos.shape[-1]], cos, sin, is_neox)


def _rotate(states_THR: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> None:
    if is_neox:
        first, second = states_THR.chunk(2, dim=-1)
    else:
        first, second = states_THR[..., 0::2], states_THR[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
