"""Keys of published targets' configs that transformers' code never names, and the values at which it is right not to.

Either a key speaks of what the causal model leaves out, such as heads of multi-token prediction; or it has only this
value in the models of its type, whose code computes just that. Any other value is refused.
Source: config.json of the models named below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any, Mapping[str, Any]], bool]
"""Tells from a value and its config whether what transformers computes is what the key asks for."""


def only(value: Any) -> Rule:
    """Allow one value."""
    return lambda found, config: type(found) is type(value) and found == value


def same_as(key: str) -> Rule:
    """Allow the value of another key, of which this is an older name."""
    return lambda found, config: found == config.get(key)


def without(switch: str) -> Rule:
    """Allow every value while a switch is off."""
    return lambda found, config: not config.get(switch)


def anything(found: Any, config: Mapping[str, Any]) -> bool:
    """Allow every value: the key shapes nothing that is computed here."""
    return True


def ones(found: Any, config: Mapping[str, Any]) -> bool:
    """Allow a list of 1."""
    return isinstance(found, list) and set(found) == {1}


_HEADS = """
mtp_num_hidden_layers mtp_transformer_layers mtp_use_dedicated_embeddings num_mtp_modules num_nextn_predict_layers
use_mtp
"""
PREDICTION_HEADS = dict.fromkeys(_HEADS.split(), anything)
"""Heads of multi-token prediction behind the last layer, which no causal model of transformers has."""
EVERYWHERE: Mapping[str, Rule] = {**PREDICTION_HEADS, "cache_implementation": anything}
_QWEN3_5: Mapping[str, Rule] = {
    "attn_output_gate": only(True),
    "language_model_only": anything,  # of the whole, whose language model is read
    "mamba_ssm_dtype": only("float32"),
    "output_gate_type": only("swish"),
}
OF_TYPE: Mapping[str, Mapping[str, Rule]] = {
    "deepseek_v3": {
        "aux_loss_alpha": anything,
        "ep_size": anything,
        "moe_layer_freq": only(1),
        "scoring_func": only("sigmoid"),
        "seq_aux": anything,
        "topk_method": only("noaux_tc"),
    },
    "gpt2": {"n_ctx": same_as("n_positions")},
    "gpt_oss": {"experts_per_token": same_as("num_experts_per_tok"), "initial_context_length": anything},
    "lfm2": {
        "block_dim": same_as("hidden_size"),
        "block_mlp_init_scale": anything,
        "block_norm_eps": same_as("norm_eps"),
        "block_use_swiglu": only(True),
        "block_use_xavier_init": anything,
        "conv_dim": same_as("hidden_size"),
        "conv_dim_out": same_as("hidden_size"),
        "conv_use_xavier_init": anything,
        "theta": same_as("rope_theta"),
        "use_pos_enc": only(True),
    },
    "minimax_m2": {
        "attn_type_list": ones,
        "qk_norm_type": only("per_layer"),
        "scoring_func": only("sigmoid"),
        "shared_intermediate_size": only(0),
        "use_qk_norm": only(True),
        "use_routing_bias": only(True),
    },
    "phi3": {"full_attn_mod": only(1), "interpolate_factor": only(1)},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_moe": {
        "max_window_layers": without("use_sliding_window"),
        "shared_expert_intermediate_size": only(0),
        "use_qk_norm": only(True),
    },
    "smollm3": {"max_window_layers": without("use_sliding_window")},
}
"""By the type of the model: gpt-oss-20b, Qwen3-Coder-30B-A3B, Qwen3.5 to 3.8, Phi-4-mini, SmolLM3, LFM2 and others."""


def passed_over(section: Mapping[str, Any], model_type: str) -> set[str]:
    """Return the keys of a config that its model's code does not name, and need not.

    Args:
        section: the config, or its `text_config`.
        model_type: of that section.
    """
    rules = {**EVERYWHERE, **OF_TYPE.get(model_type.removesuffix("_text"), {})}
    return {key for key, value in section.items() if key in rules and rules[key](value, section)}
