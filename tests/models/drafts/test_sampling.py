"""Draft tokens are drawn from the distribution that is returned with them."""

import torch

from dllm.models.drafts.proposal import Sampling


def sampling(temperature: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(temperature, torch.Generator().manual_seed(seed))


def test_draws_follow_the_distribution_and_never_leave_it() -> None:
    probs_V = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    drawn = sampling().draw(probs_V.expand(20000, -1))
    shares_V = drawn.bincount(minlength=6) / 20000
    assert shares_V[probs_V == 0].sum() == 0
    torch.testing.assert_close(shares_V, probs_V, atol=0.015, rtol=0)  # four standard errors


def test_a_row_takes_one_number_so_that_draws_one_by_one_are_the_same() -> None:
    probs_PV = torch.softmax(torch.randn(5, 40, generator=torch.Generator().manual_seed(3)), -1)
    one_by_one = sampling(seed=7)
    singly = [int(one_by_one.draw(row[None])) for row in probs_PV]
    assert sampling(seed=7).draw(probs_PV).tolist() == singly


def test_the_law_of_logits_is_a_softmax_at_the_temperature() -> None:
    logits_V = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(sampling(0.5).law(logits_V), torch.softmax(logits_V.double() * 2, -1))
    assert sampling(1e-6).law(logits_V).tolist() == [0.0, 0.0, 1.0]
