"""What masks and their weights do to a loss: its mean, its spread, and that no schedule of noise changes the bound."""

import math

import pytest
import torch

from dllm.methods.diffusion.noise import Times, exact_count_noise, noise_generator, uniform_noise
from dllm.training.cross_entropy import weighted_cross_entropy

PLACES = 6
MASKABLE_S, BLOCK_S = torch.ones(PLACES, dtype=torch.bool), torch.zeros(PLACES, dtype=torch.int64)
COST_S = torch.tensor([0.3, 2.0, 1.1, 0.7, 1.6, 0.2], dtype=torch.float64)
"""A cross-entropy of each position, for losses that depend on nothing else."""


def drawn(t: float, generator: torch.Generator, eps: float = 1e-3, at_least_one: bool = False):
    t_K = torch.tensor([t], dtype=torch.float64)
    return uniform_noise(MASKABLE_S, BLOCK_S, t_K, generator, eps=eps, at_least_one=at_least_one)


def estimate(noise, cost_S: torch.Tensor = COST_S) -> float:
    """Sum cost / p over what is masked."""
    return float((cost_S / noise.prob_S.double())[noise.masked_S].sum())


@pytest.mark.parametrize("at_least_one", [False, True])
def test_all_masked_each_position_weighs_one(at_least_one) -> None:
    """Law: at t = 1 the loss is the mean cross-entropy of all positions."""
    noise = drawn(1.0, torch.Generator().manual_seed(0), at_least_one=at_least_one)
    assert noise.masked_S.all()
    assert torch.equal(noise.prob_S, torch.ones(PLACES))
    counted = exact_count_noise(
        MASKABLE_S, BLOCK_S, torch.ones(1).double(), torch.Generator().manual_seed(0), eps=1e-3, block_size=PLACES,
        half_life_ratio=0.25, at_least_one=at_least_one,
    )  # fmt: skip
    assert counted.masked_S.all() and torch.equal(counted.prob_S, torch.ones(PLACES))


@pytest.mark.parametrize("at_least_one", [False, True])
def test_even_logits_cost_ln_v_a_position_on_average(at_least_one) -> None:
    """Law: uniform logits give E[sum of CE / p] / n = ln V at every noise level, and so for the spread of levels."""
    generator, found = torch.Generator().manual_seed(5), []
    for draw in range(1500):
        noise = drawn(draw / 1500, generator, eps=0.05, at_least_one=at_least_one)
        found.append(estimate(noise, torch.full((PLACES,), math.log(50), dtype=torch.float64)) / PLACES)
    found_N = torch.tensor(found)
    assert abs(float(found_N.mean()) - math.log(50)) < 4 * float(found_N.std()) / math.sqrt(len(found))


def test_the_schedule_of_noise_does_not_change_the_bound() -> None:
    """Law: weighted by -a'(t) / (1 - a(t)), any schedule a of clean shares gives the same bound.

    A place's cost depends on how many are masked beside it, as a model's does. Linear: a = 1 - t, weight 1 / t; cosine:
    a = 1 - cos(pi (1 - t) / 2), weight (pi / 2) tan(pi (1 - t) / 2). Exactly, it is the mean over all counts of masks.
    """
    cost = [0.0, 0.4, 0.9, 1.1, 1.6, 2.2, 2.5]
    exact = sum(cost[1:])  # sum over k of n / k * E[k masked places' costs] / n

    def bound(share_masked, slope) -> tuple[float, float]:
        generator, found, steps = torch.Generator().manual_seed(6), [], 2500
        for step in range(steps):
            t = (step + 0.5) / steps
            noise = drawn(share_masked(t), generator, eps=1e-9)
            found.append(slope(t) * estimate(noise, COST_S.new_full((PLACES,), cost[int(noise.masked_S.sum())])))
        found_N = torch.tensor(found)
        return float(found_N.mean()), float(found_N.std()) / math.sqrt(steps)

    linear, linear_error = bound(lambda t: t, lambda t: 1.0)
    cosine, cosine_error = bound(
        lambda t: math.cos(math.pi * (1 - t) / 2), lambda t: math.pi / 2 * math.sin(math.pi * (1 - t) / 2)
    )
    assert abs(linear - exact) < 4 * linear_error < 0.1 * exact
    assert abs(cosine - exact) < 4 * cosine_error < 0.1 * exact


def test_the_loss_is_linear_in_its_weights() -> None:
    """Law: the loss of a u + b v is a times that of u plus b times that of v, and so are its gradients."""
    generator = torch.Generator().manual_seed(1)
    hidden_MD, head_VD = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (8, 12))
    labels_M, u_M, v_M = torch.arange(8), torch.rand(8, generator=generator), torch.rand(8, generator=generator)

    def of(weights_M: torch.Tensor):
        hidden = hidden_MD.clone().requires_grad_()
        loss, _, _ = weighted_cross_entropy(hidden, head_VD, labels_M, weights_M, 3)
        loss.backward()
        return loss.detach(), hidden.grad

    for mixed, one, other in zip(of(2 * u_M + 0.5 * v_M), of(u_M), of(v_M), strict=True):
        torch.testing.assert_close(mixed, 2 * one + 0.5 * other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_pairs_have_the_same_mean_and_less_spread_than_two_draws(t) -> None:
    """Law: a mask and its complement leave the mean where it is and lower the variance, to 0 at p = 1/2."""
    generator, wanted = torch.Generator().manual_seed(7), float(COST_S.sum())
    pairs, twos = [], []
    for _ in range(1200):
        noise = drawn(t, generator, eps=1e-9)
        pairs.append((estimate(noise) + estimate(noise.complement(MASKABLE_S))) / 2)
        twos.append((estimate(noise) + estimate(drawn(1 - t, generator, eps=1e-9))) / 2)
    paired_N, free_N = torch.tensor(pairs), torch.tensor(twos)
    for found_N in (paired_N, free_N):
        assert abs(float(found_N.mean()) - wanted) < 4 * float(free_N.std()) / math.sqrt(len(found_N))
    # A place's variance is 1 / (4 p (1 - p)) - 1 in pairs, and more by 1/2 in two draws at p and 1 - p.
    expected = (1 / (4 * t * (1 - t)) - 1) / (1 / (4 * t * (1 - t)) - 0.5)
    assert float(paired_N.var() / free_N.var()) == pytest.approx(expected, abs=0.1)


def test_spread_levels_have_the_same_mean_and_less_spread_than_free_ones() -> None:
    """Law: low-discrepancy times leave the mean of any function of t where it is and lower a batch's variance."""
    ids = [f"r{row}" for row in range(16)]
    spreads = {}
    for spread in (True, False):
        times = Times(ids, 3, "train", spread)
        means = []
        for epoch in range(150):
            levels = [times.of(row, epoch, 1, noise_generator(3, "train", epoch, ids[row])) for row in range(16)]
            means.append(float(torch.cat(levels).square().mean()))
        means_N = torch.tensor(means)
        assert abs(float(means_N.mean()) - 1 / 3) < 4 * 0.3 / math.sqrt(16 * 150)
        spreads[spread] = float(means_N.var())
    assert spreads[True] < 0.2 * spreads[False]
