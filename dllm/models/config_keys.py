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
_INERT_PREFIXES = ("_", "unsloth_")


def refuse_unknown(raw: Mapping[str, Any], known: Collection[str], where: str, inside: str = "") -> None:
    """Refuse a config with a key that is neither known nor inert, unless its value says that it is off.

    Args:
        raw: the config, or a section of it.
        known: keys that whoever builds the model reads.
        where: the file, for the message.
        inside: name of the section.

    Raises:
        ModelError: there is such a key.
    """
    for key, value in raw.items():
        is_off = value is None or value is False or value in ([], {})
        if is_off or key in known or key in INERT or key.startswith(_INERT_PREFIXES):
            continue
        name = f"{inside}.{key}" if inside else key
        raise ModelError(
            f"its config has {name}: {_short(value)}, which is not supported and may change what the model computes",
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
            raise ModelError(f"its config has {name}: {_short(value)}, {rest}", where=where)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
