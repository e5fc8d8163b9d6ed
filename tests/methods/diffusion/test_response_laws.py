"""Laws of whole responses, whatever the sampler: what they never hold, where they end, and what they depend on."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm.decoding.causal import decode_causally, decode_seeded, speculate_on_itself
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import fill, sample
from dllm.methods.diffusion.responses import Generated, figures
from dllm.models.diffusion.protocol import DiffusionLM
from tests.decoding.watched import PROMPT, Watched, wishes
from tests.models.small_models import MASK

WAYS = [
    ("full", sample),
    ("block", sample),
    ("causal", sample),
    ("causal", decode_seeded),
    ("causal", decode_causally),
    ("causal", speculate_on_itself),
]
PLAIN = Settings(max_new_tokens=12, block_size=6)
TEXT = st.lists(st.integers(10, 400) | st.just(MASK), min_size=1, max_size=12)
PART = st.tuples(st.integers(10, 400), TEXT).map(lambda pair: [pair[0], *pair[1]])  # masks alone are equally sure
CONTEXT = st.sampled_from(["full", "block", "causal"])
EDITS = st.sampled_from([None, 0.05, 0.3])


def fitted(asked: Settings, write, edits: float | None = None) -> Settings:
    """Leave out what a way of writing refuses."""
    if write is speculate_on_itself:
        asked = dataclasses.replace(asked, temperature=0.0)
    return dataclasses.replace(asked, editing_threshold=edits if write is sample else None)


def wants_masks(model: DiffusionLM) -> None:
    """Make the mask token the likeliest of all everywhere."""
    plain = model.logits
    model.logits = lambda hidden: plain(hidden).index_fill(-1, torch.tensor([MASK]), 1e3)  # type: ignore[method-assign]


@settings(max_examples=8)
@given(PROMPT, wishes(), EDITS)
def test_no_response_holds_the_mask_token_however_likely_it_is(prompt, asked, edits) -> None:
    """Law: the mask is never proposed, and a response without end tokens has all of its length."""
    for context, write in WAYS:
        watched = Watched(context)
        wants_masks(watched.model)
        (answer,) = write(watched.model, [prompt], fitted(asked, write, edits))
        assert MASK not in answer.token_ids
        assert len(answer.token_ids) == asked.max_new_tokens


@settings(max_examples=15)
@given(TEXT, wishes())
def test_nothing_is_filled_by_the_mask_token_however_likely_it_is(text, asked) -> None:
    """Law: the same where the masks lie inside a text."""
    watched = Watched()
    wants_masks(watched.model)
    (answer,) = fill(watched.model, [text], asked)
    assert MASK not in answer.token_ids and len(answer.token_ids) == len(text)


@settings(max_examples=40)
@given(PROMPT, wishes(), EDITS, st.sampled_from([2, 5, 12, 40]), st.sampled_from(WAYS))
@example([20, 21], PLAIN, None, 2, WAYS[0])  # an end token is written before what is to come before it
@example([21, 22], PLAIN, 0.05, 2, WAYS[1])  # an end token is written, and taken back by an edit
def test_a_response_is_what_would_be_written_up_to_the_first_end_token(prompt, asked, edits, every, way) -> None:
    """Law: the same model without end tokens writes the same and goes on; what follows never shows."""
    (context, write), ends = way, set(range(0, 640, every))
    model, wish = Watched(context).model, fitted(asked, write, edits)
    (endless,) = write(model, [prompt], wish)
    first = next((place for place, token in enumerate(endless.token_ids) if token in ends), None)
    model.eos_ids = ends
    for early in (True, False):
        (answer,) = write(model, [prompt], dataclasses.replace(wish, early_stop=early))
        assert answer.token_ids == endless.token_ids[: None if first is None else first + 1]
        assert answer.stopped == (first is not None)


@settings(max_examples=20)
@given(st.lists(PROMPT, min_size=2, max_size=4, unique_by=tuple), wishes(temperatures=(0.0,)), EDITS, CONTEXT)
@example([[10], [10, 10]], Settings(max_new_tokens=2, steps=2, block_size=2), None, "block")  # two blocks, and one
def test_a_batch_is_its_single_runs(prompts, asked, edits, context) -> None:
    """Law: ragged prompts together get what each gets alone: ids, steps and passes."""
    model, wish = Watched(context).model, fitted(asked, sample, edits)
    assert sample(model, prompts, wish) == [sample(model, [prompt], wish)[0] for prompt in prompts]


@settings(max_examples=20)
@given(st.lists(PART, min_size=2, max_size=4, unique_by=tuple), wishes(), st.sampled_from(["none", "prefix", "dual"]))
@example([[MASK, 10, MASK, 11], [MASK, MASK, 12]], Settings(block_size=2, steps=2), "none")
def test_texts_are_filled_together_as_each_alone(texts, asked, cache) -> None:
    """Law: the same for masks inside ragged texts: their blocks are their own, and so are their steps."""
    model, asked = Watched().model, dataclasses.replace(asked, cache=cache)
    assert fill(model, texts, asked) == [fill(model, [text], asked)[0] for text in texts]


@settings(max_examples=15)
@given(st.data(), st.lists(PROMPT, min_size=2, max_size=4, unique_by=tuple), wishes(temperatures=(0.9,)), CONTEXT)
def test_permuted_prompts_get_permuted_responses(data, prompts, asked, context) -> None:
    """Law: rows keep their own random numbers wherever they stand."""
    model = Watched(context).model
    order = data.draw(st.permutations(range(len(prompts))))
    answers = sample(model, prompts, asked)
    assert sample(model, [prompts[row] for row in order], asked) == [answers[row] for row in order]


@settings(max_examples=6)
@given(PROMPT, wishes(temperatures=(0.0,)), st.integers(0, 10**6))
def test_greedy_responses_follow_no_seed_and_drawn_ones_theirs(prompt, asked, seed) -> None:
    """Law: T = 0: no seed matters, unless the order is random; T > 0: the same seed gives the same response."""
    for context, write in WAYS:
        model = Watched(context).model
        wish, other = (fitted(dataclasses.replace(asked, seed=s), write) for s in (asked.seed, seed))
        if asked.remasking != "random" or write is decode_causally:
            assert write(model, [prompt], wish) == write(model, [prompt], other)
        if write is not speculate_on_itself:
            hot = dataclasses.replace(wish, temperature=0.9)
            assert write(model, [prompt], hot) == write(model, [prompt], hot)


@settings(max_examples=15)
@given(PROMPT, st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_random_order_is_the_same_for_any_model(prompt, new, size, seed, weights) -> None:
    """Law: random remasking looks at no logit: same seed, other weights, same positions."""
    asked = Settings(max_new_tokens=new, block_size=size, remasking="random", seed=seed)
    answers = [sample(Watched(seed=other).model, [prompt], asked)[0] for other in (7, weights)]
    one, other = ([[place for place, _ in step] for step in answer.steps] for answer in answers)
    assert one == other


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_tokens_per_pass_are_all_tokens_over_all_passes(costs) -> None:
    """Law: sums are divided, not rates averaged."""
    found = figures(
        [Generated(str(n), "", "a", tokens, passes, 0.5) for n, (tokens, passes) in enumerate(costs)], set()
    )
    tokens, passes = (sum(each) for each in zip(*costs, strict=True))
    assert found["tokens"] == tokens
    assert found["tokens_per_pass"] == pytest.approx(tokens / passes)
    assert found["tokens_per_s"] == pytest.approx(2 * tokens / len(costs))
