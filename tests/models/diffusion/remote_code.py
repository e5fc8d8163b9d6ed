"""Small checkpoints that carry code of their own, with the signatures and quirks of the published models."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from dllm.config.params import Target
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.models.targets import load_tokenizer
from tests.models.diffusion import llada_code
from tests.models.small_models import TINY, small_model

MASK = "<|reserved_0|>"

LLADA2 = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP


class Config(LlamaConfig):
    model_type = "llada2_moe"


class Rotary(nn.Module):  # made for transformers 4, which listed the formula and computed it after loading
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_init_fn = config, ROPE_INIT_FUNCTIONS["default"]
        self.register_buffer("inv_freq", self.rope_init_fn(config, None)[0], persistent=False)

    def forward(self, x, position_ids):
        angle = (position_ids[:, :, None].float() * self.inv_freq).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList([LlamaMLP(config)])

    def forward(self, x):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):  # no gradients outside of training
            y = torch.empty_like(x)
            chosen = torch.ones(x.shape[:2], dtype=torch.bool)
            y[chosen] = self.experts[0](x[chosen])
            return y


class Model(LlamaForCausalLM):
    config_class = Config
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = Rotary(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, return_dict=None, **more):
        assert not more, more
        batch, length = input_ids.shape
        assert attention_mask.shape == (batch, 1, length, length) and attention_mask.is_floating_point()
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    @torch.no_grad()
    def generate(self, inputs, temperature=0.0, block_length=32, steps=32, gen_length=2048, top_p=None, threshold=0.95,
                 eos_early_stop=False, minimal_topk=1, eos_id=156892, mask_id=156895):
        assert block_length == 4 and gen_length == 6
        return torch.full((1, gen_length), 9)
"""

NEMOTRON = """
import torch
from dataclasses import dataclass
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from .layout import PARADIGMS, pairs


class Config(LlamaConfig):
    model_type = "nemotron_labs_diffusion"


@dataclass
class Output(ModelOutput):
    logits: torch.FloatTensor | None = None
    causal_logits: torch.FloatTensor | None = None
    past_key_values: object = None


class Model(LlamaForCausalLM):
    config_class = Config

    def __init__(self, config):
        if config.dlm_paradigm not in PARADIGMS:
            raise ValueError(f"Unsupported DLM paradigm: {config.dlm_paradigm}")
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.diffusion_lm = config.dlm_paradigm != "autoregressive"

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, split_len=None,
                past_key_values=None, block_size=None, eps=1e-3, is_teacher=False, masked_indices=None, p_mask=None,
                teacher_logits=None, masked_indices_teacher=None, loss_mask=None, ce_loss_weight=1.0,
                output_last_hidden_states_only=False, skip_loss=False, **kwargs):
        batch, length = input_ids.shape
        if labels is None:
            return self.write(input_ids, past_key_values, **kwargs)
        assert skip_loss and not kwargs, kwargs
        noisy = torch.where(masked_indices, self.config.mask_token_id, input_ids)
        seen = pairs(length, self.config.block_size, self.config.dlm_paradigm).expand(batch, 1, -1, -1)
        places = torch.arange(length).repeat(2)[None].expand(batch, -1)
        hidden = self.model(torch.cat([noisy, input_ids], 1), attention_mask=seen, position_ids=places)[0]
        logits = self.lm_head(hidden)
        causal = logits[:, length:] if self.config.dlm_paradigm == PARADIGMS[-1] else None
        return Output(logits=logits[:, :length], causal_logits=causal)

    def write(self, input_ids, cache, use_cache=None, use_causal_mask=False):
        # Over a cache; without use_cache it is looked at and left as it is.
        before = cache.get_seq_length() if cache is not None else 0
        length = input_ids.shape[1]
        seen = torch.ones(length, before + length, dtype=torch.bool)
        if use_causal_mask:
            assert not self.model.layers[0].self_attn.diffusion_lm
            seen = seen.tril(before)
        found = super().forward(input_ids, attention_mask=seen[None, None], past_key_values=cache, use_cache=True)
        if cache is not None and not use_cache:
            cache.crop(-length)
        return Output(logits=found.logits, past_key_values=found.past_key_values)

    @torch.no_grad()
    def generate(self, prompt_ids, max_new_tokens=512, steps=512, block_length=32, shift_logits=False, threshold=0.9,
                 causal_context=True, temperature=0.0, eos_token_id=None, max_thinking_tokens=None,
                 end_think_token_id=None, step_ratio=None):
        assert self.config.dlm_paradigm == "bidirectional", "set up for training"
        assert max_new_tokens % block_length == 0
        assert steps % (max_new_tokens // block_length) == 0
        return torch.cat([prompt_ids, torch.full((1, max_new_tokens), 9)], 1), 5

    @torch.no_grad()
    def ar_generate(self, prompt_ids, max_new_tokens=128, temperature=0.0, eos_token_id=None, max_thinking_tokens=None,
                    end_think_token_id=None):
        for layer in self.model.layers:
            layer.self_attn.diffusion_lm = False
        ids = prompt_ids
        for _ in range(max_new_tokens):
            logits = self(ids, use_cache=False, use_causal_mask=True).logits[:, -1].clone()
            logits[:, self.config.mask_token_id] = float("-inf")
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids, max_new_tokens

    @torch.no_grad()
    def linear_spec_generate(self, prompt_ids, max_new_tokens=128, block_length=32, temperature=0.0,
                             mask_token_id=None, eos_token_id=None, max_thinking_tokens=None, end_think_token_id=None,
                             threshold=0.0):
        cache = DynamicCache()
        self(prompt_ids, past_key_values=cache, use_cache=True)
        cache.crop(2)  # to this length, as the published code says it
        assert cache.get_seq_length() == 2
        return self.ar_generate(prompt_ids, max_new_tokens)[0], block_length
"""

