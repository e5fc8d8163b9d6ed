"""Masks: where they may lie, how often they do, and what determines them (laws of diffusion-peers, section 8)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dllm.methods.diffusion.noise import (
    Times,
    exact_count_noise,
    exact_number_noise,
    noise_generator,
    uniform_noise,
)
from dllm.models.diffusion.layout import blocks_of

QUICK = examples(max_examples=25)


@st.composite
def rows(draw):
    """A prompt, a response, a grid and the block's levels."""
    prompt, answer = draw(st.integers(0, 9)), draw(st.integers(1, 30))
    size = draw(st.sampled_from([None, 1, 4, 7]))
    block_S = blocks_of(prompt + answer, prompt, size, draw(st.sampled_from(["sequence", "response"])))
    maskable_S = torch.arange(prompt + answer) >= prompt
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    t_K = torch.rand(int(block_S.max()) + 1, generator=generator, dtype=torch.float64)
    return maskable_S, block_S, t_K, generator


@QUICK
@given(rows(), st.booleans())
def test_masks_lie_among_the_maskable_and_probabilities_between_eps_and_one(row, at_least_one) -> None:
    maskable_S, block_S, t_K, generator = row
    noise = uniform_noise(maskable_S, block_S, t_K, generator, eps=1e-3, at_least_one=at_least_one)
    assert not (noise.masked_S & ~maskable_S).any()
    assert ((noise.prob_S >= 1e-3 * 0.999) & (noise.prob_S <= 1)).all()
    assert (noise.prob_S[~maskable_S] == 1).all()
    if at_least_one:
        for block in range(len(t_K)):
            here = maskable_S & (block_S == block)
            assert not here.any() or noise.masked_S[here].any()


@QUICK
@given(rows(), st.booleans())
def test_exact_counts_are_exact_and_their_weights_add_up(row, at_least_one) -> None:
    maskable_S, block_S, t_K, generator = row
    noise = exact_count_noise(
        maskable_S, block_S, t_K, generator, eps=1e-3, block_size=8, half_life_ratio=0.25, at_least_one=at_least_one
    )
    assert not (noise.masked_S & ~maskable_S).any()
    for block, t in enumerate(t_K.tolist()):
        here = maskable_S & (block_S == block)
        n = int(here.sum())
        k = int(noise.masked_S[here].sum())
        expected = round((1 - 1e-3) * t * n + 1e-3 * n)
        assert k == (max(1, expected) if at_least_one and n else expected)
        if k:
            assert float((1 / noise.prob_S[here & noise.masked_S]).sum()) == pytest.approx(n, rel=1e-5)


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.02, 0.3, 0.9])
def test_a_position_is_masked_as_often_as_its_probability_says(t, at_least_one) -> None:
    maskable_S = torch.tensor([False, True, True, True, False, True])
    generator, draws = torch.Generator().manual_seed(1), 1500
    total, n = torch.zeros(6, dtype=torch.float64), 4
    for _ in range(draws):
        noise = uniform_noise(
            maskable_S, torch.zeros(6, dtype=torch.int64), torch.tensor([t]).double(), generator, eps=0.05,
            at_least_one=at_least_one,
        )  # fmt: skip
        total += noise.masked_S
    p = 0.95 * t + 0.05
    chance = p / (1 - (1 - p) ** n) if at_least_one else p
    assert noise.prob_S[1].item() == pytest.approx(chance, rel=1e-5)
    spread = 5 * math.sqrt(chance * (1 - chance) / draws)
    assert (total[maskable_S] / draws - chance).abs().max() <= spread + 1e-9


def test_given_that_something_is_masked_pairs_come_as_in_the_plain_kind() -> None:
    """The joint law, not only the margins: condition the plain kind by hand and compare all 2^3 outcomes."""
    maskable_S, block_S = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    generator, draws, t_K = torch.Generator().manual_seed(2), 4000, torch.tensor([0.3]).double()
    found = torch.zeros(8)
    for _ in range(draws):
        masked = uniform_noise(maskable_S, block_S, t_K, generator, eps=1e-9, at_least_one=True).masked_S
        found[int((masked.long() * torch.tensor([1, 2, 4])).sum())] += 1
    for code in range(8):
        ones = code.bit_count()
        expected = 0.3**ones * 0.7 ** (3 - ones) / (1 - 0.7**3) if ones else 0.0
        assert found[code] / draws == pytest.approx(expected, abs=5 * math.sqrt(0.25 / draws))


def test_a_pair_covers_every_position_once() -> None:
    maskable_S = torch.arange(40) > 5
    t_K = torch.tensor([0.4]).double()
    noise = uniform_noise(
        maskable_S, torch.zeros(40, dtype=torch.int64), t_K, torch.Generator().manual_seed(0), eps=1e-3,
        at_least_one=False,
    )  # fmt: skip
    other = noise.complement(maskable_S)
    assert torch.equal(noise.masked_S ^ other.masked_S, maskable_S)
    assert torch.equal(noise.prob_S[maskable_S] + other.prob_S[maskable_S], torch.ones(34))


