"""Layers of a DFlash draft, in the shape of Qwen3's: attention over context and block, MLP, norms and rotary positions.

Weights are float32 masters; every forward computes in the dtype of its input.

Shape suffixes: L slots of a block, D hidden, H query heads, G key/value heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.rms_norm import FewPasses


class Linear(nn.Linear):
    """Multiply by float32 master weights, cast to the input's dtype."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x in x's dtype; the mean is taken in float32."""
        weight = self.weight.to(x.dtype)
        # A plan, on the meta device, counts what is kept for the backward pass; torch's fused kernels keep the same.
        if x.device.type in ("cpu", "meta") and torch.is_grad_enabled():
            normed: Tensor = FewPasses.apply(x, weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


class Attention(nn.Module):
    """Project queries from the block, keys and values from context and block alike (DFlash, section 4.1)."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, size
        self.q_proj = Linear(hidden, self.heads * size, bias)
        self.k_proj = Linear(hidden, self.kv_heads * size, bias)
        self.v_proj = Linear(hidden, self.kv_heads * size, bias)
        self.o_proj = Linear(self.heads * size, hidden, bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """Return rotated queries. Shapes: x (..., L, D) -> (..., L, H, E)."""
        return rope.rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.size))))

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values. Shapes: x (..., L, D) -> two of (..., L, G, E)."""
        key = rope.rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.size))))
        return key, self.v_proj(x).unflatten(-1, (self.kv_heads, self.size))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One draft layer; the context passes only through its key and value projections."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def enter(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return what the block's queries, keys and values are projected from, and what `finish` needs besides.

        Shapes: x (..., L, D).
        """
        return self.input_layernorm(x), None

    def finish(self, x: Tensor, mixed: Tensor, entered: Any) -> Tensor:
        """Add the attention output, then the MLP.

        Shapes: x (..., L, D), mixed (..., L, H*E); entered from `enter`.
        """
        x = x + self.self_attn.o_proj(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Rope:
    """Cosines and sines of some positions, to rotate heads at those positions (half-split layout)."""

    def __init__(self, positions: Tensor, config: DFlashConfig, dtype: torch.dtype) -> None:
        half = config.head_dim // 2
        steps = torch.arange(half, device=positions.device, dtype=torch.float32)
        angles = positions[..., None].float() * config.rope_theta ** (-steps / half)
        self.cos = torch.cat([angles.cos()] * 2, -1).to(dtype).unsqueeze(-2)
        self.sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype).unsqueeze(-2)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate heads. Shapes: x (positions..., heads, E)."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([second, first], -1) * self.sin
