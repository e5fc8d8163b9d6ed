"""The config of a DFlash draft: its fields, its published form, and its size for a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from dllm.errors import ModelError
from dllm.models.config_keys import refuse_other_values, refuse_unknown

ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1.0, 1),
    "final_logit_softcapping": (),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "output_multiplier": (1.0, 1),
    "partial_rotary_factor": (1.0, 1),
    "projector_type": (),
    "use_swa": (False,),
}
"""Switches that published drafts have, and the values at which the network is ours; an absent one is off."""
INNER = frozenset({"block_size", "causal", "mask_token_id", "target_layer_ids", "num_target_layers"})
"""Keys read from `dflash_config`."""
READ = frozenset(
    {"dflash_config", "is_causal", "layer_types", "max_window_layers", "rope_parameters", "rope_scaling"}
    | {"use_sliding_window", *INNER}
)
"""Further keys read at the top."""
OPTIONAL = frozenset({"sliding_window", "num_target_layers"})


@dataclass(frozen=True, kw_only=True)
class DFlashConfig:
    """Everything that determines a DFlash draft's network and its inputs."""

    family: ClassVar[str] = "DFlash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    nested: ClassVar[tuple[str, ...]] = ("mask_token_id", "target_layer_ids")
    """Fields that are written into `dflash_config`."""
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
    num_target_layers: int | None
    sliding_window: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the `config.json` of a published draft (Qwen3 fields, `dflash_config` inside)."""
        plain = asdict(self)
        plain.pop("sliding_window")
        nested = {key: plain.pop(key) for key in self.nested}
        if self.num_target_layers is None:
            plain.pop("num_target_layers")
        window = self.sliding_window
        kind = "full_attention" if window is None else "sliding_attention"
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            **plain,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dflash_config": {**nested, "target_layer_ids": list(self.target_layer_ids)},
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
    def from_json(cls, raw: Mapping[str, Any], where: str = "config.json") -> Self:
        """Read a published `config.json`: every key is read, known to shape nothing, or refused.

        Raises:
            ModelError: a field is missing or has an impossible value, two keys contradict each other, or a key asks for
                what this network does not do.
        """
        inner = raw.get("dflash_config") or {}
        if not isinstance(inner, Mapping):
            raise ModelError("dflash_config is no mapping", where=where)
        refuse_other_values(raw, ONLY, where)
        refuse_other_values(inner, ONLY, where, "dflash_config")
        names = {field.name for field in fields(cls)}
        refuse_unknown(raw, names | ONLY.keys() | READ, where)
        refuse_unknown(inner, INNER | ONLY.keys() | set(cls.nested), where, "dflash_config")
        flat = dict(raw)
        for key, value in inner.items():
            if value is None:
                continue
            if raw.get(key) not in (None, value):
                raise ModelError(f"{key} is {raw[key]}, and {value} inside dflash_config", where=where)
            flat[key] = value
        flat["rope_theta"] = _rope_theta(raw, where)
        flat["sliding_window"] = _window(raw, flat, where)
        flat.setdefault("num_target_layers", None)
        missing = [name for name in sorted(names) if flat.get(name) is None and name not in OPTIONAL]
        if missing:
            raise ModelError(f"not a {cls.family} draft: its config lacks {', '.join(missing)}", where=where)
        known = {name: flat[name] for name in names}
        return cls(**{**known, "target_layer_ids": _checked(known, where)})

    def with_block_size(self, block_size: int) -> DFlashConfig:
        """Return the same draft for blocks of another size."""
        return replace(self, block_size=block_size)


def _rope_theta(raw: Mapping[str, Any], where: str) -> Any:
    """Read the base of RoPE from either of its two places; scaled RoPE is refused."""
    ropes = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for name, section in (("rope_parameters", ropes), ("rope_scaling", scaling)):
        if not isinstance(section, Mapping):
            raise ModelError(f"{name} is no mapping", where=where)
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise ModelError(f"{name}: RoPE of type {kind!r} in a draft is not supported", where=where)
        refuse_other_values(section, {"partial_rotary_factor": (1.0, 1), "factor": (1.0, 1)}, where, name)
        refuse_unknown(section, {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}, where, name)
    theta, top = ropes.get("rope_theta"), raw.get("rope_theta")
    if theta is not None and top not in (None, theta):
        raise ModelError(f"rope_theta is {top}, and {theta} inside rope_parameters", where=where)
    return next((each for each in (theta, top) if each is not None), 10000.0)


def _window(raw: Mapping[str, Any], flat: Mapping[str, Any], where: str) -> Any:
    """Read the context window, and refuse attention that the network does not have.

    Windowed layers are causal inside a block and full ones are not. `is_causal` overrides `dflash_config.causal`, which
    overrides that default, as vLLM reads it.
    """
    kinds, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    if kinds is None:
        if raw.get("use_sliding_window"):
            raise ModelError("use_sliding_window is true, and layer_types does not say for which layers", where=where)
        kinds = ["full_attention"]
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"layer_types must list one type for each of {layers} layers", where=where)
    if len(set(map(str, kinds))) > 1:
        raise ModelError(f"layers of mixed attention {sorted(set(map(str, kinds)))} are not supported", where=where)
    if kinds[0] not in ("full_attention", "sliding_attention"):
        raise ModelError(f"layer type {kinds[0]!r} is not supported", where=where)
    has_window = kinds[0] == "sliding_attention"
    if has_window and (raw.get("sliding_window") is None or raw.get("use_sliding_window") is False):
        raise ModelError("layer_types are sliding_attention, and no sliding_window is in use", where=where)
    for key, value in (("is_causal", raw.get("is_causal")), ("dflash_config.causal", flat.get("causal"))):
        if value is None:
            continue
        if value is not has_window:
            order = "causal" if value else "not causal"
            raise ModelError(f"{key}: {kinds[0]} that is {order} inside a block is not supported", where=where)
        break
    return raw["sliding_window"] if has_window else None


def _checked(known: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Check types and ranges; return the tapped layers as a tuple."""
    for name, value in known.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "target_layer_ids" or (value is None and name in OPTIONAL):
            continue
        if name in ("rms_norm_eps", "rope_theta"):
            if not is_number or not 0 < value < float("inf"):
                raise ModelError(f"{name} must be a positive number, got {value!r}", where=where)
        elif not isinstance(value, int) or not is_number or value < (0 if name == "mask_token_id" else 1):
            raise ModelError(f"{name} must be a whole number above 0, got {value!r}", where=where)
    if known["block_size"] < 2:
        raise ModelError("a block_size of 1 leaves nothing to predict", where=where)
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise ModelError("num_attention_heads is no multiple of num_key_value_heads", where=where)
    ids = known["target_layer_ids"]
    if not isinstance(ids, (list, tuple)) or not all(type(id) is int and id >= 0 for id in ids) or not ids:
        raise ModelError(f"target_layer_ids must list layers counted from 0, got {ids!r}", where=where)
    if list(ids) != sorted(set(ids)):
        raise ModelError(f"target_layer_ids must rise, got {ids!r}", where=where)
    return tuple(ids)


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
    needed = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps")
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
