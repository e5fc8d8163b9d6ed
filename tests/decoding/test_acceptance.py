"""Acceptance is counted by leading runs, and its sums add up (conformance 26 to 28)."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.decoding.acceptance import Acceptance, RoundCounts


def rejected_after(accepted: int, block_size: int) -> RoundCounts:
    return RoundCounts(accepted + 1, accepted, block_size - 1)


def counted(block_size: int, *responses: list[RoundCounts]) -> Acceptance:
    acceptance = Acceptance(block_size)
    for response in responses:
        acceptance.add(response)
    return acceptance


def test_runs_of_3_2_1_0_make_a_mean_of_two_and_a_half_tokens() -> None:
    found = counted(4, [rejected_after(run, 4) for run in (3, 2, 1, 0)])
    assert found.tau_micro == 2.5
    assert found.unconditional == [0.75, 0.5, 0.25]
    assert found.conditional == [0.75, 2 / 3, 0.5]
    assert found.histogram == [0, 1, 1, 1, 1]
    assert found.tau_micro == 1 + sum(filter(None, found.unconditional))


def test_micro_and_macro_differ_by_how_responses_weigh() -> None:
    long, short = [rejected_after(0, 4)] * 9, [rejected_after(3, 4)]
    found = counted(4, long, short)
    assert found.tau_micro == pytest.approx(13 / 10)
    assert found.tau_macro == pytest.approx((1 + 4) / 2)
    same = counted(4, [rejected_after(0, 4)] * 2, [rejected_after(3, 4)] * 2)
    assert same.tau_micro == same.tau_macro == 2.5


def test_responses_without_a_round_do_not_count() -> None:
    assert counted(4, []).figures() == Acceptance(4).figures()
    assert Acceptance(4).tau_micro is None and Acceptance(4).tau_macro is None
    assert counted(4, [], [rejected_after(1, 4)]).tau_macro == 2


def test_a_stop_inside_the_drafts_says_nothing_of_the_next_one() -> None:
    found = counted(4, [rejected_after(1, 4), RoundCounts(1, 1, 3)])
    assert found.unconditional == [1.0, 0.0, 0.0]
    assert found.reached == [2, 1, 0]
    assert found.conditional == [1.0, 0.0, None]
    assert found.tau_micro == 1.5


def test_a_shorter_block_offers_fewer_drafts() -> None:
    found = counted(4, [rejected_after(3, 4), RoundCounts(2, 1, 1), RoundCounts(1, 0, 0)])
    assert found.drafted == [2, 1, 1]
    assert found.unconditional == [1.0, 1.0, 1.0]


def test_the_interval_covers_the_true_acceptance_length_in_95_of_100_samples() -> None:
    draw = random.Random(0)

    def response() -> list[RoundCounts]:
        luck = draw.betavariate(4, 4)  # rounds of one response depend on each other
        runs = [next((k for k in range(4) if draw.random() > luck), 4) for _ in range(draw.randint(5, 20))]
        return [rejected_after(run, 5) for run in runs]

    truth = counted(5, *(response() for _ in range(20_000))).tau_micro
    for size in (4, 32):
        found = [counted(5, *(response() for _ in range(size))).tau_interval for _ in range(400)]
        covered = sum(low <= truth <= high for low, high in found)
        assert 0.9 < covered / len(found) < 0.985
    assert counted(4, [rejected_after(1, 4)]).tau_interval is None
    assert counted(4, [rejected_after(1, 4)], [rejected_after(1, 4)] * 3).tau_interval == (2, 2)


def test_the_interval_ends_where_no_round_can_be() -> None:
    always, never = rejected_after(3, 4), rejected_after(0, 4)
    assert counted(4, [never] * 9, [never, always]).tau_interval[0] == 1
    assert counted(4, [always] * 9, [never, always]).tau_interval[1] == 4


BLOCK = 5
rounds = st.integers(0, BLOCK - 1).map(lambda run: rejected_after(run, BLOCK))
answers = st.lists(st.lists(rounds, max_size=6), max_size=6)


@given(answers.filter(lambda found: any(found)))
def test_figures_agree_with_each_other(all_answers: list[list[RoundCounts]]) -> None:
    found = counted(BLOCK, *all_answers)
    flat = [r for answer in all_answers for r in answer]
    assert found.tau_micro is not None and 1 <= found.tau_micro <= BLOCK
    assert found.tau_micro * found.rounds == pytest.approx(sum(r.num_emitted for r in flat))
    # As SGLang defines it: accepted drafts over offered ones.
    rate = sum(r.num_accepted for r in flat) / (len(flat) * (BLOCK - 1))
    assert sum(found.accepted) / sum(found.drafted) == pytest.approx(rate)
    assert found.histogram[0] == 0 and sum(found.histogram) == found.rounds
    assert found.accepted == sorted(found.accepted, reverse=True)
    product = 1.0
    for given_, all_ in zip(found.conditional, found.unconditional, strict=True):
        product *= given_ if given_ is not None else 0.0
        assert all_ == pytest.approx(product)
