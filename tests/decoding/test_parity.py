"""Training's pass and sampling's passes are one model: what was written is what training's pass says of that state."""

from array import array
from pathlib import Path

import pytest
import torch

from dllm.decoding.causal import decode_causally, decode_seeded
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.methods.diffusion.noise import batch_of
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example
from tests.models.diffusion.remote_code import checkpoint
from tests.models.small_models import MASK, small_model

PROMPTS = [[21, 22, 23, 24, 25], [40, 41], [60, 61, 62, 63, 64, 65, 66, 67, 68], [80, 81, 82, 83]]
NEW, SIZE = 11, 4
CONFIGS = {
    "full": DiffusionConfig("mdlm", MASK),
    "block": DiffusionConfig("mdlm", MASK, SIZE),
    "prompt blocks": DiffusionConfig("mdlm", MASK, SIZE),
    "causal": DiffusionConfig("hybrid", MASK, SIZE),
    "hybrid full": DiffusionConfig("hybrid", MASK),
}


def model_of(kind: str, folder: Path) -> DiffusionLM:
    if kind == "llada2":  # with code of its own; it reads its prompts by blocks
        model = load_diffusion_lm(checkpoint(folder, "llada2_moe"))
        model.config = DiffusionConfig("mdlm", model.mask_token_id, SIZE)
    else:
        model = small_model(config=CONFIGS[kind])
        model.prompt_blocks = kind == "prompt blocks"
    model.eos_ids = set()
    return model


def said_in_training(model: DiffusionLM, prompt: list[int], answer, states: list[set[int]]) -> torch.Tensor:
    """Run training's pass over one response, each set of its positions masked; return the best ids, 0 elsewhere.

    Shapes: returns best_NS over the states and the answer's places.
    """
    example = Example("a-0", array("i", [*prompt, *answer]), len(prompt))
    ids_BS, _, valid_BS = batch_of([example] * len(states))
    block_BS = model.blocks(len(example), example.prompt_length, model.config.block_size).expand(len(states), -1)
    masked_BS = torch.zeros_like(valid_BS)
    for row, places in enumerate(states):
        masked_BS[row, [len(prompt) + place for place in places]] = True
    hidden_MD, _ = model.masked_hidden(ids_BS, valid_BS, block_BS, masked_BS, model.config.context)
    logits_MV = model.logits(hidden_MD)
    logits_MV[:, model.mask_token_id] = -torch.inf
    best_BS = torch.zeros_like(ids_BS)
    best_BS[masked_BS] = logits_MV.argmax(-1)
    return best_BS[:, len(prompt) :]


def block_of(model: DiffusionLM, prompt: list[int], place: int) -> int:
    """Count in which block a response's position lies, the first being 0."""
    tail = len(prompt) % SIZE if model.block_origin == "sequence" else 0
    return 0 if model.config.block_size is None else (place + tail) // SIZE


def check(model: DiffusionLM, prompt: list[int], answer, is_seed=lambda place: False) -> None:
    """Hold every step of a response against training's pass over the block as it stood then.

    Blocks before are clean, as training has them on their clean side; blocks after are not seen.
    """
    left, states, written = set(range(NEW)), [], []
    for step in answer.steps:
        pairs = [(place, token) for place, token in step if not is_seed(place)]
        if pairs:
            block = block_of(model, prompt, pairs[0][0])
            states.append({place for place in left if block_of(model, prompt, place) == block})
            written.append(pairs)
        left -= {place for place, _ in step}
    assert not left
    best_NS = said_in_training(model, prompt, answer.token_ids, states)
    for row, pairs in enumerate(written):
        assert [(place, int(best_NS[row, place])) for place, _ in pairs] == pairs


@pytest.mark.parametrize("threshold", [None, 0.1, 0.0])
@pytest.mark.parametrize("kind", ["full", "block", "prompt blocks", "llada2", "causal", "hybrid full"])
@torch.no_grad()
def test_what_a_step_commits_is_what_trainings_pass_says(kind, threshold, tmp_path: Path) -> None:
    """Law: block k of the pass over [x_t | x_0] is the inference pass of that noisy block after the clean ones."""
    model = model_of(kind, tmp_path)
    asked = Settings(max_new_tokens=NEW, threshold=threshold)  # the block size is the config's
    for prompt, answer in zip(PROMPTS, sample(model, PROMPTS, asked), strict=True):
        check(model, prompt, answer)


@pytest.mark.parametrize("threshold", [None, 0.0])
@torch.no_grad()
def test_seeded_blocks_say_what_training_says_both_ways(threshold, tmp_path: Path) -> None:
    """Law: the same parity for AR-seeded blocks: seeds are the clean half's next tokens, the rest the noisy half's."""
    model = model_of("causal", tmp_path)
    asked = Settings(max_new_tokens=NEW, block_size=SIZE, threshold=threshold)
    for prompt, answer in zip(PROMPTS, decode_seeded(model, PROMPTS, asked), strict=True):
        check(model, prompt, answer, lambda place: place % SIZE == 0)
        logits_1SV = model.logits(model.causal_hidden(torch.tensor([[*prompt, *answer.token_ids]])))
        logits_1SV[..., MASK] = -torch.inf
        ahead = logits_1SV[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert ahead[::SIZE] == answer.token_ids[::SIZE]


@torch.no_grad()
def test_causal_decoding_says_what_the_next_token_loss_is_taken_of(tmp_path: Path) -> None:
    """Law: the same parity for one token per pass: the clean half of training's pair."""
    model = model_of("causal", tmp_path)
    for prompt, answer in zip(PROMPTS, decode_causally(model, PROMPTS, Settings(max_new_tokens=NEW)), strict=True):
        example = Example("a-0", array("i", [*prompt, *answer.token_ids]), len(prompt))
        ids_BS, masked_BS, valid_BS = batch_of([example])
        _, clean_BSD = model.masked_hidden(
            ids_BS, valid_BS, model.blocks(len(example), example.prompt_length, SIZE)[None], masked_BS, "causal"
        )
        logits_SV = model.logits(clean_BSD[0])
        logits_SV[:, MASK] = -torch.inf
        assert logits_SV[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.token_ids
