"""`builtin:tiny`: a random Llama of under a million parameters, for tests and the tiny recipe; `builtin:mini`: one of
three million, a shape to train from scratch.

Owns its shape, its seed and its tokenizer. Its weights are drawn wide enough that greedy text wanders, since a model
that repeats one token would let an off-by-one pass unseen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
HIDDEN = 64
LAYERS = 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>")
_COMMON = """
 the of and to a in is that for it was on are as with his they at be this have from or one had by word but not what all
 were we when your can said there use an each which she do how their if will up other about out many then them these so
 some her would make like him into time has look two more write go see number no way could people my than first water
 been call who its now find long down day did get come made may part over new sound take only little work know place
 year live me back give most very after thing our just name good sentence man think say great where help through much
 before line right too mean old any same tell boy follow came want show also around form three small set put end does
 another well large must big even such because turn here why ask went read need land different home us move try kind
 hand picture again change off play spell air away animal house point page letter mother answer found study still learn
 system user assistant how many total each cost dollars per hours minutes days weeks sells buys left times half twice
 def return list string int float True False None self import from typing Given function check if else for while
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_mini(folder: Path) -> None:
    """Write the mini model; it differs from the tiny one in size only."""
    make(folder, hidden=192, layers=6, inner=512, heads=6, kv_heads=6)


def make(
    folder: Path, *, hidden: int = HIDDEN, layers: int = LAYERS, inner: int = 192, heads: int = 4, kv_heads: int = 2
) -> None:
    """Write the tiny model's config, weights and tokenizer into `folder`; the same bytes every time."""
    vocab, merges = _vocabulary()
    rows = -(-len(vocab) // 64) * 64
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=vocab["<|im_start|>"],
        eos_token_id=vocab["<|im_end|>"],
        pad_token_id=vocab["<|endoftext|>"],
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    # The head is tied to the embedding, which is saved once.
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name != "lm_head.weight"}
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                scale = 0.1 if "embed" in name else 1.6 * weight.shape[1] ** -0.5
                weight.normal_(0.0, scale, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    values.pop("transformers_version", None)  # the model is the same whichever version writes it
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    _save_tokenizer(vocab, merges, folder)
    stops = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build special tokens, all bytes, and every prefix of the common words, with the merges that reach them."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for word in _COMMON.split():
        for spelled in (f"Ġ{word}", word):
            for end in range(2, len(spelled) + 1):
                if spelled[:end] not in vocab:
                    vocab[spelled[:end]] = len(vocab)
                    merges.append((spelled[: end - 1], spelled[end - 1]))
    return vocab, merges


def _save_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> None:
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
