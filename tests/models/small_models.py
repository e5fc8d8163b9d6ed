"""Random models of two layers, small enough to compare everything with everything."""

import torch

from dllm.config.params import Target
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.diffusion.transformers_lm import TransformersLM
from dllm.models.targets import load_tokenizer

TINY = Target(model="builtin:tiny", dtype="float32")
MASK = 500
FAMILIES = [("Llama", None), ("Qwen2", None), ("Qwen3", None), ("Gemma3", 4), ("Mistral", 4), ("Qwen3", 4)]
"""Families of transformers, and the sliding window of those that have one."""


def small_model(
    family: str = "Llama",
    window: int | None = None,
    config: DiffusionConfig | None = None,
    seed: int = 7,
    scale: float = 0.4,
    tied: bool | None = None,
) -> DiffusionLM:
    """Make a random model of a family; larger scales make it surer of itself."""
    import transformers

    torch.manual_seed(seed)
    values = {
        "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    if tied is not None:
        values["tie_word_embeddings"] = tied
    if window is not None:
        values |= {"sliding_window": window}
        if family != "Mistral":
            values |= {"layer_types": ["sliding_attention", "full_attention"]}
        if family.startswith("Qwen"):
            values |= {"use_sliding_window": True}
    shape = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(shape, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, scale)
    found = TransformersLM(model, load_tokenizer(TINY), MASK)
    found.config = config or found.config
    return found
