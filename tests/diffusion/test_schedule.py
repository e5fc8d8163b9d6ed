"""How many tokens a step commits: the laws of each rule."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.diffusion.schedule import best, factor_counts, planned_counts, threshold_counts

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


@given(st.integers(0, 200), st.integers(1, 60))
def test_a_plan_spends_all_masks_evenly_and_early(masks: int, steps: int) -> None:
    plan = planned_counts(masks, steps)
    assert sum(plan) == masks
    assert len(plan) == steps
    assert max(plan) - min(plan) <= 1
    assert plan == sorted(plan, reverse=True)


@given(SCORES, st.floats(-1, 1), st.floats(-1, 1))
def test_a_lower_threshold_commits_more(scores: list[float], one: float, other: float) -> None:
    score, least = torch.tensor([scores]), torch.tensor([1])
    low, high = sorted((one, other))
    assert threshold_counts(score, low, least) >= threshold_counts(score, high, least) >= 1


def test_at_threshold_1_saturated_probabilities_still_go_one_by_one() -> None:
    assert threshold_counts(torch.ones(1, 5), 1.0, torch.tensor([1])).tolist() == [1]
    assert threshold_counts(torch.ones(1, 5), -1.0, torch.tensor([1])).tolist() == [5]


@given(SCORES, st.floats(0.01, 20), st.floats(0.01, 20))
def test_the_factor_rule_takes_the_longest_prefix_that_passes(scores: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    ranked = torch.tensor(sorted(scores, reverse=True)).double().tolist()
    passing = [n for n, c in enumerate(ranked, 1) if (n + 1) * (1 - c) < low]
    assert factor_counts(torch.tensor([scores]), low).tolist() == [max(passing, default=1)]
    assert factor_counts(torch.tensor([scores]), high) >= factor_counts(torch.tensor([scores]), low)
    assert factor_counts(torch.tensor([scores]), len(scores) + 1.01).tolist() == [len(scores)]


def marginal(joint: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Sum a joint over all but some places."""
    rest = [place for place in range(joint.dim()) if place not in places]
    return joint.sum(rest) if rest else joint


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 3), st.integers(0, 2**31), st.floats(1, 40), st.floats(0.05, 1))
def test_what_the_factor_rule_takes_together_is_the_joints_own_choice(places, seed, sharpness, factor) -> None:
    """Law: factor guarantee, Fast-dLLM theorem 1: at most 1, the best of each place are the best of all together."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand((3,) * places, generator=generator, dtype=torch.float64) ** sharpness
    joint /= joint.sum()
    best_of_each = [marginal(joint, [place]).max(0) for place in range(places)]
    scores = torch.stack([found.values for found in best_of_each])[None]
    count = int(factor_counts(scores, factor))
    taken = best(scores, torch.tensor([count]))[0].nonzero()[:, 0].tolist()
    if count > 1:
        assert (count + 1) * (1 - float(scores[0, taken].min())) < 1
    together = marginal(joint, taken)
    assert together[tuple(int(best_of_each[place].indices) for place in taken)] == together.max()


def test_beyond_the_guarantee_the_best_of_each_place_may_not_be_the_best_together() -> None:
    """A joint over two places whose likeliest pair is (1, 1), while place by place 0 is likelier at the first."""
    joint = torch.tensor([[0.3, 0.3], [0.0, 0.4]], dtype=torch.float64)
    scores = torch.stack([marginal(joint, [place]).max(0).values for place in (0, 1)])[None]  # .6 and .7
    assert factor_counts(scores, 1.0).tolist() == [1]
    assert factor_counts(scores, 2.0).tolist() == [2]
    assert joint.argmax() == 3 and marginal(joint, [0]).argmax() == 0


@given(SCORES, st.integers(0, 12))
def test_the_best_are_the_best(scores: list[float], count: int) -> None:
    score = torch.tensor([[*scores, float("-inf")]])
    chosen = best(score, torch.tensor([count]))[0]
    assert int(chosen.sum()) == min(count, len(scores))
    assert not chosen[-1]
    if 0 < count < len(scores):
        assert score[0, :-1][chosen[:-1]].min() >= score[0, :-1][~chosen[:-1]].max()


def test_among_equals_the_leftmost_goes_first() -> None:
    assert best(torch.zeros(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]]
