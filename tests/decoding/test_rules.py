"""How many tokens a step commits: the laws of each rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.rules import (
    best,
    cosine,
    derived_counts,
    entropy_bound_counts,
    factor_counts,
    plan,
    planned_counts,
    threshold_counts,
    transfer_shares,
)

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


@given(st.integers(0, 200), st.integers(1, 60))
def test_a_plan_spends_all_masks_evenly_and_early(masks: int, steps: int) -> None:
    plan = planned_counts(masks, steps)
    assert sum(plan) == masks
    assert len(plan) == steps
    assert max(plan) - min(plan) <= 1
    assert plan == sorted(plan, reverse=True)


@given(st.integers(0, 200), st.integers(1, 60))
def test_each_step_of_an_even_plan_takes_its_share_of_what_is_left(masks: int, steps: int) -> None:
    """Law: step j of S unmasks 1 / (S - j + 1) of what is masked, rounded up: the transfer share of linear noise."""
    left = masks
    for step, count in enumerate(planned_counts(masks, steps)):
        assert count == -(-left // (steps - step))
        left -= count
    shares = transfer_shares(steps, lambda t: 1 - t)
    assert shares == pytest.approx([1 / (steps - step) for step in range(steps)])
    assert sorted(derived_counts(masks, steps, lambda t: 1 - t), reverse=True) == [
        count for count in planned_counts(masks, steps) if count
    ]


@given(st.integers(0, 200), st.integers(1, 60), st.floats(0.1, 4))
def test_a_plan_from_a_noise_schedule_spends_all_masks(masks: int, steps: int, power: float) -> None:
    """Law: any alpha that falls from 1 to 0: the last step takes all, so counts add up; no step is in vain."""
    for alpha in (cosine, lambda t: 1 - t**power):
        counts = derived_counts(masks, steps, alpha)
        assert sum(counts) == masks
        assert all(counts) and len(counts) <= steps
        assert transfer_shares(steps, alpha)[-1] == 1
    left, kept = masks, []
    for share in transfer_shares(steps, cosine):
        kept.append(round(left * share))
        left -= kept[-1]
    assert derived_counts(masks, steps, cosine) == [count for count in kept if count]


@given(st.integers(1, 200), st.integers(1, 60))
def test_a_cosine_plan_writes_fewer_first(masks: int, steps: int) -> None:
    """Law: while much is masked, little is written: at every time no more than the even plan has written by then."""
    steps = min(masks, steps)
    found = plan(masks, steps, "cosine")
    half = len(found) // 2
    assert found[0] <= planned_counts(masks, steps)[0]
    assert sum(found[:half]) <= sum(found[len(found) - half :])
    assert found[0] < found[-1] or masks < 3 * steps or steps == 1
    assert plan(masks, steps, "even") == planned_counts(masks, steps)
    assert plan(masks, masks + steps, "even") == [1] * masks


@given(SCORES, st.floats(-1, 1), st.floats(-1, 1))
def test_a_lower_threshold_commits_more(scores: list[float], one: float, other: float) -> None:
    score, least = torch.tensor([scores]), torch.tensor([1])
    low, high = sorted((one, other))
    assert threshold_counts(score, low, least) >= threshold_counts(score, high, least) >= 1


def chosen(score: torch.Tensor, count: torch.Tensor) -> set[int]:
    """Say which positions of the only row are committed."""
    return set(best(score, count)[0].nonzero()[:, 0].tolist())


@given(SCORES, st.floats(-1, 1), st.floats(-1, 1), st.floats(0.01, 20), st.floats(0.01, 20))
def test_from_the_same_state_a_laxer_rule_commits_the_same_positions_and_more(
    scores: list[float], one: float, other: float, narrow: float, wide: float
) -> None:
    """Law: the accepted set, not only its size, grows as the threshold falls, and as the factor rises."""
    score, least = torch.tensor([scores]), torch.tensor([1])
    low, high = sorted((one, other))
    assert chosen(score, threshold_counts(score, low, least)) >= chosen(score, threshold_counts(score, high, least))
    narrow, wide = sorted((narrow, wide))
    assert chosen(score, factor_counts(score, wide)) >= chosen(score, factor_counts(score, narrow))


@given(SCORES, st.integers(0, 3), st.floats(-1, 1, width=32), st.integers(1, 15))
def test_a_threshold_with_a_least_commits_no_fewer(scores: list[float], written: int, tau: float, k: int) -> None:
    """Law: top-k fallback: max(number above the threshold, k), of m masks at most m, so at least min(k, m)."""
    score = torch.tensor([[*scores, *[float("-inf")] * written]])
    found = chosen(score, threshold_counts(score, tau, torch.tensor([k])))
    masked = len(scores)
    above = sum(value > tau for value in score[0, :masked].tolist())
    assert len(found) == min(max(above, k), masked) >= min(k, masked)
    assert found >= {place for place in range(masked) if score[0, place] > tau}


@given(st.lists(st.floats(0, 7, width=32), min_size=1, max_size=12), st.floats(0, 20), st.floats(0, 20))
def test_the_entropy_bound_takes_all_but_the_last_within_it(entropies, one, other) -> None:
    """Law: k = #{j: sum of H_(l) over l < j <= bound} >= 1; monotone in the bound; 0 takes one where H > 0."""
    low, high = sorted((one, other))
    ranked = sorted(entropies)
    entropy = torch.tensor([[*entropies, float("inf")]])
    wanted = sum(sum(ranked[:j]) <= low for j in range(len(ranked)))
    assert entropy_bound_counts(entropy, low).tolist() == [wanted]
    assert 1 <= wanted <= entropy_bound_counts(entropy, high).item() <= len(entropies)
    assert entropy_bound_counts(entropy, 1e9).tolist() == [len(entropies)]
    if min(entropies) > 0:
        assert entropy_bound_counts(entropy, 0.0).tolist() == [1]
    assert entropy_bound_counts(torch.full((1, 3), float("inf")), low).tolist() == [1]  # `best` then takes none


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
    """Sum a joint over all but some positions."""
    rest = [place for place in range(joint.dim()) if place not in places]
    return joint.sum(rest) if rest else joint


@settings(max_examples=100)
@given(st.integers(2, 3), st.integers(0, 2**31), st.floats(1, 40), st.floats(0.05, 1))
def test_what_the_factor_rule_takes_together_is_the_joints_own_choice(places, seed, sharpness, factor) -> None:
    """Law: factor guarantee, Fast-dLLM theorem 1: at most 1, the best of each position are the best of all together."""
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


def test_beyond_the_guarantee_the_best_of_each_position_may_not_be_the_best_together() -> None:
    """A joint over two positions whose likeliest pair is (1, 1), while 0 is likelier at the first position."""
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
