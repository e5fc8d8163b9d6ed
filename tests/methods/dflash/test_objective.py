"""The training objective: anchors, labels, loss and counts against oracles and stored numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.methods.dflash.anchors import Anchors, candidates, draw_anchors
from dllm.methods.dflash.objective import Batch, block_labels, dflash_terms
from dllm.methods.dflash.objectives import decay_weights, dpace_weights
from tests.models.drafts.test_attention import tiny_draft

SAMPLINGS = ["without_replacement", "with_replacement", "non_overlapping"]


def mask(bits: list[int]) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.bool)


def test_candidates_are_supervised_and_followed_by_a_supervised_token():
    assert candidates(mask([1, 1, 0, 1, 0, 1, 1])[0]).tolist() == [0, 5]


@settings(max_examples=60)
@given(
    st.lists(st.booleans(), min_size=2, max_size=60),
    st.integers(1, 12),
    st.integers(2, 8),
    st.sampled_from(SAMPLINGS),
    st.integers(0, 9),
)
def test_anchors_are_lawful(bits, num_blocks, block_size, sampling, seed):
    drawn = draw_anchors(
        torch.tensor([bits]), num_blocks=num_blocks, block_size=block_size, sampling=sampling, seeds=[seed]
    )
    found = drawn.pos_BN[0][drawn.keep_BN[0]].tolist()
    allowed = candidates(torch.tensor(bits)).tolist()
    assert set(found) <= set(allowed) and found == sorted(found) and len(found) <= num_blocks
    assert bool(found) == bool(allowed)
    if sampling == "without_replacement":
        assert len(set(found)) == len(found) == min(num_blocks, len(allowed))
    if sampling == "with_replacement" and allowed:
        assert len(found) == num_blocks
    if sampling == "non_overlapping":
        assert all(b - a >= block_size for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_rows_anchors_depend_on_its_seed_alone(sampling):
    row = torch.tensor([0] * 5 + [1] * 30, dtype=torch.bool)
    padded = torch.cat([row, torch.zeros(20, dtype=torch.bool)])
    other = torch.ones(55, dtype=torch.bool)
    draw = dict(num_blocks=6, block_size=4, sampling=sampling)
    alone = draw_anchors(row[None], seeds=[7], **draw)
    within = draw_anchors(torch.stack([other, padded]), seeds=[3, 7], **draw)
    assert alone.pos_BN[0][alone.keep_BN[0]].tolist() == within.pos_BN[1][within.keep_BN[1]].tolist()
    again = draw_anchors(row[None], seeds=[8], **draw)
    assert alone.pos_BN.tolist() != again.pos_BN.tolist()


def test_labels_are_the_token_at_the_slot_itself():
    ids = torch.arange(100, 110)[None]
    supervised = mask([0, 0, 1, 1, 1, 0, 1, 1, 1, 1])
    anchors = Anchors(torch.tensor([[2, 7, 0]]), torch.tensor([[True, True, False]]))
    labels = block_labels(Batch(ids, supervised, torch.zeros(1, 10, 1)), anchors, 4)
    assert labels.ids_BNP[0, 0].tolist() == [103, 104, 105]
    assert labels.valid_BNP[0].tolist() == [[True, True, False], [True, True, False], [False, False, False]]


def test_decay_weights_are_the_papers():
    weights = decay_weights(16, 0)
    stored = [1, 0.866878, 0.751477, 0.651439, 0.564718, 0.489542, 0.424373, 0.367879, 0.318907, 0.276453]
    torch.testing.assert_close(weights[:10], torch.tensor(stored), atol=1e-6, rtol=0)
    assert weights.sum().item() == pytest.approx(6.630611, abs=1e-5)
    assert decay_weights(10, 0).sum().item() == pytest.approx(4.604758, abs=1e-5)
    assert decay_weights(8, 0).sum().item() == pytest.approx(3.735212, abs=1e-5)


def test_dpace_weights_are_the_stored_ones():
    weights = dpace_weights(torch.full((1, 3), 0.5), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([[1.734375, 0.984375, 0.421875]]))


def batch_of(rows: int, length: int = 24, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(49, (rows, length), generator=generator)
    supervised = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        supervised[row, 4 + row : length - row] = True
    return Batch(ids, supervised, torch.randn(rows, length, 64, generator=generator))


def terms_of(draft, batch, rows, **options):
    part = Batch(batch.input_ids_BS[rows], batch.loss_mask_BS[rows], batch.features_BSF[rows])
    anchors = draw_anchors(
        part.loss_mask_BS, num_blocks=5, block_size=4, sampling="without_replacement", seeds=[100 + r for r in rows]
    )
    generator = torch.Generator().manual_seed(9)
    table = torch.randn(50, 32, generator=generator)
    return dflash_terms(draft, table, table, part, anchors, gamma=2.0, **options), part, anchors


@pytest.mark.parametrize("loss", ["decay", "dpace"])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0], [2, 1]]])
def test_loss_and_gradient_do_not_depend_on_the_split(loss, split):
    batch, grads = batch_of(4), []
    values = []
    for parts in ([[0, 1, 2, 3]], split):
        draft = tiny_draft()
        terms = [terms_of(draft, batch, rows, loss=loss)[0] for rows in parts]
        pooled = sum(t.numerator for t in terms) / sum(t.denominator for t in terms)
        pooled.backward()
        grads.append(torch.cat([p.grad.flatten() for p in draft.parameters()]))
        values.append(pooled.item())
        counts = [sum(t.correct_P for t in terms).tolist(), sum(t.count_P for t in terms).tolist()]
        values.append([*counts, sum(t.run_sum for t in terms), sum(t.num_blocks for t in terms)])
    assert values[0] == pytest.approx(values[2], rel=1e-5) and values[1] == values[3]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_loss_does_not_depend_on_the_chunk(chunk):
    batch = batch_of(2)
    one = terms_of(tiny_draft(), batch, [0, 1], chunk=7)[0].numerator.item()
    assert terms_of(tiny_draft(), batch, [0, 1], chunk=chunk)[0].numerator.item() == pytest.approx(one, rel=1e-5)


def test_denominator_is_the_sum_of_the_weights_that_count():
    terms, part, anchors = terms_of(tiny_draft(), batch_of(3), [0, 1, 2])
    labels = block_labels(part, anchors, 4)
    by_hand = sum(
        math.exp(-k / 2.0) for row in labels.valid_BNP.flatten(0, 1).tolist() for k, counts in enumerate(row) if counts
    )
    assert terms.denominator == pytest.approx(by_hand, rel=1e-6)
    blocks = terms_of(tiny_draft(), batch_of(3), [0, 1, 2], loss="dpace")[0].denominator
    assert blocks == labels.valid_BNP.any(-1).sum()


def test_runs_and_counts_match_a_plain_loop():
    draft = tiny_draft(3)
    terms, part, anchors = terms_of(draft, batch_of(3, seed=5), [0, 1, 2])
    labels = block_labels(part, anchors, 4)
    generator = torch.Generator().manual_seed(9)
    table = torch.randn(50, 32, generator=generator)
    tokens = part.input_ids_BS.gather(1, anchors.pos_BN)
    embeds = torch.cat([table[tokens][:, :, None], table[49].expand(*tokens.shape, 3, -1)], 2)
    best = (draft(embeds, part.features_BSF, anchors.pos_BN, anchors.keep_BN) @ table.T).argmax(-1)
    runs = blocks = 0
    correct = [0, 0, 0]
    for b, n in anchors.keep_BN.nonzero().tolist():
        right = (best[b, n] == labels.ids_BNP[b, n]) & labels.valid_BNP[b, n]
        correct = [c + int(r) for c, r in zip(correct, right, strict=True)]
        run = 0
        while run < 3 and right[run]:
            run += 1
        runs, blocks = runs + run, blocks + int(labels.valid_BNP[b, n, 0])
    assert (terms.run_sum, terms.num_blocks, terms.correct_P.tolist()) == (runs, blocks, correct)


def test_a_smaller_vocabulary_that_holds_every_label_changes_only_the_normaliser():
    batch = batch_of(2)
    draft = tiny_draft()
    part = Batch(batch.input_ids_BS, batch.loss_mask_BS, batch.features_BSF)
    anchors = draw_anchors(part.loss_mask_BS, num_blocks=5, block_size=4, sampling="without_replacement", seeds=[1, 2])
    table = torch.randn(50, 32, generator=torch.Generator().manual_seed(9))
    everything = torch.arange(50)
    full = dflash_terms(draft, table, table, part, anchors, gamma=2.0)
    same = dflash_terms(draft, table, table, part, anchors, gamma=2.0, vocab_ids=everything)
    assert full.numerator.item() == same.numerator.item()
    used = part.input_ids_BS.unique()
    fewer = dflash_terms(draft, table, table[used], part, anchors, gamma=2.0, vocab_ids=used)
    assert fewer.numerator.item() < full.numerator.item() and fewer.count_P.tolist() == full.count_P.tolist()


def test_a_few_steps_teach_a_block_by_heart():
    """The serving gate in small: on one sample the draft must come to predict whole blocks."""
    draft, batch = tiny_draft(), batch_of(1)
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.01)
    for _ in range(150):
        terms, _, _ = terms_of(draft, batch, [0])
        (terms.numerator / terms.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert terms.correct_P.tolist() == terms.count_P.tolist()
