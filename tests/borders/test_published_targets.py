"""Configs of published targets, whose keys transformers' code does not all name: read where it computes what they ask
for, refused by name where it does not (K7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models.target_config import check_config

MTP = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
QWEN3_5 = {"attn_output_gate": True, "full_attention_interval": 4, "mamba_ssm_dtype": "float32", **MTP}
QWEN3_8 = {**QWEN3_5, "output_gate_type": "swish", "partial_rotary_factor": 0.25, "pad_token_id": None}
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "scoring_func": "sigmoid", "seq_aux": True, "topk_method": "noaux_tc",
    },
    "gemma3_text": {"cache_implementation": "hybrid"},
    "glm4_moe": {"num_nextn_predict_layers": 1, "use_qk_norm": False},
    "gpt2": {"n_ctx": 1024, "n_positions": 1024},
    "gpt_oss": {"experts_per_token": 4, "num_experts_per_tok": 4, "initial_context_length": 4096, "swiglu_limit": 7.0},
    "lfm2": {
        "block_dim": 2048, "block_mlp_init_scale": 1.0, "block_norm_eps": 1e-5, "block_use_swiglu": True,
        "block_use_xavier_init": True, "conv_dim": 2048, "conv_dim_out": 2048, "conv_use_xavier_init": True,
        "hidden_size": 2048, "norm_eps": 1e-5, "rope_theta": 1e6, "theta": 1e6, "use_pos_enc": True,
    },
    "minimax_m2": {
        "attn_type_list": [1, 1], "mtp_transformer_layers": 1, "num_mtp_modules": 3, "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid", "shared_intermediate_size": 0, "use_mtp": True, "use_qk_norm": True,
        "use_routing_bias": True,
    },
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "partial_rotary_factor": 0.75},
    "qwen3_5_moe_text": QWEN3_8,
    "qwen3_5_text": QWEN3_5,
    "qwen3_moe": {
        "max_window_layers": 28, "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True,
        "use_sliding_window": False,
    },
    "smollm3": {"max_window_layers": 28, "pretraining_tp": 2, "use_sliding_window": False},
}  # fmt: skip
OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("gpt_oss", {"experts_per_token": 2}, "experts_per_token"),
    ("gpt2", {"n_ctx": 512}, "n_ctx"),
    ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
    ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type"),
    ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm"),
    ("qwen3_moe", {"use_qk_norm": 1}, "use_qk_norm"),
    ("qwen3_moe", {"use_sliding_window": True}, "max_window_layers"),
    ("qwen3", {"attn_output_gate": True}, "attn_output_gate"),
]


def write(folder: Path, kind: str, keys: dict[str, Any]) -> Path:
    text = json.dumps({**CONFIG_MAPPING[kind]().to_dict(), **keys, "model_type": kind}, default=str)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_config_is_read(kind: str, tmp_path: Path) -> None:
    check_config(Target(model=str(tmp_path)), write(tmp_path, kind, PUBLISHED[kind]))


@pytest.mark.parametrize(("kind", "keys", "named"), OTHERWISE)
def test_another_value_is_refused_by_its_key(kind: str, keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"its config has {named}: "):
        check_config(Target(model=str(tmp_path)), write(tmp_path, kind, PUBLISHED.get(kind, {}) | keys))
