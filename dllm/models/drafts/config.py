"""The config of a DFlash draft: its fields, its published form, and its size for a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dllm.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class DFlashConfig:
    """Everything that determines a DFlash draft's network and its inputs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    sliding_window: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the `config.json` of a published draft (Qwen3 fields, `dflash_config` inside)."""
        plain = asdict(self)
        for key in ("mask_token_id", "target_layer_ids", "sliding_window"):
            plain.pop(key)
        window = self.sliding_window
        kind = "full_attention" if window is None else "sliding_attention"
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **plain,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
            },
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_types": [kind] * self.num_hidden_layers,
            "rope_scaling": None,
            "sliding_window": window,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": window is not None,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str = "config.json") -> DFlashConfig:
        """Read a published `config.json`.

        Raises:
            ModelError: a field is missing, the layers mix window kinds, or the draft is of another family.
        """
        inner = raw.get("dflash_config") or {}
        flat = {**raw, **{k: v for k, v in inner.items() if v is not None}}
        if inner.get("projector_type"):
            raise ModelError(f"draft head {inner['projector_type']!r} is not supported", where=where)
        flat["rope_theta"] = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10000.0))
        if raw.get("rope_scaling") or (raw.get("rope_parameters") or {}).get("rope_type", "default") != "default":
            raise ModelError("scaled RoPE in a draft is not supported", where=where)
        kinds = set(raw.get("layer_types") or ["full_attention"])
        if len(kinds) > 1:
            raise ModelError(f"layers of mixed attention {sorted(kinds)} are not supported", where=where)
        flat["sliding_window"] = raw.get("sliding_window") if kinds == {"sliding_attention"} else None
        if not flat.get("target_layer_ids") and flat.get("num_target_layers"):
            flat["target_layer_ids"] = layer_ids(flat["num_target_layers"], flat["num_hidden_layers"])
        missing = [f.name for f in fields(cls) if f.name not in flat]
        if missing:
            raise ModelError(f"not a DFlash draft: its config lacks {', '.join(missing)}", where=where)
        known = {f.name: flat[f.name] for f in fields(cls)}
        return cls(**{**known, "target_layer_ids": tuple(flat["target_layer_ids"])})

    def with_block_size(self, block_size: int) -> DFlashConfig:
        """Return the same draft for blocks of another size."""
        return replace(self, block_size=block_size)


def for_target(
    target: Any,
    *,
    num_hidden_layers: int,
    block_size: int,
    mask_token_id: int,
    taps: int = 5,
    target_layer_ids: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
) -> DFlashConfig:
    """Size a new draft by a target's transformers config: same width, heads, RoPE and vocabulary.

    Raises:
        ModelError: the target has too few layers for the taps, or a tapped layer does not exist.
    """
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