@QUICK
@given(rows())
def test_a_pair_covers_every_position_of_any_row_once(row) -> None:
    """Law: the masks of a pair are disjoint and together all maskable positions; so are their probabilities 1."""
    maskable_S, block_S, t_K, generator = row
    noise = uniform_noise(maskable_S, block_S, t_K, generator, eps=1e-3, at_least_one=False)
    other = noise.complement(maskable_S)
    assert torch.equal(noise.masked_S ^ other.masked_S, maskable_S)
    assert not (noise.masked_S & other.masked_S).any()
    assert torch.equal((noise.prob_S + other.prob_S)[maskable_S], torch.ones(int(maskable_S.sum())))
    assert (other.prob_S[~maskable_S] == 1).all()


def test_late_positions_are_masked_sooner() -> None:
    maskable_S, block_S = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)
    generator, total = torch.Generator().manual_seed(3), torch.zeros(8)
    for _ in range(600):
        total += exact_count_noise(
            maskable_S, block_S, torch.tensor([0.4]).double(), generator, eps=1e-3, block_size=8, half_life_ratio=0.25,
            at_least_one=True,
        ).masked_S  # fmt: skip
    assert total[0] < 0.6 * total[7]
    assert total.sum() == 600 * 3


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_odds_of_two_positions_are_those_of_the_half_life(ratio) -> None:
    """Law of choice, one mask per block: position i is 2^((1 - r) i / (ratio B)) times as likely as position 0."""
    size, blocks, t, eps = 8, 40_000, 0.125, 1e-3
    noise = exact_count_noise(
        torch.ones(size * blocks, dtype=torch.bool), torch.arange(size * blocks) // size,
        torch.full((blocks,), t, dtype=torch.float64), torch.Generator().manual_seed(6), eps=eps, block_size=size,
        half_life_ratio=ratio, at_least_one=True,
    )  # fmt: skip
    share_B = noise.masked_S.view(blocks, size).double().mean(0)
    assert noise.masked_S.view(blocks, size).sum(1).eq(1).all()
    r = (1 - eps) * t + eps
    wanted_B = 2 ** ((1 - r) * torch.arange(size) / (ratio * size))
    wanted_B = wanted_B / wanted_B.sum()
    assert ((share_B - wanted_B).abs() <= 5 * (wanted_B / blocks).sqrt()).all()


@pytest.mark.parametrize("number", [1, 3, 6])
def test_an_exact_number_is_masked_every_choice_alike(number) -> None:
    maskable_S = torch.tensor([False, True, True, True, True, True, True])
    generator, total = torch.Generator().manual_seed(4), torch.zeros(7)
    for _ in range(1000):
        noise = exact_number_noise(maskable_S, number, generator)
        assert int(noise.masked_S.sum()) == number and not noise.masked_S[0]
        total += noise.masked_S
    assert (total[1:] / 1000 - number / 6).abs().max() < 5 * 0.5 / math.sqrt(1000)


def test_noise_follows_from_seed_epoch_and_row_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    draws = [torch.rand(3, generator=noise_generator(*key)).tolist() for key in _keys()]
    assert torch.equal(torch.get_rng_state(), state)
    assert draws == [torch.rand(3, generator=noise_generator(*key)).tolist() for key in _keys()]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def _keys():
    return [(s, split, e, i) for s in (0, 1) for split in ("train", "heldout") for e in (0, 1) for i in ("a-0", "b-0")]


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_noise_levels_are_uniform(low_discrepancy) -> None:
    ids = [f"r{i}" for i in range(400)]
    times = Times(ids, 7, "train", low_discrepancy)

    def levels(epoch):
        found = (times.of(row, epoch, 1, noise_generator(7, "train", epoch, ids[row])) for row in range(400))
        return torch.cat(list(found)).sort().values

    even = (torch.arange(400) + 0.5) / 400
    assert (levels(0) - even).abs().max() < (0.006 if low_discrepancy else 1.63 / math.sqrt(400))
    assert not torch.equal(levels(0), levels(1))
    per_block = torch.stack([times.of(row, 0, 4, noise_generator(7, "train", 0, ids[row])) for row in range(400)])
    assert ((per_block >= 0) & (per_block < 1)).all()
    assert (per_block.mean(0) - 0.5).abs().max() < 5 * 0.29 / math.sqrt(400)
    if low_discrepancy:
        assert torch.equal((per_block * 4).floor().sort(1).values, torch.arange(4.0).double().expand(400, 4))


def test_a_block_grid_begins_with_the_row_or_the_response() -> None:
    assert blocks_of(9, 5, 4, "sequence").tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 1]
    assert blocks_of(9, 5, 4, "response").tolist() == [-1, -1, -1, -1, -1, 0, 0, 0, 0]
    assert blocks_of(9, 5, 4, "response", prompt_blocks=True).tolist() == [-2, -1, -1, -1, -1, 0, 0, 0, 0]
    assert blocks_of(3, 1, None, "sequence").tolist() == [0, 0, 0]
