"""The shapes of well-known targets, so that a run can be planned without their repositories.

Each is what matters of the model's published config.json. A plan takes a file in place of it where one is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models.targets import empty_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-4B": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def planned_target(target: Target, config_file: Path | None = None) -> PreTrainedModel:
    """Build a target on the meta device: from a config.json, from its known shape, or from its own files.

    Args:
        target: its name.
        config_file: a config.json; None takes the known shape, else the target's own config.

    Raises:
        ModelError: the file is not a causal model's config, or nothing says what shape the target has.
    """
    if config_file is None and target.model not in KNOWN:
        return empty_target(target)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        raw = dict(KNOWN[target.model]) if config_file is None else json.loads(config_file.read_text())
        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"no config of a causal model: {why}", where=str(config_file or target.model)) from None
    return model
