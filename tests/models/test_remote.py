"""Models with code of their own: small checkpoints whose code has the signature of the published ones."""

import json
from pathlib import Path

import pytest
import torch

from dllm.config import Target
from dllm.diffusion.own_generate import generate_with_own_code
from dllm.diffusion.sampler import sample
from dllm.diffusion.sampler_settings import Settings
from dllm.errors import ConfigError, ModelError
from dllm.models.bidirectional import load_bidirectional
from dllm.models.targets import load_tokenizer
from tests.models.small_models import TINY, small_model

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "{kind}"


class Model(LlamaForCausalLM):
    config_class = Config

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **more):
        assert not more, more
        if attention_mask is None or {ignores}:  # as the older published code
            batch, length = input_ids.shape
            attention_mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
{generate}
"""
LLADA2 = """
    @torch.no_grad()
    def generate(self, inputs, temperature=0.0, block_length=32, steps=32, gen_length=2048, top_p=None, threshold=0.95,
                 eos_early_stop=False, minimal_topk=1, eos_id=156892, mask_id=156895):
        assert block_length == 4 and gen_length == 6
        return torch.full((1, gen_length), 9)
"""
NEMOTRON = """
    @torch.no_grad()
    def generate(self, prompt_ids, max_new_tokens=512, steps=512, block_length=32, shift_logits=False, threshold=0.9,
                 causal_context=True, temperature=0, eos_token_id=None):
        assert max_new_tokens == 8
        return torch.cat([prompt_ids, torch.full((1, max_new_tokens), 9)], 1), 5
"""
PROMPTS = [[21, 22, 23, 24, 25], [40, 41]]
WISH = Settings(max_new_tokens=6, block_size=4)


def checkpoint(folder: Path, kind: str, generate: str = "", name: str = "AutoModelForCausalLM") -> Target:
    """Write a small model with its code; the weights are those of `small_model`."""
    small_model().model.save_pretrained(folder)
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_special_tokens({"mask_token": "<|reserved_0|>"})
    tokenizer.save_pretrained(folder)
    (folder / "modeling.py").write_text(CODE.format(kind=kind, ignores=kind == "llada", generate=generate))
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": kind, "auto_map": {"AutoConfig": "modeling.Config", name: "modeling.Model"}}
    values.pop("is_causal", None)
    (folder / "config.json").write_text(json.dumps(values))
    return Target(model=str(folder), dtype="float32", trust_remote_code=True)


def test_llada_writes_ragged_batches_though_its_code_ignores_padding(tmp_path: Path) -> None:
    model = load_bidirectional(checkpoint(tmp_path, "llada"))
    model.eos_ids = set()
    assert model.note.context == "full"
    together = sample(model, PROMPTS, WISH)
    assert [answer for prompt in PROMPTS for answer in sample(model, [prompt], WISH)] == together
    plain = small_model()
    plain.mask_token_id, plain.eos_ids = model.mask_token_id, set()
    assert [a.token_ids for a in sample(plain, PROMPTS, WISH)] == [a.token_ids for a in together]
    with pytest.raises(ModelError, match="no cache"):
        sample(model, PROMPTS, Settings(max_new_tokens=6, cache="dual"))
    with pytest.raises(ConfigError, match="brings no generation code"):
        generate_with_own_code(plain, PROMPTS, WISH)


def test_llada2_is_block_causal_through_additive_masks_and_has_its_own_generate(tmp_path: Path) -> None:
    model = load_bidirectional(checkpoint(tmp_path, "llada2_moe", LLADA2))
    model.eos_ids = set()
    assert model.note.context == "block" and model.prompt_blocks
    ids = torch.tensor([[21, 22, 23, 24, 25, 26, 27, 28]])
    moved = ids.clone()
    moved[0, -1] = 99
    blocks = torch.arange(8) // 4
    allowed = (blocks[None] <= blocks[:, None])[None]
    difference = (model.hidden(ids, allowed_BSS=allowed) - model.hidden(moved, allowed_BSS=allowed)).abs().amax(-1)[0]
    assert (difference[:4] == 0).all() and (difference[4:] > 0).all()
    together = sample(model, PROMPTS, WISH)
    assert [answer for prompt in PROMPTS for answer in sample(model, [prompt], WISH)] == together
    assert [a.token_ids for a in generate_with_own_code(model, PROMPTS, WISH)] == [[9] * 6] * 2


def test_nemotron_is_asked_through_its_own_generate(tmp_path: Path) -> None:
    model = load_bidirectional(checkpoint(tmp_path, "nemotron_labs_diffusion", NEMOTRON, "AutoModel"))
    model.eos_ids = set()
    (answer,) = generate_with_own_code(model, PROMPTS[:1], WISH)
    assert answer.token_ids == [9] * 6
    assert answer.passes == 5
    with pytest.raises(ModelError, match="own-generate"):
        model.hidden(torch.tensor(PROMPTS[:1]))


def test_code_runs_only_where_the_target_allows_it(tmp_path: Path) -> None:
    target = checkpoint(tmp_path, "llada")
    with pytest.raises(ModelError):
        load_bidirectional(target.model_copy(update={"trust_remote_code": False}))
