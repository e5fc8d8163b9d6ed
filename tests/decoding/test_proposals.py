"""What is proposed at masked positions: frequencies, scores, and what affects neither."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding.proposals import propose

DRAWS = 20_000
LOGITS = torch.tensor([1.5, 0.2, -0.7, 0.9, -2.0])
CHI2_4 = 23.5
"""Exceeded by chance once in 10 000 runs, at 4 degrees of freedom."""


def proposed(logits_MV: torch.Tensor, seed: int = 0, counts=None, **changes):
    options = {"temperature": 0.0, "top_p": 1.0, "remasking": "low_confidence", **changes}
    counts = counts or [len(logits_MV)]
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(counts))]
    return propose(logits_MV, counts, generators, **options)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_tokens_come_as_often_as_the_tempered_softmax_says(temperature, top_p) -> None:
    """Law: argmax of z / T + Gumbel noise is a draw from softmax(z / T), here cut to the nucleus."""
    token_M, _ = proposed(LOGITS.expand(DRAWS, -1), temperature=temperature, top_p=top_p)
    chance_V = torch.softmax(LOGITS / temperature, 0)
    if top_p < 1:
        chance_V[[1, 2, 4]] = 0  # tokens 0 and 3 hold .51 + .28: the smallest set above .7
        chance_V /= chance_V.sum()
    found_V = torch.bincount(token_M, minlength=5)
    kept_V = chance_V > 0
    assert not found_V[~kept_V].any()
    expected_V = DRAWS * chance_V[kept_V]
    assert ((found_V[kept_V] - expected_V) ** 2 / expected_V).sum() < CHI2_4


def test_at_temperature_0_no_seed_has_a_say_and_above_each_draws_its_own() -> None:
    """Law: T = 0 is the argmax; T > 0 is a function of the seed."""
    logits_MV = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(proposed(logits_MV, 0)[0], logits_MV.argmax(-1))
    assert torch.equal(proposed(logits_MV, 0)[0], proposed(logits_MV, 9)[0])
    hot = [proposed(logits_MV, seed, temperature=1.0)[0] for seed in (0, 0, 9)]
    assert torch.equal(hot[0], hot[1])
    assert not torch.equal(hot[0], hot[2])


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["low_confidence", "entropy", "margin"]), st.floats(0, 2))
def test_scores_are_of_the_logits_as_they_are(seed, remasking, temperature) -> None:
    """Law: temperature changes what is drawn, not how sure the model is of it."""
    logits_MV = 3 * torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
    logits_MV[:, 4] = -torch.inf  # the mask token
    token_M, score_M = proposed(logits_MV, seed, temperature=temperature, remasking=remasking)
    chance_MV = torch.softmax(logits_MV.double(), -1)
    best_MV = chance_MV.sort(-1, descending=True).values
    expected = {
        "low_confidence": chance_MV[torch.arange(6), token_M],
        "entropy": torch.xlogy(chance_MV, chance_MV).sum(-1),
        "margin": best_MV[:, 0] - best_MV[:, 1],
    }[remasking]
    torch.testing.assert_close(score_M.double(), expected, atol=1e-5, rtol=1e-4)
    assert (token_M != 4).all()


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.floats(0.05, 5), st.integers(1, 6), st.integers(2, 40))
def test_a_draw_is_the_best_of_tempered_logits_and_gumbel_noise(seed, temperature, places, words) -> None:
    """Law: token = argmax of z / T - log(-log u), u from the row's own generator, all in float64."""
    logits_MV = 3 * torch.randn(places, words, generator=torch.Generator().manual_seed(seed + 1))
    token_M, _ = proposed(logits_MV, seed, temperature=temperature)
    u_MV = torch.rand(places, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wish_MV = logits_MV.double() / temperature - torch.log(-torch.log(u_MV))
    assert torch.equal(token_M, wish_MV.argmax(-1))


def test_a_draw_of_zero_is_no_infinite_wish(monkeypatch) -> None:
    """Law: u = 0 is left out of the Gumbel draw: where all are alike the likeliest token is taken."""
    from dllm.decoding.proposals import _gumbel

    monkeypatch.setattr(torch, "rand", lambda *size, **named: torch.zeros(size, dtype=named["dtype"]))
    logits_MV = torch.tensor([[0.0, 3.0, 1.0]])
    assert _gumbel(logits_MV, [1], [torch.Generator()]).isfinite().all()
    token_M, score_M = proposed(logits_MV, temperature=1.0)
    assert token_M.tolist() == [1] and score_M.isfinite().all()


@settings(max_examples=25)
@given(st.integers(0, 2**20), st.floats(0, 2), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(2, 20))
def test_permuted_logits_leave_a_random_order_as_it_is(seed, temperature, counts, words) -> None:
    """Law: the same seed and permuted logits give the same scores, and so the same positions, row by row."""
    generator = torch.Generator().manual_seed(seed)
    logits_MV = torch.randn(sum(counts), words, generator=generator)
    order_V, order_M = (torch.randperm(n, generator=generator) for n in (words, sum(counts)))
    found = [
        proposed(x, seed, counts, temperature=temperature, remasking="random")[1]
        for x in (logits_MV, logits_MV[:, order_V], logits_MV[order_M], 9 * logits_MV)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_random_order_looks_at_no_logit() -> None:
    """Law: random remasking orders positions alike whatever the model says."""
    one, other = (torch.randn(40, 7, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for temperature in (0.0, 1.0):
        scores = [proposed(x, 5, temperature=temperature, remasking="random")[1] for x in (one, other, one.flip(0))]
        assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], proposed(one, 6, temperature=1.0, remasking="random")[1])
    # Uniform: its mean is within five standard errors of 1/2.
    long = proposed(torch.zeros(4000, 2), 0, remasking="random")[1]
    assert abs(float(long.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 4000)


def test_rows_draw_from_their_own_numbers() -> None:
    """Law: permuted rows get permuted draws, and a row alone gets what it gets in a batch."""
    logits_MV = torch.randn(5, 11, generator=torch.Generator().manual_seed(3))
    for remasking in ("low_confidence", "random"):
        both = proposed(logits_MV, 0, [2, 3], temperature=1.0, remasking=remasking)
        first = proposed(logits_MV[:2], 0, [2], temperature=1.0, remasking=remasking)
        second = proposed(logits_MV[2:], 1, [3], temperature=1.0, remasking=remasking)
        for found, one, other in zip(both, first, second, strict=True):
            assert torch.equal(found, torch.cat([one, other]))
