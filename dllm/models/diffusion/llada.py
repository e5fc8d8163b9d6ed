"""LLaDA's weights in transformers' Llama: the same arithmetic under other names, without code from elsewhere.

LLaDA-8B and LLaDA-1.5 are Llama without a causal mask. Read so they run no code of their own, heed every attention
mask, and can have caches, which their own code refuses.
Source: Nie et al. 2025, LLaDA, section 2.4; the model's configuration and forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import ModelError
from dllm.models.quiet import without_warnings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
"""What its weights are called, and what Llama's are."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
}
"""Switches of its configuration, and the values at which it is a Llama. What is absent has another default there."""


def is_llada(directory: Path) -> bool:
    """Tell whether a directory holds LLaDA as it was published."""
    return _config(directory).get("model_type") == "llada"


def load(directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Read LLaDA as a Llama; return it with transformers' report of what was missing.

    Raises:
        ModelError: it is a variant whose arithmetic is not Llama's.
        OSError, ValueError: its files cannot be read.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    own = _config(directory)
    for name, allowed in MUST_BE.items():
        if own.get(name) not in allowed:
            raise ModelError(
                f"this LLaDA is no Llama: {name} is {own.get(name)!r}",
                where=str(directory / "config.json"),
                hint="run its own code: --trust-remote-code, or target.trust_remote_code",
            )
    heads = own["n_heads"]
    config = LlamaConfig(
        vocab_size=own.get("embedding_size") or own["vocab_size"],
        hidden_size=own["d_model"],
        intermediate_size=own.get("mlp_hidden_size") or own["mlp_ratio"] * own["d_model"],
        num_hidden_layers=own["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=own.get("n_kv_heads") or (1 if own.get("multi_query_attention") else heads),
        max_position_embeddings=own["max_sequence_length"],
        rms_norm_eps=own["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": own["rope_theta"]},
        tie_word_embeddings=own.get("weight_tying", True),
        bos_token_id=own.get("bos_token_id"),
        eos_token_id=own.get("eos_token_id"),
        pad_token_id=own.get("pad_token_id"),
    )
    read: Any = LlamaForCausalLM.from_pretrained
    with without_warnings():  # of a model type that is not the class's, and of what the report has
        model, report = read(directory, config=config, dtype=dtype, key_mapping=NAMES, output_loading_info=True)
    model._weight_conversions = []  # else it would be saved under LLaDA's names, with a Llama's config
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, report


def _config(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
