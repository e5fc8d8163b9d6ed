"""The config of a DFlash draft: its fields and its published form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from dllm.errors import ModelError
from dllm.models.config_keys import refuse_other_values, refuse_unknown, short

ONLY: dict[str, tuple[Any, ...]] = {
    "attention_mode": ("gqa", "mha"),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1.0, 1),
    "final_logit_softcapping": (0.0, 0),
    "hidden_act": ("silu",),
    "input_embedding_scale": (1.0, 1),
    "is_neox_style": (True,),
    "mlp_bias": (False,),
    "output_multiplier": (1.0, 1),
    "partial_rotary_factor": (1.0, 1),
    "projector_type": (),
    "qk_norm": (True,),
    "rope_is_neox_style": (True,),
    "sample_from_anchor": (False,),
    "shift_label": (False,),
    "use_aux_hidden_state": (True,),
    "use_qk_norm": (True,),
    "use_swa": (False,),
}
"""Switches that published drafts have, and the values at which the network is ours; an absent one is off."""
INNER = frozenset({"block_size", "causal", "mask_token_id", "target_layer_ids", "num_target_layers"})
"""Keys read from `dflash_config`."""
READ = frozenset(
    {
        "dflash_config",
        "initial_context_length",
        "max_window_layers",
        "rope_parameters",
        "rope_scaling",
        "use_sliding_window",
        *INNER,
    }
)
"""Further keys read at the top."""
LARGEST = {"block_size": 1024, "vocab_size": 2**24, "sliding_window": 2**48, "max_position_embeddings": 2**48}
"""Sizes that no draft exceeds; of others, `WIDEST`."""
WIDEST = 2**20
OPTIONAL = frozenset({"num_target_layers", "sliding_window", "is_causal"})
FULL, SLIDING = "full_attention", "sliding_attention"


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
    """How far before it a slot of a sliding layer sees; in a layer that is not causal, also how far after it."""
    layer_types: tuple[str, ...] = ()
    """`full_attention` or `sliding_attention` of each layer; if not given, sliding with a window and full without."""
    is_causal: bool | None = None
    """Whether slots see only those before them, in all layers; None: in sliding layers only."""
    attention_bias: bool = False
    """Whether the projections of attention have biases."""

    def __post_init__(self) -> None:
        default = FULL if self.sliding_window is None else SLIDING
        kinds = self.layer_types or (default,) * self.num_hidden_layers
        object.__setattr__(self, "layer_types", kinds)
        if self.is_causal is None and len(set(kinds)) == 1:  # one form for the same network
            object.__setattr__(self, "is_causal", kinds[0] == SLIDING)

    def layer_attention(self, layer: int) -> tuple[int | None, bool]:
        """Return a layer's window (None: the whole context), and whether it is causal inside a block."""
        is_sliding = self.layer_types[layer] == SLIDING
        return self.sliding_window if is_sliding else None, is_sliding if self.is_causal is None else self.is_causal

    def to_json(self) -> dict[str, Any]:
        """Return the `config.json` of a published draft (Qwen3 fields, `dflash_config` inside).

        Engines differ in the place where they read block size and causality, and in what they take for granted where
        it is missing: both stand in both places.
        """
        plain = asdict(self)
        nested = {key: plain.pop(key) for key in self.nested}
        if self.num_target_layers is None:
            plain.pop("num_target_layers")
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            **plain,
            "attention_dropout": 0.0,
            "dflash_config": {
                "block_size": self.block_size,
                "causal": self.is_causal,
                **nested,
                "target_layer_ids": list(self.target_layer_ids),
            },
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_types": list(self.layer_types),
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": SLIDING in self.layer_types,
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
        if flat.get("attention_mode") == "mha" and flat.get("num_key_value_heads") != flat.get("num_attention_heads"):
            raise ModelError("attention_mode is mha, and there are fewer heads of keys than of queries", where=where)
        flat["rope_theta"] = _rope_theta(raw, where)
        flat |= _attention(raw, flat, where)
        flat.setdefault("num_target_layers", None)
        missing = [name for name in sorted(names) if flat.get(name) is None and name not in OPTIONAL]
        if missing:
            raise ModelError(f"not a {cls.family} draft: its config lacks {', '.join(missing)}", where=where)
        known = {name: flat[name] for name in names}
        return cls(**{**known, "target_layer_ids": _checked(known, where)})

    def with_block_size(self, block_size: int) -> DFlashConfig:
        """Return the same draft for blocks of another size.

        Raises:
            ModelError: its window is smaller.
        """
        _check_window(self.sliding_window, block_size, "train.dflash.block_size")
        return replace(self, block_size=block_size)


