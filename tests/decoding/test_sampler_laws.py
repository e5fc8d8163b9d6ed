"""Laws of unmasking, checked on the input of each pass."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding import unmasking as sampler
from dllm.decoding.causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import fill, sample
from dllm.models.diffusion import transformers_lm
from tests.decoding.watched import PROMPT, Watched, wishes
from tests.models.small_models import MASK


@settings(max_examples=30)
@given(PROMPT, wishes(), st.sampled_from(["full", "block", "causal"]))
def test_prompts_stay_masks_only_go_and_blocks_come_in_order(prompt, asked, context) -> None:
    """Laws: the prompt is shown as it is at every step; what is committed stays; no block before its turn; no pass in
    vain, so that blocks <= passes <= tokens; no mask is left."""
    watched = Watched(context)
    (answer,) = sample(watched.model, [prompt], asked)
    begin, width = len(prompt), len(prompt) + asked.max_new_tokens
    states = [*watched.canvases(width), [*prompt, *answer.token_ids]]
    assert states[0] == [*prompt, *[MASK] * asked.max_new_tokens]
    assert MASK not in states[-1] and len(states[-1]) == width
    grid = begin % asked.block_size if context == "block" else 0
    for before, after in pairwise(states):
        assert after[:begin] == prompt
        assert all(new == old for old, new in zip(before, after, strict=True) if old != MASK)
        changed = [place - begin for place in range(width) if before[place] != after[place]]
        open_blocks = {(place - begin + grid) // asked.block_size for place in range(width) if before[place] == MASK}
        assert changed
        assert {(place + grid) // asked.block_size for place in changed} == {min(open_blocks)}
    blocks = (asked.max_new_tokens - 1 + grid) // asked.block_size + 1
    assert blocks <= answer.passes == len(watched.shown) == len(answer.steps) <= asked.max_new_tokens


@settings(max_examples=10)
@given(PROMPT, st.integers(1, 12), st.integers(1, 6), st.sampled_from(["full", "block", "causal"]))
def test_without_a_plan_each_pass_writes_one_token(prompt, new, size, context) -> None:
    """Law: as many steps as masks is one token per step; blocks of one token are written from left to right."""
    watched = Watched(context)
    (answer,) = sample(watched.model, [prompt], Settings(max_new_tokens=new, block_size=size))
    assert [len(step) for step in answer.steps] == [1] * new
    if size == 1:
        assert [place for ((place, _),) in answer.steps] == list(range(new))


@pytest.mark.parametrize(("context", "write"), [("full", sample), ("block", sample), ("causal", decode_seeded)])
def test_a_threshold_beside_a_plan_commits_at_least_the_plan(context, write) -> None:
    """Law: a threshold that nothing passes leaves the plan's counts, and without a plan one token per step."""
    asked = Settings(max_new_tokens=9, block_size=3, threshold=1.0, steps=3)
    (planned,) = write(Watched(context).model, [[21, 22, 23]], asked)
    (slow,) = write(Watched(context).model, [[21, 22, 23]], dataclasses.replace(asked, steps=None))
    seeded = write is decode_seeded
    assert [len(step) for step in planned.steps] == ([1, 2] * 3 if seeded else [3] * 3)
    assert [len(step) for step in slow.steps] == [1] * 9


def test_in_one_block_any_order_is_allowed() -> None:
    """Law: a block as long as the response leaves the order to confidence."""
    (answer,) = sample(Watched().model, [[21, 22, 23]], Settings(max_new_tokens=12, block_size=12))
    assert [place for ((place, _),) in answer.steps] != list(range(12))


@settings(max_examples=10)
@given(PROMPT, st.sampled_from([None, 0.0, 0.3]), st.integers(0, 4))
def test_edits_touch_neither_prompt_nor_what_the_same_step_wrote(prompt, threshold, post) -> None:
    """Laws: the prompt is never edited; no position is unmasked and edited at once; edits come to an end."""
    watched = Watched("block")
    asked = Settings(max_new_tokens=9, block_size=4, threshold=threshold, editing_threshold=0.05, max_post_steps=post)
    (answer,) = sample(watched.model, [prompt], asked)
    assert all(state[: len(prompt)] == prompt for state in watched.canvases(len(prompt) + 9))
    for step in answer.steps:
        assert len({place for place, _ in step}) == len(step)
        assert all(0 <= place < 9 for place, _ in step)
    assert answer.passes <= 4 * (4 + post + 1)  # at most 4 blocks of at most 4 places


