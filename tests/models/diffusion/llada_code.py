"""A small LLaDA: its architecture under its own names, in code with the quirks of the published one.

The code was made for transformers 4: `tie_weights` takes no arguments, and the constructor never calls `post_init`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dllm.config.params import Target
from dllm.models.mask_token import MASK
from dllm.models.targets import load_tokenizer
from tests.models.small_models import TINY

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Config(PretrainedConfig):
    model_type = "llada"


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.size = c, c.d_model // c.n_heads
        kept, inner = self.size * c.n_kv_heads, c.mlp_hidden_size
        self.attn_norm, self.ff_norm = Norm(c.d_model, c.rms_norm_eps), Norm(c.d_model, c.rms_norm_eps)
        for name, to in {"q_proj": c.d_model, "k_proj": kept, "v_proj": kept, "attn_out": c.d_model}.items():
            setattr(self, name, nn.Linear(c.d_model, to, bias=False))
        self.ff_proj, self.up_proj = nn.Linear(c.d_model, inner, bias=False), nn.Linear(c.d_model, inner, bias=False)
        self.ff_out = nn.Linear(inner, c.d_model, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def turned(self, x):
        half = self.size // 2
        angle = torch.arange(x.shape[-2]).float()[:, None] / self.c.rope_theta ** (torch.arange(half).float() / half)
        one, other = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(x.dtype)

    def forward(self, x):
        seen = self.attn_norm(x)
        q, k, v = (self.heads(proj(seen)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        share = self.c.n_heads // self.c.n_kv_heads
        q, k, v = self.turned(q), self.turned(k).repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        weights = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1)
        x = x + self.attn_out((weights @ v).transpose(1, 2).flatten(2))
        seen = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(seen)) * self.up_proj(seen))


class Inner(nn.Module):
    def __init__(self, c):
        super().__init__()
        rows = c.embedding_size or c.vocab_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, c.d_model),
            "blocks": nn.ModuleList(Block(c) for _ in range(c.n_layers)),
            "ln_f": Norm(c.d_model, c.rms_norm_eps),
            "ff_out": nn.Linear(c.d_model, rows, bias=False),
        })


class Model(PreTrainedModel):
    config_class, base_model_prefix = Config, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config)

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.model.transformer["wte"]

    def get_output_embeddings(self):
        return self.model.transformer["ff_out"]

    def tie_weights(self):
        if self.config.weight_tying:
            self.model.transformer["ff_out"].weight = self.model.transformer["wte"].weight

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None,
                past_key_values=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                return_dict=None, cache_position=None):
        assert past_key_values is None and not use_cache, "no cache of keys and values for masked diffusion"
        x = self.model.transformer["wte"](input_ids)
        for block in self.model.transformer["blocks"]:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.model.transformer["ff_out"](self.model.transformer["ln_f"](x)))
"""

SIZE = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 256}
SWITCHES = {
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "attention_layer_norm": False, "input_emb_norm": False, "include_bias": False, "include_qkv_bias": False,
    "bias_for_layer_norm": False, "block_group_size": 1, "weight_tying": False, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "multi_query_attention": None, "mlp_ratio": 4, "scale_logits": False,
}  # fmt: skip


def published(folder: Path, **changes) -> Target:
    """Write a small LLaDA of random weights, as it is published: config, code, weights and tokenizer."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + 7  # as published, more than there are tokens
    config = {"model_type": "llada", "architectures": ["Model"], "vocab_size": rows, "embedding_size": rows}
    config |= {"auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    config |= {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id, **SIZE, **SWITCHES}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "modeling.py").write_text(CODE)
    wide, inner, kept = SIZE["d_model"], SIZE["mlp_hidden_size"], SIZE["d_model"] // 2
    shapes = {"wte": (rows, wide), "ln_f": (wide,), "ff_out": (rows, wide)}
    for layer in range(SIZE["n_layers"]):
        own = {"attn_norm": (wide,), "ff_norm": (wide,), "q_proj": (wide, wide), "k_proj": (kept, wide)}
        own |= {"v_proj": (kept, wide), "attn_out": (wide, wide), "ff_proj": (inner, wide), "up_proj": (inner, wide)}
        own |= {"ff_out": (wide, inner)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"model.transformer.{name}.weight": torch.randn(shape, generator=generator) * (0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Target(model=str(folder), dtype="float32", trust_remote_code=True)
