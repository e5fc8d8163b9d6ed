"""Properties of the number of tokens committed per pass over whole responses: plans, thresholds, entropy bounds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.causal import decode_seeded
from dllm.decoding.rules import plan, planned_counts
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ConfigError
from tests.decoding.watched import PROMPT, Watched
from tests.models.small_models import MASK

NEW = st.integers(1, 12)
CONTEXT = st.sampled_from(["full", "block", "causal"])


def blocks_of(prompt: list[int], new: int, size: int, context: str) -> int:
    """Count the blocks of a response; block-causal grids begin with the prompt."""
    return -(-(new + (len(prompt) % size if context == "block" else 0)) // size)


@torch.no_grad()
def masked_logits(watched: Watched, number: int, width: int) -> torch.Tensor:
    """Say what a pass over a whole canvas made of its masked positions. Shapes: returns logits_MV."""
    ids_SK = watched.shown[number]
    assert ids_SK.shape == (1, width)
    logits_MV = watched.model.logits(watched.model.hidden(ids_SK)[ids_SK == MASK])
    watched.shown.pop()  # our own pass
    logits_MV[:, MASK] = -torch.inf
    return logits_MV


@settings(max_examples=15)
@given(PROMPT, NEW, st.sampled_from(["full", "causal"]))
def test_as_many_steps_as_masks_write_one_token_each(prompt, new, context) -> None:
    """Law: S = m in one block is exactly one token per step, and m passes."""
    for write in (sample, decode_seeded)[: 2 if context == "causal" else 1]:
        (answer,) = write(Watched(context).model, [prompt], Settings(max_new_tokens=new, steps=new, block_size=new))
        assert [len(step) for step in answer.steps] == [1] * new
        assert answer.passes == new


@settings(max_examples=15)
@given(PROMPT, st.integers(2, 12), st.integers(1, 12), st.sampled_from(["even", "cosine"]))
def test_a_plan_is_followed_to_the_letter(prompt, new, steps, schedule) -> None:
    """Law: in one block step j commits what the plan has for it; steps that would write none are left out."""
    steps = min(steps, new)
    asked = Settings(max_new_tokens=new, steps=steps, block_size=new, schedule=schedule)
    (answer,) = sample(Watched().model, [prompt], asked)
    counts = [len(step) for step in answer.steps]
    assert counts == plan(new, steps, schedule)
    assert counts == planned_counts(new, steps) or schedule == "cosine"
    (seeded,) = decode_seeded(Watched("causal").model, [prompt], asked)  # the seed is beside the plan
    assert [len(step) for step in seeded.steps] == [1, *plan(new - 1, steps, schedule)]


@settings(max_examples=15)
@given(PROMPT, NEW, st.integers(1, 6), CONTEXT, st.sampled_from([0.4, 20.0]))
def test_thresholds_nothing_can_miss_or_pass(prompt, new, size, context, scale) -> None:
    """Laws: tau = 0 commits a block per pass; tau = 1 one token per pass, even where probabilities are 1 in float32;
    others are refused."""
    blocks = blocks_of(prompt, new, size, context)
    for tau, passes in ((0.0, blocks), (1.0, new)):
        asked = Settings(max_new_tokens=new, block_size=size, threshold=tau)
        (answer,) = sample(Watched(context, scale=scale).model, [prompt], asked)
        assert answer.passes == passes
    for tau in (-1.0, 1.5):
        with pytest.raises(ConfigError, match="threshold must be at"):
            Settings(threshold=tau)


@settings(max_examples=15)
@given(PROMPT, NEW, st.integers(1, 12), st.floats(0, 0.5))
def test_a_threshold_beside_a_plan_commits_the_larger_number(prompt, new, steps, tau) -> None:
    """Law: top-k fallback: max(number above tau, planned) of the masked, and so never fewer than planned."""
    watched, steps = Watched(), min(steps, new)
    asked = Settings(max_new_tokens=new, steps=steps, block_size=new, threshold=tau)
    (answer,) = sample(watched.model, [prompt], asked)
    left, planned = new, planned_counts(new, steps)
    for number, step in enumerate(answer.steps):
        score_M = masked_logits(watched, number, len(prompt) + new).softmax(-1).amax(-1)
        assert len(score_M) == left
        least = planned[number] if number < len(planned) else 1
        assert len(step) == min(max(int((score_M > tau).sum()), least), left) >= min(least, left)
        left -= len(step)
    assert left == 0


@settings(max_examples=15)
@given(PROMPT, NEW, st.floats(0, 25))
def test_an_entropy_bound_commits_those_of_least_entropy(prompt, new, bound) -> None:
    """Law: of each pass the positions of least entropy, as many as the bound allows."""
    watched = Watched()
    asked = Settings(max_new_tokens=new, block_size=new, remasking="entropy", entropy_bound=bound)
    (answer,) = sample(watched.model, [prompt], asked)
    left = list(range(new))
    for number, step in enumerate(answer.steps):
        entropy_M = torch.distributions.Categorical(
            logits=masked_logits(watched, number, len(prompt) + new).clamp_min(-1e9)
        ).entropy()
        ranked = entropy_M.sort().values.tolist()
        assert len(step) == sum(sum(ranked[:count]) <= bound for count in range(len(ranked)))
        surest = entropy_M.argsort()[: len(step)].tolist()
        assert sorted(left[place] for place in surest) == [place for place, _ in step]
        left = [place for place in left if place not in dict(step)]
    assert not left


@settings(max_examples=10)
@given(PROMPT, NEW, st.integers(1, 6), CONTEXT)
def test_entropy_bounds_nothing_can_pass_or_miss(prompt, new, size, context) -> None:
    """Laws: a huge bound writes a block per pass, 0 one token per pass; so does each of seeded blocks."""
    asked = Settings(max_new_tokens=new, block_size=size, remasking="entropy")
    for bound, passes in ((1e9, blocks_of(prompt, new, size, context)), (0.0, new)):
        wish = dataclasses.replace(asked, entropy_bound=bound)
        (answer,) = sample(Watched(context).model, [prompt], wish)
        assert answer.passes == passes
        if context == "causal":
            (seeded,) = decode_seeded(Watched(context).model, [prompt], wish)
            lengths = [min(size, new - begin) for begin in range(0, new, size)]
            whole = [count for length in lengths for count in (1, length - 1) if count]
            assert [len(step) for step in seeded.steps] == (whole if bound else [1] * new)


def test_rules_that_do_not_go_together_are_refused() -> None:
    """One rule at a time; entropy bounds want the order of entropies; a schedule wants a plan that is followed."""
    for wish, message in [
        ({"entropy_bound": 1.0}, "take remasking entropy"),
        ({"entropy_bound": -1.0, "remasking": "entropy"}, "must be at least 0"),
        ({"entropy_bound": 1.0, "factor": 1.0}, "exclude each other"),
        ({"entropy_bound": 1.0, "threshold": 0.5}, "exclude each other"),
        ({"schedule": "cosine", "factor": 1.0}, "and there is none"),
        ({"schedule": "cosine", "threshold": 0.5}, "and there is none"),
        ({"schedule": "cosine", "entropy_bound": 1.0, "remasking": "entropy"}, "and there is none"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            Settings(**wish)
        assert "\n" not in str(caught.value)
    Settings(schedule="cosine", threshold=0.5, steps=4)
