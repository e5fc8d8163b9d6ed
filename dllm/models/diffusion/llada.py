"""LLaDA: by its own code, or read as transformers' Llama, with the same arithmetic under other names.

LLaDA-8B and LLaDA-1.5 are Llama without a causal mask. Read as a Llama they run no code of their own, follow every
attention mask, and support caches, which their own code refuses.

Shape suffixes: B batch, S sequence, R rows of equal length, D hidden.
Source: Nie et al. 2025, LLaDA, section 2.4; the model's configuration and forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typing_extensions import override

from dllm.errors import ModelError
from dllm.models.config_keys import refuse_unknown
from dllm.models.diffusion.config import DiffusionConfig, config_at
from dllm.models.diffusion.own_code import OwnCodeLM, accepted, check_width, in_one_dtype, without_head
from dllm.models.quiet import without_warnings
from dllm.models.sharding import is_sharded, most

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
"""Names of its weights, and of Llama's."""

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
    "layer_norm_with_affine": (True, None),
    "scale_logits": (False, None),
}
"""Switches of its configuration, and the values at which it is a Llama. An absent one has another default there, but
for the last two."""

_KNOWN = """
vocab_size embedding_size d_model mlp_hidden_size mlp_ratio n_layers n_heads n_kv_heads multi_query_attention
max_sequence_length rms_norm_eps rope_theta weight_tying mask_token_id
alibi_bias_max attention_layer_norm_with_affine embedding_dropout residual_dropout flash_attention precision
rope_full_precision init_cutoff_factor init_device init_fn init_std
"""
KNOWN = frozenset(_KNOWN.split()) | MUST_BE.keys()
"""Keys that are read here; in the last two lines those without effect on a Llama that is not trained from scratch."""
RUN_ITS_CODE = "run its own code: --trust-remote-code, or target.trust_remote_code"


class LLaDA(OwnCodeLM):
    """LLaDA by its own code, whose attention masks cannot be relied on.

    Source: the model's config and generation code; older code ignores padding masks (its issues 89 and 105).
    """

    model_type = "llada"
    published = DiffusionConfig("mdlm", 126336)
    config_keys = None
    can_run_without_code = True

    @classmethod
    @override
    def check_config(cls, config: Mapping[str, Any], where: str) -> None:
        refuse_unknown(config, KNOWN, where)
        for name, allowed in MUST_BE.items():
            if config.get(name) not in allowed:
                what = f"this LLaDA is no Llama: {name} is {config.get(name)!r}"
                raise ModelError(what, where=where, hint=RUN_ITS_CODE)

    @classmethod
    @override
    def training_conflict(cls, *, predicts_next: bool, by_block: bool, recomputes: bool) -> str | None:
        if predicts_next or by_block:
            return (
                "this model's code takes no attention mask: mode mdlm with attention full is all it can be trained with"
            )
        return super().training_conflict(predicts_next=predicts_next, by_block=by_block, recomputes=recomputes)

    @override
    def _hidden(
        self, ids_BS: Tensor, valid_BS: Tensor | None, allowed_BSS: Tensor | None, position_ids_BS: Tensor
    ) -> Tensor:
        if allowed_BSS is not None:
            raise ModelError("this model's code takes no attention mask", where=self.model_type)
        options = accepted(self.model, use_cache=False, return_dict=True)
        _, call = in_one_dtype(self.model, ids_BS.device.type)
        with without_head(self.model) as width:
            sharded = is_sharded(self.model)
            if not sharded and (valid_BS is None or bool(valid_BS.all())):
                return check_width(call(ids_BS, **options).logits, width)
            return _by_length(call, ids_BS, valid_BS, options, width, in_step=sharded)


def _by_length(
    call: Callable[..., Any],
    ids_BS: Tensor,
    valid_BS: Tensor | None,
    options: dict[str, Any],
    width: int,
    *,
    in_step: bool,
) -> Tensor:
    """Run rows of equal length together, without padding; return hidden_BSD, 0 on padding.

    Nothing is lost: the cost of models of this size is arithmetic, and padding would only add to it.

    Args:
        in_step: make as many passes as the rank that needs the most, as sharded weights require.
    """
    if valid_BS is None:
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(valid_BS.sum(1).tolist()):
        groups.setdefault(length, []).append(row)
    idle = most(len(groups), ids_BS.device) - len(groups) if in_step else 0
    hidden_BSD: Tensor | None = None
    for length, rows in groups.items():
        group_BS = torch.zeros_like(valid_BS)
        group_BS[rows] = valid_BS[rows]
        hidden_RSD = check_width(call(ids_BS[group_BS].view(len(rows), length), **options).logits, width)
        if hidden_BSD is None:
            hidden_BSD = hidden_RSD.new_zeros(*ids_BS.shape, width)
        hidden_BSD[group_BS] = hidden_RSD.flatten(0, 1)
    assert hidden_BSD is not None
    for _ in range(idle):
        hidden_BSD = hidden_BSD + 0 * call(ids_BS[:1, :1], **options).logits.sum()
    return hidden_BSD


def is_llada(directory: Path) -> bool:
    """Return whether a directory holds LLaDA as it was published."""
    return LLaDA.recognises(config_at(directory))


def load(directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Read LLaDA as a Llama; return it with transformers' report of what was missing.

    Raises:
        ModelError: it is a variant whose arithmetic is not Llama's.
        OSError, ValueError: its files cannot be read.
    """
    own = config_at(directory)
    LLaDA.check_config(own, str(directory / "config.json"))
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
