"""Which keys of a config.json shape what a model computes, and which are known to shape nothing.

A key that neither we nor the library that reads the config know is refused by its name: a switch that is ignored gives
a model that loads and computes something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dllm.errors import ModelError

_INERT = """
architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cls_token_id custom_pipelines decoder_start_token_id diversity_penalty
do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty
max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
transformers.js_config transformers_version typical_p use_bfloat16 use_cache use_return_dict
"""
INERT = frozenset(_INERT.split())
"""Bookkeeping, dropout of training, and generation settings of older files."""
_INERT_PREFIXES = ("_attn_implementation", "_experts_implementation", "unsloth_")
_PRIVATE = """
_name_or_path _commit_hash _comment _diffusers_version _flash_attn_2_enabled _output_attentions _pre_quantization_dtype
"""
_INERT_PRIVATE = frozenset(_PRIVATE.split())
"""Bookkeeping of transformers and others; a switch may be private, too, so that no other underscore passes."""
OFF = frozenset({"add_cross_attention", "output_router_logits", "rope_interleaved", "use_mrope", "use_sliding_window"})
"""Keys of published configs that shape nothing while false: an encoder's, what is returned beside the logits, a window,
and kinds of RoPE other than the usual one (SmolLM2, Qwen2.5). False may be what changes the network elsewhere, as in
`pre_norm: false`."""
_BIAS = "_bias"
"""End of the names of biases: false is none, and weights that have some do not fit."""


def refuse_unknown(raw: Mapping[str, Any], known: Collection[str], where: str, inside: str = "") -> None:
    """Refuse a config with a key that is neither known nor inert, unless its value is null or empty.

    Args:
        raw: the config, or a section of it.
        known: keys that whoever builds the model reads.
        where: the file, for the message.
        inside: name of the section.

    Raises:
        ModelError: there is such a key.
    """
    for key, value in raw.items():
        is_off = value is False and (key in OFF or key.endswith(_BIAS))
        is_inert = key in INERT or key in _INERT_PRIVATE or key.startswith(_INERT_PREFIXES)
        if value is None or value in ([], {}) or is_off or is_inert or key in known:
            continue
        name = f"{inside}.{key}" if inside else key
        raise ModelError(
            f"its config has {name}: {short(value)}, which is not supported and may change what the model computes",
            where=where,
            hint="if it changes nothing, remove it from a copy of the model",
        )


def refuse_other_values(
    raw: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str, inside: str = ""
) -> None:
    """Refuse a config in which a switch has another value than those that are implemented; an absent one passes.

    Raises:
        ModelError: there is such a switch.
    """
    for key, allowed in only.items():
        value = raw.get(key)
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            name = f"{inside}.{key}" if inside else key
            rest = f"only {allowed[0]} is supported" if allowed else "which is not supported"
            raise ModelError(f"its config has {name}: {short(value)}, {rest}", where=where)


def short(value: Any) -> str:
    """Return a value as Python writes it, in 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
