"""The size of a new DFlash draft for a target, and the target's layers that it taps."""

from __future__ import annotations

from typing import Any

from dllm.errors import ModelError
from dllm.models.drafts.config import DFlashConfig


def for_target(
    target: Any,
    *,
    num_hidden_layers: int,
    block_size: int,
    mask_token_id: int,
    taps: int = 5,
    target_layer_ids: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    layer_types: tuple[str, ...] | None = None,
    is_causal: bool | None = None,
) -> DFlashConfig:
    """Size a new draft by a target's transformers config: same width, heads, RoPE and vocabulary.

    Raises:
        ModelError: the target has too few layers for the taps, or a tapped layer does not exist.
    """
    needed = (
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    if lacking := [name for name in needed if not isinstance(getattr(target, name, None), (int, float))]:
        raise ModelError(
            f"no draft can be sized by a target of type {getattr(target, 'model_type', '?')!r}: its config has no "
            f"{', '.join(lacking)}",
            where="target.model",
        )
    layers = target.num_hidden_layers
    ids = target_layer_ids or tuple(layer_ids(layers, taps))
    if max(ids) >= layers or len(set(ids)) != len(ids) or list(ids) != sorted(ids):
        raise ModelError(
            f"target_layer_ids must be rising and below {layers}, got {list(ids)}",
            where="train.dflash.draft.target_layer_ids",
        )
    ropes = getattr(target, "rope_parameters", None) or {}
    theta = ropes["rope_theta"] if "rope_theta" in ropes else getattr(target, "rope_theta", 10000.0)
    heads = target.num_attention_heads
    return DFlashConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=float(theta),
        max_position_embeddings=target.max_position_embeddings,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=ids,
        num_target_layers=layers,
        sliding_window=sliding_window,
        layer_types=layer_types or (),
        is_causal=is_causal,
    )


def layer_ids(num_target_layers: int, taps: int) -> list[int]:
    """Spread taps evenly from the second layer to the third-to-last (0-based ids, banker's rounding).

    Raises:
        ModelError: the target is too shallow to give that many different layers.
    Source: DFlash, section 4.1; rounding as in the released drafts.
    """
    if taps == 1:
        return [num_target_layers // 2]
    last = num_target_layers - 3
    ids = [round(1 + i * (last - 1) / (taps - 1)) for i in range(taps)]
    if last - 1 < taps - 1:
        raise ModelError(
            f"a target of {num_target_layers} layers has no {taps} layers to tap between the second and the "
            "third-to-last",
            where="train.dflash.draft.num_target_layers_tapped",
            hint=f"use at most {max(1, last)} taps",
        )
    return ids
