"""The DFlash draft: a few Qwen3-shaped layers that attend to projections of a target's hidden states.

It has no embedding and no head of its own: both are the target's, and so are the features. Weights are float32 masters;
every forward computes in the dtype of its input.

Shape suffixes: B batch, N blocks, L slots of a block, S context, D hidden, F tapped features (taps * D), H query heads,
G key/value heads, R = H / G, E head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.drafts.attention import block_attention, cached_attention
from dllm.models.drafts.config import DFlashConfig, for_target
from dllm.models.drafts.proposal import BlockRequest, Proposal, Sampling, most_probable
from dllm.models.drafts.protocol import Draft, DraftSettings, TargetIO

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


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
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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


class ContextCache:
    """Keys and values of the context in each draft layer, as far as its window; those of blocks are not kept."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.layers = [_LayerCache() for _ in range(layers)]


class _LayerCache:
    """Keys and values of one layer, in buffers with room behind them: a round copies its own rows only."""

    def __init__(self) -> None:
        self.buffers_BGTE: list[Tensor] = []
        self.begin = self.end = 0

    def extend(self, context: Pair, block: Pair, window: int | None) -> Pair:
        """Append context rows; return what a block sees, its own rows last. No gradient passes.

        A window keeps window - 1 rows of the context.
        Shapes: (B, rows, G, E) each; returns (B, G, T, E), valid until the next call.
        """
        rows, slots = context[0].shape[1], block[0].shape[1]
        skipped = 0 if window is None else max(0, rows + 1 - window)
        middle = self.end + rows - skipped
        if window is not None:
            self.begin = max(self.begin, middle + 1 - window)
        if not self.buffers_BGTE or middle + slots > self.buffers_BGTE[0].shape[2]:
            middle -= self.begin
            self._move(middle + slots, block)
        for buffer_BGTE, new, own in zip(self.buffers_BGTE, context, block, strict=True):
            buffer_BGTE[:, :, self.end : middle] = new[:, skipped:].detach().transpose(1, 2)
            buffer_BGTE[:, :, middle : middle + slots] = own.detach().transpose(1, 2)
        self.end = middle
        key, value = (buffer_BGTE[:, :, self.begin : middle + slots] for buffer_BGTE in self.buffers_BGTE)
        return key, value

    def _move(self, size: int, like: Pair) -> None:
        """Move the kept rows to the front of buffers with room for a quarter more."""
        kept = self.end - self.begin
        shape = (like[0].shape[0], like[0].shape[2], size + size // 4 + 64, like[0].shape[3])
        fresh = [each.new_empty(shape) for each in like]
        for new, old in zip(fresh, self.buffers_BGTE, strict=False):
            new[:, :, :kept] = old[:, :, self.begin : self.end]
        self.buffers_BGTE, self.begin, self.end = fresh, 0, kept


class DFlashDraft(Draft):
    """Predict all tokens of a block in one pass from an anchor and the target's features.

    Parameter names and the config are those of published drafts, so that SGLang and vLLM load a saved one unchanged.
    Source: DFlash (arXiv 2602.06036), section 4; layout as in z-lab's released checkpoints.
    """

    architectures: ClassVar[tuple[str, ...]] = ("DFlashDraftModel", "Qwen3DFlashDraftModel")
    config_type: ClassVar[type[DFlashConfig]] = DFlashConfig
    layer_type: ClassVar[type[Layer]] = Layer
    mixes_slots: ClassVar[bool] = False
    """Whether a layer mixes slots outside its attention: then the last one needs the anchor's slot, too."""
    config: DFlashConfig

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        self.config = config
        self.fc = Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @classmethod
    def reads(cls, raw: Mapping[str, Any]) -> bool:
        """Tell whether a config.json is a DFlash draft's: by its architecture, or by `dflash_config` without one."""
        return super().reads(raw) or ("dflash_config" in raw and not raw.get("architectures"))

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> DFlashConfig:
        """Read a published `config.json`."""
        return cls.config_type.from_json(raw, where)

    @classmethod
    def config_for(
        cls, target_config: Any, settings: DraftSettings, *, block_size: int, mask_token_id: int
    ) -> DFlashConfig:
        """Size a new draft by its target: same width, heads, RoPE and vocabulary."""
        return for_target(
            target_config,
            num_hidden_layers=settings.num_hidden_layers,
            block_size=block_size,
            mask_token_id=mask_token_id,
            taps=settings.num_target_layers_tapped,
            target_layer_ids=tuple(settings.target_layer_ids) if settings.target_layer_ids else None,
            sliding_window=settings.sliding_window,
            layer_types=tuple(settings.layer_types) if settings.layer_types else None,
            is_causal=settings.causal,
        )

    def reset_parameters(self, seed: int, std: float = 0.02) -> None:
        """Draw all matrices from N(0, std^2) with the given seed; set all norms to one and all biases to zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, std, generator=generator)
                else:
                    parameter.fill_(0 if name.endswith("bias") else 1)

    def project(self, features_BSF: Tensor) -> Tensor:
        """Turn tapped features into the context that every layer reads. Shapes: (B, S, F) -> (B, S, D)."""
        return self.hidden_norm(self.fc(features_BSF))

    def forward(self, embeds_BNLD: Tensor, features_BSF: Tensor, anchor_BN: Tensor, keep_BN: Tensor) -> Tensor:
        """Run many blocks of each sequence at once; slot k predicts the token at anchor + k.

        Source: DFlash, section 4.2 and appendix A.1 (attention mask of training).
        """
        return self.forward_blocks(embeds_BNLD, self.read_context(features_BSF), anchor_BN, keep_BN)

    def read_context(self, features_BSF: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the context's keys and values in each layer."""
        context_BSD = self.project(features_BSF)
        position_S = torch.arange(context_BSD.shape[1], device=context_BSD.device)
        rope = Rope(position_S, self.config, context_BSD.dtype)
        return [layer.self_attn.keys_values(context_BSD, rope) for layer in self._typed_layers()]

    def forward_blocks(
        self, embeds_BNLD: Tensor, context: list[tuple[Tensor, Tensor]], anchor_BN: Tensor, keep_BN: Tensor
    ) -> Tensor:
        """Run many blocks of each sequence on the keys and values of its context."""
        slots = embeds_BNLD.shape[2]
        offset_L = torch.arange(slots, device=anchor_BN.device)
        block_rope = Rope(anchor_BN[..., None] + offset_L, self.config, embeds_BNLD.dtype)
        visible_BN = torch.where(keep_BN, anchor_BN, 0)
        x_BNLD = embeds_BNLD
        for index, (layer, (key, value)) in enumerate(zip(self._typed_layers(), context, strict=True)):
            attn = layer.self_attn
            normed, entered = layer.enter(x_BNLD)
            block = attn.keys_values(normed, block_rope)
            query = attn.queries(normed, block_rope)
            if index == len(self.layers) - 1 and not self.mixes_slots:  # the anchor's own output is not used
                query, x_BNLD = query[:, :, 1:], x_BNLD[:, :, 1:]
            mixed = block_attention(query, key, value, *block, visible_BN, *self.config.layer_attention(index))
            x_BNLD = layer.finish(x_BNLD, mixed, entered)
        return self.norm(x_BNLD[:, :, 1 - slots :])

    def train_flops(
        self, *, context_tokens: int, blocks: int, visible_tokens: int, predictions: int, vocab: int
    ) -> float:
        """Count the multiply-adds that a step's matrix products need, forward and backward, twice each.

        A product with trained weights costs three times its forward pass (values, input gradients, weight gradients);
        the frozen head and the projection of frozen features need one of the two gradients, so twice. Recomputation,
        norms and the target's own forward pass are not counted; windows are counted as full attention.
        """
        config = self.config
        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        slots = blocks * config.block_size
        kv_weights = 2 * hidden * kv_heads
        slot_weights = 2 * hidden * heads + kv_weights + 3 * hidden * config.intermediate_size
        pairs = config.block_size * (visible_tokens + slots)
        layer = 3 * (slots * slot_weights + context_tokens * kv_weights + 2 * pairs * heads)
        projection = 2 * context_tokens * len(config.target_layer_ids) * hidden * hidden
        return 2.0 * (config.num_hidden_layers * layer + projection + 2 * predictions * vocab * hidden)

    def new_cache(self) -> ContextCache:
        """Return an empty cache for `propose`."""
        return ContextCache(len(self.layers))

    def propose(
        self,
        anchor_id: int,
        num_tokens: int,
        features_BSF: Tensor,
        start: int,
        cache: ContextCache,
        target: TargetIO,
        sampling: Sampling | None = None,
    ) -> Proposal:
        """Propose all tokens in one pass over an anchor and masks."""
        request = BlockRequest(anchor_id, num_tokens, features_BSF, start, cache, sampling)
        return self.propose_together([request], target)[0]

    def propose_together(self, requests: Sequence[BlockRequest], target: TargetIO) -> list[Proposal]:
        """Propose for several sequences in one pass, if their blocks have the same length."""
        if len({each.num_tokens for each in requests}) > 1:
            return super().propose_together(requests, target)
        hidden_BPD = self.draft_hidden(requests, target)
        # Rows of two dimensions: for a view of three, the head's product would copy the head.
        logits_BPV = target.head(hidden_BPD.flatten(0, 1)).unflatten(0, hidden_BPD.shape[:2])
        return [
            self.choose(each.anchor_id, hidden_PD, logits_PV, each.sampling)
            for each, hidden_PD, logits_PV in zip(requests, hidden_BPD, logits_BPV, strict=True)
        ]

    def choose(self, anchor_id: int, hidden_PD: Tensor, logits_PV: Tensor, sampling: Sampling | None) -> Proposal:
        """Take each slot's most probable token, or sample each slot on its own."""
        if sampling is None:
            return Proposal(most_probable(logits_PV))
        probs_PV = sampling.law(logits_PV)
        return Proposal(sampling.draw(probs_PV), probs_PV)

    def draft_hidden(self, requests: Sequence[BlockRequest], target: TargetIO) -> Tensor:
        """Run the blocks that `propose` is asked for, of equal length. Shapes: hidden_BPD, what the head reads."""
        slots = requests[0].num_tokens + 1
        device = requests[0].features_BSF.device
        ids_BL = torch.full((len(requests), slots), self.config.mask_token_id, device=device)
        ids_BL[:, 0] = torch.tensor([each.anchor_id for each in requests], device=device)
        features, starts, caches = zip(*((each.features_BSF, each.start, each.cache) for each in requests), strict=True)
        return self.run_blocks(target.embed(ids_BL), features, starts, caches)[:, 1:]

    def run_block(self, embeds_BLD: Tensor, features_BSF: Tensor, start: int, cache: ContextCache) -> Tensor:
        """Add new context rows to the cache, then run one block at `start`.

        Shapes: embeds_BLD anchor and masks, features_BSF the rows verified since the last call, in order; their
            positions are cache.length and on. Returns hidden_BLD; row 0, the anchor's, predicts nothing.
        """
        return self.run_blocks(embeds_BLD, [features_BSF], [start], [cache])

    def run_blocks(
        self,
        embeds_BLD: Tensor,
        features: Sequence[Tensor],
        starts: Sequence[int],
        caches: Sequence[ContextCache],
    ) -> Tensor:
        """Do what `run_block` does for a block of each of several sequences; only attention is done one by one."""
        device, slots = embeds_BLD.device, embeds_BLD.shape[1]
        spans = [self.config.layer_attention(index) for index in range(len(self.layers))]
        seen, positions = [], []
        for features_BSF, cache in zip(features, caches, strict=True):
            rows = features_BSF.shape[1]
            unseen = max(0, min(rows + 1 - window if window else 0 for window, _ in spans))  # by any slot of any layer
            seen.append(features_BSF[:, unseen:])
            positions.append(cache.length + torch.arange(unseen, rows, device=device))
            cache.length += rows
        context_BSD = self.project(torch.cat(seen, 1))
        context_rope = Rope(torch.cat(positions), self.config, context_BSD.dtype)
        position_BL = torch.tensor(starts, device=device)[:, None] + torch.arange(slots, device=device)
        block_rope = Rope(position_BL, self.config, embeds_BLD.dtype)
        lengths = [each.shape[1] for each in seen]
        x_BLD = embeds_BLD
        for index, layer in enumerate(self._typed_layers()):
            attn, (window, is_causal) = layer.self_attn, spans[index]
            normed, entered = layer.enter(x_BLD)
            block_key, block_value = attn.keys_values(normed, block_rope)
            query_BLHE = attn.queries(normed, block_rope)
            new_keys, new_values = (each.split(lengths, 1) for each in attn.keys_values(context_BSD, context_rope))
            mixed = []
            for row, cache in enumerate(caches):
                own = slice(row, row + 1)
                known = new_keys[row], new_values[row]
                key, value = cache.layers[index].extend(known, (block_key[own], block_value[own]), window)
                mixed.append(cached_attention(query_BLHE[own], key, value, window, is_causal))
            x_BLD = layer.finish(x_BLD, torch.cat(mixed), entered)
        return self.norm(x_BLD)

    def _typed_layers(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.layers]
