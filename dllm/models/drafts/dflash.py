"""The DFlash draft: a few Qwen3-shaped layers that attend to projections of a target's hidden states.

It has no embedding and no head of its own: both are the target's, and so are the features.

Shape suffixes: B batch, N blocks, L slots of a block, S context, D hidden, F tapped features (taps * D), H query heads,
G key/value heads, R = H / G, E head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dllm.models.drafts.attention import block_attention, cached_attention
from dllm.models.drafts.config import DFlashConfig
from dllm.models.drafts.context_cache import ContextCache
from dllm.models.drafts.layers import Layer, Linear, RMSNorm, Rope
from dllm.models.drafts.proposal import BlockRequest, Proposal, Sampling, most_probable
from dllm.models.drafts.protocol import Draft, DraftSettings, TargetIO
from dllm.models.drafts.sizing import for_target


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
