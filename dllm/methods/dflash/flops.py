"""How much arithmetic a DFlash training step is, for mfu."""

from __future__ import annotations

from dllm.models.drafts.config import DraftConfig


def train_flops(
    config: DraftConfig, *, context_tokens: int, blocks: int, visible_tokens: int, predictions: int, vocab: int
) -> float:
    """Count the multiply-adds that a step's matrix products need, forward and backward, twice each.

    A product with trained weights costs three times its forward pass (values, input gradients, weight gradients); the
    frozen head and the projection of frozen features need one of the two gradients, so twice. Recomputation, norms and
    the target's own forward pass count for nothing.

    Args:
        config: the draft's shape.
        context_tokens: tokens of all sequences.
        blocks: blocks of all sequences.
        visible_tokens: context tokens seen, summed over blocks.
        predictions: block positions that reach the head.
        vocab: rows of the head.
    Units: floating-point operations.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    slots = blocks * config.block_size
    kv_weights = 2 * hidden * kv_heads
    slot_weights = 2 * hidden * heads + kv_weights + 3 * hidden * config.intermediate_size
    pairs = config.block_size * (visible_tokens + slots)
    layer = 3 * (slots * slot_weights + context_tokens * kv_weights + 2 * pairs * heads)
    projection = 2 * context_tokens * len(config.target_layer_ids) * hidden * hidden
    return 2.0 * (config.num_hidden_layers * layer + projection + 2 * predictions * vocab * hidden)
