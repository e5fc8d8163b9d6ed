"""The largest logits, and the walk over candidates: greedy against a plain loop, sampled against the law it returns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.models.drafts.proposal import Sampling
from dllm.models.drafts.selector import CandidateSelector, top_candidates


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_largest_logits_are_topks_and_their_ids_rise(width: int, number: int, seed: int, dtype) -> None:
    logits_MV = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    number = min(number, width)
    values_MK, ids_MK = top_candidates(logits_MV, number)
    assert torch.equal(values_MK.sort(-1, descending=True).values, logits_MV.topk(number).values)
    assert torch.equal(logits_MV.gather(1, ids_MK), values_MK)
    assert number == 1 or (ids_MK.diff() > 0).all()


def test_the_first_of_equal_logits_comes_first() -> None:
    logits_MV = torch.zeros(1, 700)
    logits_MV[0, [650, 3, 320]] = 1.0
    assert top_candidates(logits_MV, 3)[1].tolist() == [[3, 320, 650]]


def drawn_selector(vocab: int = 60, rank: int = 5, top_k: int = 4) -> CandidateSelector:
    torch.manual_seed(1)
    selector = CandidateSelector(8, vocab, rank, top_k)
    for parameter in selector.parameters():
        torch.nn.init.normal_(parameter)
    return selector.requires_grad_(False)


def scores_after(selector: CandidateSelector, before: int, hidden_D, logits_V) -> dict[int, float]:
    gate = selector.predecessor_codebook[before] * selector.hidden_projection(hidden_D)
    ids = logits_V.topk(min(selector.top_k, len(logits_V))).indices.tolist()
    return {b: (logits_V[b] + gate @ selector.successor_codebook[b]).item() for b in ids}


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_a_greedy_walk_takes_the_best_candidate_after_the_last(slots: int) -> None:
    selector, wants, parts = drawn_selector(), [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        hidden_PD, logits_PV = torch.randn(slots, 8, generator=generator), torch.randn(slots, 60, generator=generator)
        want, before = [], seed
        for hidden_D, logits_V in zip(hidden_PD, logits_PV, strict=True):
            scores = scores_after(selector, before, hidden_D, logits_V)
            before = max(scores, key=scores.__getitem__)
            want.append(before)
        wants.append(want)
        parts.append((hidden_PD, logits_PV))
        assert selector.greedy(torch.tensor([seed]), hidden_PD[None], logits_PV[None]).tolist() == [want]
    hidden_NPD, logits_NPV = (torch.stack(each) for each in zip(*parts, strict=True))
    assert selector.greedy(torch.arange(20), hidden_NPD, logits_NPV).tolist() == wants


def test_a_sampled_walk_draws_from_the_law_that_it_returns() -> None:
    selector, generator = drawn_selector(), torch.Generator().manual_seed(5)
    hidden_PD, logits_PV = torch.randn(3, 8, generator=generator), torch.randn(3, 60, generator=generator)
    sampling = Sampling(0.7, torch.Generator().manual_seed(0))
    firsts = torch.zeros(60)
    for _ in range(300):
        found = selector.sample(9, hidden_PD, logits_PV, sampling)
        before = 9
        for p, token in enumerate(found.ids_P.tolist()):
            scores = scores_after(selector, before, hidden_PD[p], logits_PV[p])
            law = torch.zeros(60, dtype=torch.float64)
            law[list(scores)] = torch.softmax(torch.tensor(list(scores.values()), dtype=torch.float64) / 0.7, -1)
            torch.testing.assert_close(found.probs_PV[p], law, atol=1e-5, rtol=1e-4)
            assert law[token] > 0
            before = token
        firsts[found.ids_P[0]] += 1 / 300
    torch.testing.assert_close(firsts, found.probs_PV[0].float(), atol=0.12, rtol=0)  # four standard errors


def test_more_candidates_than_logits_are_all_of_them() -> None:
    selector = drawn_selector(top_k=50)
    assert CandidateSelector(8, 6, 5, 16).top_k == 6
    found = selector.greedy(torch.tensor([1]), torch.randn(1, 2, 8), torch.randn(1, 2, 7))
    assert found.shape == (1, 2) and int(found.max()) < 7
