"""Laws of the pass over [x_t | x_0]: it is what sampling runs, sees no response ahead, and ends in plain passes."""

from array import array

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.cache_passes import Passes
from dllm.decoding.canvas import for_responses
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.layout import blocks_of
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.training.batches import Example
from tests.models.small_models import MASK, small_model

BLOCKY = st.sampled_from(["block", "causal"])
SIZES, SEEDS = st.integers(1, 5), st.integers(0, 2**20)
PROMPT, ANSWER = st.integers(1, 6), st.integers(1, 9)
NEW = 9


def model_of(context: str, size: int, seed: int = 7) -> DiffusionLM:
    return small_model(
        config=DiffusionConfig("hybrid" if context == "causal" else "mdlm", MASK, size), seed=seed, scale=0.2
    )


def drawn(length: int, prompt: int, seed: int, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a text, and masks among its response. Shapes: returns ids_1S and masked_1S."""
    generator = torch.Generator().manual_seed(seed)
    masked_1S = (torch.rand(1, length, generator=generator) < share) & (torch.arange(length) >= prompt)
    return torch.randint(10, 400, (1, length), generator=generator), masked_1S


@settings(max_examples=20)
@given(PROMPT, SIZES, BLOCKY, SEEDS)
@torch.no_grad()
def test_a_noisy_block_is_the_inference_pass_over_the_cached_clean_prefix(prompt, size, context, seed) -> None:
    """Law: training and inference parity, hidden state by hidden state, wherever writing stood."""
    model, generator = model_of(context, size), torch.Generator().manual_seed(seed)
    canvas = for_responses(
        [list(range(20, 20 + prompt))], NEW, size, MASK, "sequence" if context == "block" else "response"
    )
    passes, seen = Passes(model, canvas, context, "block"), []
    for begin in range(canvas.start, canvas.width, size):
        end = min(begin + size, canvas.width)
        passes.enter(begin, end)
        while True:
            masked_1S = canvas.ids_BK == MASK
            masked_1S[:, end:] = False
            if not masked_1S.any():
                break
            seen.append((masked_1S, passes.hidden(canvas.ids_BK)[masked_1S[:, begin:end]]))
            places = masked_1S[0].nonzero()[:, 0]
            chosen = places[torch.randperm(len(places), generator=generator)[: (len(places) + 1) // 2]]
            canvas.ids_BK[0, chosen] = torch.randint(10, 400, (len(chosen),), generator=generator)
    example = Example("x", array("i", canvas.ids_BK[0].tolist()), prompt)
    block_1S, valid_1S = model.blocks(len(example), example.prompt_length, size)[None], torch.ones_like(canvas.valid_BK)
    assert len(seen) >= -(-NEW // size)
    for masked_1S, inferred_MD in seen:
        trained_MD, _ = model.masked_hidden(canvas.ids_BK, valid_1S, block_1S, masked_1S, context)
        torch.testing.assert_close(trained_MD, inferred_MD, atol=1e-5, rtol=1e-4)


@settings(max_examples=20)
@given(PROMPT, ANSWER, SIZES, BLOCKY, SEEDS)
@torch.no_grad()
def test_a_noisy_block_sees_neither_its_own_response_nor_a_later_one(prompt, answer, size, context, seed) -> None:
    """Law: no leak: other tokens under the masks of block k and anywhere after it leave its hidden states bit-equal."""
    model = model_of(context, size)
    ids_1S, masked_1S = drawn(prompt + answer, prompt, seed)
    origin = "response" if context == "causal" else "sequence"
    block_1S, valid_1S = blocks_of(prompt + answer, prompt, size, origin)[None], torch.ones_like(masked_1S)
    before_MD, _ = model.masked_hidden(ids_1S, valid_1S, block_1S, masked_1S, context)
    for block in range(int(block_1S.max()) + 1):
        changed_1S = torch.where((block_1S > block) | (masked_1S & (block_1S == block)), ids_1S + 1, ids_1S)
        after_MD, _ = model.masked_hidden(changed_1S, valid_1S, block_1S, masked_1S, context)
        upto_M = block_1S[masked_1S] <= block
        assert torch.equal(before_MD[upto_M], after_MD[upto_M])


@settings(max_examples=15)
@given(st.integers(1, 12), SEEDS)
@torch.no_grad()
def test_one_block_is_the_plain_pass_both_ways(length, seed) -> None:
    """Law: B = L: the noisy half is the bidirectional pass over x_t."""
    model, (ids_1S, masked_1S) = small_model(scale=0.2), drawn(length, 0, seed)
    valid_1S, block_1S = torch.ones_like(masked_1S), blocks_of(length, 0, length, "sequence")[None]
    paired_MD, _ = model.masked_hidden(ids_1S, valid_1S, block_1S, masked_1S, "block")
    plain_MD = model.hidden(ids_1S.masked_fill(masked_1S, MASK))[masked_1S]
    torch.testing.assert_close(paired_MD, plain_MD, atol=1e-5, rtol=1e-4)


@settings(max_examples=15)
@given(PROMPT, ANSWER, BLOCKY, SEEDS, st.data())
@torch.no_grad()
def test_blocks_of_one_foresee_a_token_from_those_before_it(prompt, answer, context, seed, data) -> None:
    """Law: B = 1, all masked: logits at i are a function of the clean tokens before i, and of all of them."""
    model, length = model_of(context, 1), prompt + answer
    ids_1S, masked_1S = drawn(length, prompt, seed, share=2.0)
    valid_1S, block_1S = torch.ones_like(masked_1S), blocks_of(length, prompt, 1, "sequence")[None]
    place = data.draw(st.integers(prompt, length - 1))
    changed_1S = ids_1S.clone()
    changed_1S[0, place] += 1
    before_MD, after_MD = (
        model.masked_hidden(x_1S, valid_1S, block_1S, masked_1S, context)[0] for x_1S in (ids_1S, changed_1S)
    )
    same = place - prompt + 1
    assert torch.equal(before_MD[:same], after_MD[:same])
    assert (before_MD[same:] != after_MD[same:]).any(-1).all()