def test_a_finished_canvas_is_a_fixed_point_of_editing() -> None:
    """Law: without a mask and without an edit a step changes nothing, and is the last."""
    asked = Settings(max_new_tokens=8, block_size=4, threshold=0.0, editing_threshold=1.0)
    (answer,) = sample(Watched("block").model, [[21, 22, 23, 24]], asked)
    assert answer.passes == 2
    assert all(len(step) == 4 for step in answer.steps)


@settings(max_examples=15)
@given(st.lists(st.integers(10, 400) | st.just(MASK), min_size=1, max_size=12), wishes())
def test_infilling_writes_masks_and_leaves_the_rest(text, asked) -> None:
    """Law: out = in wherever in is no mask; nothing is run where there is none."""
    watched = Watched()
    (answer,) = fill(watched.model, [text], asked)
    assert MASK not in answer.token_ids
    assert [new for new, old in zip(answer.token_ids, text, strict=True) if old != MASK] == [
        old for old in text if old != MASK
    ]
    assert len(watched.shown) == answer.passes <= text.count(MASK)
    assert (answer.passes == 0) == (MASK not in text)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_goes_from_the_blind_logits_past_the_seeing_ones(scale) -> None:
    """Laws: z = (1 + w) z_c - w z_u; the blind pass masks all that was given and keeps what was written; twice the
    passes."""
    prompt, asked = [21, 22, 23, 24], Settings(max_new_tokens=6, block_size=6, cfg_scale=scale)
    watched = Watched()
    (answer,) = sample(watched.model, [prompt], asked)
    (plain,) = sample(Watched().model, [prompt], dataclasses.replace(asked, cfg_scale=0.0))
    assert answer.passes == 2 * plain.passes == len(watched.shown) == 12
    states = watched.canvases(10)
    for seeing, blind in zip(states[::2], states[1::2], strict=True):
        assert seeing[:4] == prompt and blind[:4] == [MASK] * 4 and blind[4:] == seeing[4:]
    (once,) = sample(watched.model, [prompt], dataclasses.replace(asked, threshold=0.0))
    with torch.no_grad():
        seen_SV, blind_SV = (watched.model.logits(watched.model.hidden(torch.tensor([s])))[0, 4:] for s in states[:2])
    guided_SV = (1 + scale) * seen_SV - scale * blind_SV
    guided_SV[:, MASK] = -torch.inf
    assert once.token_ids == guided_SV.argmax(-1).tolist()


@settings(max_examples=15)
@given(PROMPT, st.integers(1, 8), st.floats(0.01, 4), st.sampled_from([0.0, 0.9]))
@torch.no_grad()
def test_guided_logits_are_linear_in_the_scale(prompt, new, scale, temperature) -> None:
    """Law: what is proposed from is (1 + w) z_c - w z_u at every step, whatever is drawn."""
    asked = Settings(max_new_tokens=new, block_size=new, cfg_scale=scale, temperature=temperature)
    watched, proposed, propose = Watched(), [], sampler.propose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampler, "propose", lambda z, *rest, **named: proposed.append(z.clone()) or propose(z, *rest, **named)
        )
        sample(watched.model, [prompt], asked)
    shown = [ids_1S.clone() for ids_1S in watched.shown]
    assert len(shown) == 2 * len(proposed) == 2 * new
    for found_MV, seeing_1S, blind_1S in zip(proposed, shown[::2], shown[1::2], strict=True):
        masked_1S = seeing_1S == MASK
        seen_MV, blind_MV = (watched.model.logits(watched.model.hidden(x)[masked_1S]) for x in (seeing_1S, blind_1S))
        wanted_MV = (1 + scale) * seen_MV - scale * blind_MV
        wanted_MV[:, MASK] = -torch.inf
        torch.testing.assert_close(found_MV, wanted_MV, atol=1e-3, rtol=1e-4)


