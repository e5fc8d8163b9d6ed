"""Passes with and without a cache, state by state: the same hidden states, and finished blocks that stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.cache_passes import Passes
from dllm.decoding.canvas import Canvas, for_responses
from dllm.models.diffusion.config import DiffusionConfig
from tests.models.small_models import MASK, small_model

MODEL = {
    "full": DiffusionConfig("mdlm", MASK),
    "block": DiffusionConfig("mdlm", MASK, 4),
    "causal": DiffusionConfig("hybrid", MASK, 4),
}
PROMPTS = st.lists(st.integers(1, 9), min_size=1, max_size=3)
SIZES = st.integers(1, 5)


def canvas_of(lengths: list[int], size: int, context: str, new: int = 9) -> Canvas:
    prompts = [list(range(20 * n, 20 * n + length)) for n, length in enumerate(lengths, 1)]
    return for_responses(prompts, new, size, MASK, "sequence" if context == "block" else "response")


def blocks(canvas: Canvas, size: int):
    return [(begin, min(begin + size, canvas.width)) for begin in range(canvas.start, canvas.width, size)]


def write(canvas: Canvas, begin: int, end: int, generator: torch.Generator, share: float) -> None:
    """Write any tokens at a share of the positions of a block that are still masks."""
    here_BC = (canvas.ids_BK == MASK) & canvas.valid_BK
    here_BC[:, :begin] = here_BC[:, end:] = False
    chosen_BC = here_BC & (torch.rand(here_BC.shape, generator=generator) < share)
    canvas.ids_BK[chosen_BC] = torch.randint(10, 400, (int(chosen_BC.sum()),), generator=generator)


def own(canvas: Canvas, begin: int, end: int) -> torch.Tensor:
    return (canvas.valid_BK & ~canvas.given_BK)[:, begin:end]


@settings(max_examples=8)
@given(PROMPTS, SIZES, st.sampled_from(["block", "causal"]), st.integers(0, 2**20))
@torch.no_grad()
def test_a_block_cache_changes_no_hidden_state_and_no_finished_key(lengths, size, context, seed) -> None:
    """Law: block-causal: cached equals uncached within 1e-5; keys and values of finished blocks never change."""
    model, generator = small_model(config=MODEL[context], scale=0.2), torch.Generator().manual_seed(seed)
    canvas = canvas_of(lengths, size, context)
    plain, cached = Passes(model, canvas, context, "none"), Passes(model, canvas, context, "block")
    finished: dict[int, list[torch.Tensor]] = {}
    for begin, end in blocks(canvas, size):
        plain.enter(begin, end)
        cached.enter(begin, end)
        for _ in range(2):
            mine_BC = own(canvas, begin, end)
            found, wanted = (passes.hidden(canvas.ids_BK)[mine_BC] for passes in (cached, plain))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
            write(canvas, begin, end, generator, 0.5)
        for columns, kept in finished.items():
            for layer, before in enumerate(kept):
                assert torch.equal(before, torch.stack(cached.cache.layer(layer))[..., :columns, :])
        # This block's first pass wrote everything before it for good.
        finished[begin] = [torch.stack(cached.cache.layer(n))[..., :begin, :].clone() for n in range(2)]
        write(canvas, begin, end, generator, 1.0)


@settings(max_examples=8)
@given(PROMPTS, SIZES, st.sampled_from(["prefix", "dual"]), st.integers(0, 2**20))
@torch.no_grad()
def test_stale_caches_are_exact_where_each_step_renews_them(lengths, size, kind, seed) -> None:
    """Law: full attention: prefix and dual caches are exact when they are refreshed at every step."""
    model, generator = small_model(scale=0.2), torch.Generator().manual_seed(seed)
    canvas = canvas_of(lengths, size, "full")
    plain, cached = Passes(model, canvas, "full", "none"), Passes(model, canvas, "full", kind)
    for begin, end in blocks(canvas, size):
        for _ in range(2):
            mine_BC = own(canvas, begin, end)
            plain.enter(begin, end)
            cached.enter(begin, end)
            found, wanted = (passes.hidden(canvas.ids_BK)[mine_BC] for passes in (cached, plain))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
            write(canvas, begin, end, generator, 0.5)
        write(canvas, begin, end, generator, 1.0)


@pytest.mark.parametrize("context", ["full", "block", "causal"])
@torch.no_grad()
def test_later_blocks_show_where_attention_is_full_and_nowhere_else(context) -> None:
    """Law: tokens of a later block alter no earlier block of a block-causal model, and do alter a bidirectional one."""
    model, canvas = small_model(config=MODEL[context]), canvas_of([5, 2], 4, context, new=12)
    passes, begin = Passes(model, canvas, context, "none"), canvas.start
    passes.enter(begin, begin + 4)
    mine_BC = own(canvas, begin, begin + 4)
    before = passes.hidden(canvas.ids_BK)[mine_BC]
    canvas.ids_BK[:, begin + 4 :] = 77
    after = passes.hidden(canvas.ids_BK)[mine_BC]
    assert (before != after).any(-1).all() if context == "full" else torch.equal(before, after)