def _rope_theta(raw: Mapping[str, Any], where: str) -> Any:
    """Read the base of RoPE from any of its three places; scaled RoPE is refused."""
    ropes = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for name, section in (("rope_parameters", ropes), ("rope_scaling", scaling)):
        if not isinstance(section, Mapping):
            raise ModelError(f"{name} is no mapping", where=where)
        kind = section.get("rope_type") or section.get("type") or "default"
        if kind != "default":
            raise ModelError(f"{name}: RoPE of type {kind!r} in a draft is not supported", where=where)
        refuse_other_values(section, {"partial_rotary_factor": (1.0, 1), "factor": (1.0, 1)}, where, name)
        refuse_unknown(section, {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}, where, name)
    places = {"rope_theta": raw, "rope_parameters.rope_theta": ropes, "rope_scaling.rope_theta": scaling}
    named = {place: theta for place, section in places.items() if (theta := section.get("rope_theta")) is not None}
    (first, theta), *others = named.items() or {"": 10000.0}.items()
    if differing := next((place for place, other in others if other != theta), None):
        raise ModelError(f"{first} is {theta}, and {differing} is {named[differing]}", where=where)
    return theta


def _attention(raw: Mapping[str, Any], flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read types, window, causality and biases of the layers.

    `is_causal` overrides `dflash_config.causal`, which overrides the default: sliding layers are causal inside a block,
    full ones are not.
    Source: as vLLM reads it.
    """
    kinds, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    if layers is not None and (type(layers) is not int or not 1 <= layers <= 1000):
        raise ModelError(f"num_hidden_layers must be a whole number from 1 to 1000, got {layers!r}", where=where)
    if kinds is None:
        if raw.get("use_sliding_window"):
            raise ModelError("use_sliding_window is true, and layer_types does not say for which layers", where=where)
        kinds = [FULL] * (layers or 0)
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"layer_types must list one type for each of {layers} layers", where=where)
    if others := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise ModelError(f"layer_types: {others[0]!r} is not supported, only {FULL} and {SLIDING}", where=where)
    is_windowed = SLIDING in kinds
    if is_windowed and (raw.get("sliding_window") is None or raw.get("use_sliding_window") is False):
        raise ModelError("layer_types has sliding_attention, and no sliding_window is in use", where=where)
    switches = {key: flat.get(key) for key in ("is_causal", "causal", "attention_bias")}
    for key, value in switches.items():
        if value is not None and type(value) is not bool:
            raise ModelError(f"{key} must be true, false or null, got {value!r}", where=where)
    is_causal = switches["causal"] if switches["is_causal"] is None else switches["is_causal"]
    return {
        "layer_types": tuple(kinds),
        "sliding_window": raw["sliding_window"] if is_windowed else None,
        "is_causal": is_causal,
        "attention_bias": bool(switches["attention_bias"]),
    }


def _checked(known: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Check types and ranges; return the tapped layers as a tuple."""
    for name, value in known.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("target_layer_ids", "layer_types", "is_causal", "attention_bias"):
            continue  # checked where they are read
        if value is None and name in OPTIONAL:
            continue
        if name in ("rms_norm_eps", "rope_theta"):
            if not is_number or not 0 < value <= 1e30:
                raise ModelError(f"{name} must be a positive number up to 1e30, got {short(value)}", where=where)
        elif not isinstance(value, int) or not is_number or value < (0 if name == "mask_token_id" else 1):
            raise ModelError(f"{name} must be a whole number above 0, got {short(value)}", where=where)
        elif value > (most := LARGEST.get(name, WIDEST)):
            raise ModelError(f"{name} must be at most {most}, got {short(value)}", where=where)
    if known["block_size"] < 2:
        raise ModelError("a block_size of 1 leaves nothing to predict", where=where)
    if known["head_dim"] % 2:
        raise ModelError(f"head_dim must be even for RoPE, got {known['head_dim']}", where=where)
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise ModelError("num_attention_heads is no multiple of num_key_value_heads", where=where)
    _check_window(known["sliding_window"], known["block_size"], where)
    ids = known["target_layer_ids"]
    if not isinstance(ids, (list, tuple)) or not all(type(id) is int and id >= 0 for id in ids) or not ids:
        raise ModelError(f"target_layer_ids must list layers counted from 0, got {ids!r}", where=where)
    if list(ids) != sorted(set(ids)):
        raise ModelError(f"target_layer_ids must rise, got {ids!r}", where=where)
    return tuple(ids)


def _check_window(window: int | None, block_size: int, where: str) -> None:
    if window is not None and window < block_size:
        raise ModelError(f"a sliding_window of {window} is smaller than a block of {block_size}", where=where)