def test_guidance_by_nothing_is_none() -> None:
    """Law: where both passes see the same, no scale changes anything."""
    text = [[MASK] * 7]
    plain, guided = (fill(Watched().model, text, Settings(cfg_scale=scale))[0] for scale in (0.0, 3.0))
    assert guided.token_ids == plain.token_ids
    assert guided.passes == 2 * plain.passes


def test_a_random_order_is_the_same_for_another_model() -> None:
    """Law: random remasking looks at no logit: same seed, other weights, same positions."""
    asked = Settings(max_new_tokens=12, block_size=12, remasking="random", seed=3)
    orders = []
    for seed in (7, 8):
        (answer,) = sample(Watched(seed=seed).model, [[21, 22]], asked)
        orders.append([[place for place, _ in step] for step in answer.steps])
    assert orders[0] == orders[1]
    (other,) = sample(Watched().model, [[21, 22]], dataclasses.replace(asked, seed=4))
    assert [[place for place, _ in step] for step in other.steps] != orders[0]


@settings(max_examples=6)
@given(PROMPT, st.sampled_from([3, 12, 40]), st.integers(1, 6))
def test_what_comes_after_the_end_never_shows(prompt, every, size) -> None:
    """Law: a response is what was written up to the first end token; stopping early changes no text."""
    for context, write in (
        ("full", sample),
        ("block", sample),
        ("causal", decode_seeded),
        ("causal", decode_causally),
        ("causal", speculate_on_itself),
    ):
        model = Watched(context).model
        model.eos_ids = set(range(0, 640, every))
        asked = Settings(max_new_tokens=10, block_size=size)
        stopped, whole = (write(model, [prompt], dataclasses.replace(asked, early_stop=s))[0] for s in (True, False))
        assert stopped.token_ids == whole.token_ids
        assert stopped.passes <= whole.passes
        assert model.eos_ids.isdisjoint(stopped.token_ids[:-1])
        assert stopped.stopped == (stopped.token_ids[-1] in model.eos_ids)


@settings(max_examples=8)
@given(PROMPT, st.integers(1, 6), st.integers(1, 12))
def test_self_speculation_counts_its_passes(prompt, size, new) -> None:
    """Laws: greedy ids; 1 + 2 iterations passes; 1 to B tokens each; blocks of one take two passes per token."""
    model, asked = Watched("causal").model, Settings(max_new_tokens=new, block_size=size)
    (spec,), (plain,) = (write(model, [prompt], asked) for write in (speculate_on_itself, decode_causally))
    assert spec.token_ids == plain.token_ids
    assert plain.passes == new  # one token per pass, the first from the prompt's
    assert all(1 <= len(step) <= size for step in spec.steps[1:])
    assert spec.passes == 1 + 2 * (len(spec.steps) - 1)
    if size == 1:
        assert spec.passes == 1 + 2 * (new - 1)


@pytest.mark.parametrize("write", [decode_seeded, speculate_on_itself, decode_causally])
def test_keys_and_values_of_finished_text_are_a_plain_causal_pass(write, monkeypatch) -> None:
    """Law: what the cache holds of finished columns is what a pass over the finished text would leave there."""
    caches, made = [], transformers_lm.CanvasCache
    monkeypatch.setattr(transformers_lm, "CanvasCache", lambda places: caches.append(made(places)) or caches[-1])
    model, prompt = Watched("causal").model, [21, 22, 23, 24, 25]
    (answer,) = write(model, [prompt], Settings(max_new_tokens=12, block_size=4, early_stop=False))
    finished = len(prompt) + 8  # the last block is never run again
    fresh = made(torch.arange(finished)[None])
    with torch.no_grad():
        model.cached_hidden(
            torch.tensor([[*prompt, *answer.token_ids[:8]]]),
            torch.arange(finished)[None],
            torch.ones(1, finished, finished, dtype=torch.bool).tril(),
            fresh,
        )
    for layer in range(2):
        for kept, plain in zip(caches[0].layer(layer), fresh.layer(layer), strict=True):
            torch.testing.assert_close(kept[:, :, :finished], plain, atol=1e-5, rtol=1e-4)