LAYOUT = """
import torch

PARADIGMS = ("bidirectional", "autoregressive", "block_diff")


def pairs(length, size, paradigm):
    block = torch.arange(length) // size
    same, before = block[:, None] == block[None], block[None] < block[:, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    clean = causal if paradigm == PARADIGMS[-1] else same | before
    return torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), clean], 1)])
"""
PARADIGMS = '"bidirectional", "autoregressive", "block_diff"'
OLDER_PARADIGMS = PARADIGMS + ', "sbd_block_diff"'

CODES = {"llada": llada_code.CODE, "llada2_moe": LLADA2, "nemotron_labs_diffusion": NEMOTRON}


def checkpoint(folder: Path, kind: str, every_word: bool = False) -> Target:
    """Write a small model with its code: LLaDA's, or with the weights of `small_model`.

    Args:
        every_word: let the embedding of `small_model` cover the whole tokenizer.
    """
    if kind == "llada":
        return llada_code.published(folder)
    model, tokenizer = small_model().model, load_tokenizer(TINY)
    tokenizer.add_special_tokens({"mask_token": MASK})
    if every_word:
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling.py").write_text(CODES[kind])
    values = json.loads((folder / "config.json").read_text())
    auto = "AutoModelForCausalLM"
    if kind == "llada2_moe":
        weights = load_file(folder / "model.safetensors")
        named = {name.replace(".mlp.", ".mlp.experts.0."): weight for name, weight in weights.items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "nemotron_labs_diffusion":
        (folder / "layout.py").write_text(LAYOUT)
        values["dlm_paradigm"] = "bidirectional"
        auto = "AutoModel"
    values |= {"model_type": kind, "mask_token_id": tokenizer.mask_token_id}
    values["auto_map"] = {"AutoConfig": "modeling.Config", auto: "modeling.Model"}
    values.pop("is_causal", None)
    (folder / "config.json").write_text(json.dumps(values))
    return Target(model=str(folder), dtype="float32", trust_remote_code=True)


def without_code(target: Target, kind: str) -> DiffusionLM:
    """Load the same weights as an ordinary model of transformers."""
    if kind == "llada":
        return load_diffusion_lm(target.model_copy(update={"trust_remote_code": False}))
    model = small_model()
    model.mask_token_id = load_diffusion_lm(target).mask_token_id
    return model
