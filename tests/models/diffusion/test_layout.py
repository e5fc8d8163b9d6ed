"""Blocks, and the pair [x_t | x_0]: which columns attend to which."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.models.diffusion.layout import blocks_of, paired_layout


def layout(length: int, prompt: int, size: int, clean_half="block", origin="sequence"):
    ids = torch.arange(length)[None]
    block = blocks_of(length, prompt, size, origin)[None]
    return paired_layout(ids + 100, ids, torch.ones(1, length, dtype=torch.bool), block, clean_half)


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 8))
def test_as_many_pairs_attend_as_the_papers_count(size, blocks) -> None:
    """Law: L = B K: L^2 + L B pairs, by quarter."""
    length = size * blocks
    allowed = layout(length, 0, size).allowed_BXX[0]
    noisy, clean = slice(0, length), slice(length, 2 * length)
    assert int(allowed.sum()) == length**2 + length * size
    assert int(allowed[noisy, noisy].sum()) == length * size
    assert int(allowed[noisy, clean].sum()) == size**2 * blocks * (blocks - 1) // 2
    assert int(allowed[clean, clean].sum()) == size**2 * blocks * (blocks + 1) // 2
    assert not allowed[clean, noisy].any()


@settings(max_examples=20)
@given(st.integers(2, 20), st.integers(1, 8), st.data())
def test_a_causal_clean_half_is_causal(length, size, data) -> None:
    pair = layout(length, data.draw(st.integers(0, length - 1)), size, "causal", "response")
    clean = pair.allowed_BXX[0, pair.noisy :, pair.noisy :]
    assert torch.equal(clean, torch.ones(length, length).tril().bool())


def test_the_noisy_half_leaves_out_what_no_row_needs() -> None:
    pair = layout(10, 5, 4)
    assert (pair.begin, pair.noisy) == (4, 6)
    assert pair.ids_BX[0].tolist() == [*range(104, 110), *range(10)]
    assert pair.position_ids_BX[0].tolist() == [*range(4, 10), *range(10)]
    # the first noisy block (4-7) sees itself and the clean prompt block; the second the clean 4-7 as well
    assert pair.allowed_BXX[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(6, 10)]
    assert pair.allowed_BXX[0, 4].nonzero()[:, 0].tolist() == [4, 5, *range(6, 14)]


def test_padding_attends_to_itself_alone() -> None:
    ids = torch.arange(6)[None].expand(2, -1)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    block = torch.stack([blocks_of(6, 2, 2, "sequence"), blocks_of(6, 2, 2, "sequence")])
    pair = paired_layout(ids, ids, valid, block, "block")
    seen = pair.allowed_BXX[1]
    for place in (pair.noisy - 1, pair.noisy + 5):  # a padded place in either half
        assert seen[:, place].nonzero()[:, 0].tolist() == [place]
    assert seen.any(-1).all()
