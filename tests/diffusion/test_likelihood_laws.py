"""What the bound is, where it can be known: from a table, from every order of writing, from every mask."""

import math
from array import array

import pytest
import torch
import torch.nn.functional as F

from dllm.data.collate import Example
from dllm.diffusion.likelihood import bound, causal_scores, mean_and_error
from dllm.models.bidirectional import Note
from tests.diffusion.table_model import PLACES, TableModel
from tests.models.small_models import MASK, small_model

TEXTS = [(0, 2, 1, 1), (2, 2, 0, 1)]
ROWS = [Example(str(n), array("i", [0, *text]), 1) for n, text in enumerate(TEXTS)]


def counted_out(model, rows=ROWS) -> list[float]:
    """Bound each answer with every mask taken once."""
    found = bound(model, rows, samples=15, batch_size=7, seed=0, count_out=True)
    assert [len(own) for own in found.estimates] == [1] * len(rows)
    return [own[0] for own in found.estimates]


def test_conditionals_of_one_table_make_the_bound_its_likelihood() -> None:
    model = TableModel(seed=1)
    wanted = [-math.log(model.table[text]) for text in TEXTS]
    assert counted_out(model) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 1.7])
def test_the_bound_is_the_average_over_all_orders_of_writing(sharpness) -> None:
    model = TableModel(seed=2, sharpness=sharpness)
    for found, text in zip(counted_out(model), TEXTS, strict=True):
        orders = model.orders(text)
        assert found == pytest.approx(-sum(orders) / len(orders), abs=1e-5)
        of_average = -math.log(sum(math.exp(x) for x in orders) / len(orders))
        assert found >= of_average - 1e-5
        assert found - of_average > 1e-3 or sharpness == 1  # one table: all orders agree


def test_the_bound_is_the_integral_over_noise_levels() -> None:
    model = TableModel(seed=3, sharpness=1.4)
    steps = 4000
    for found, text in zip(counted_out(model), TEXTS, strict=True):
        total = 0.0
        for k, loss in model.losses(text):
            levels = [(n + 0.5) / steps for n in range(steps)]
            total += loss * sum(t ** (k - 1) * (1 - t) ** (PLACES - k) for t in levels) / steps
        assert found == pytest.approx(total, abs=1e-4)


def test_drawn_masks_come_as_near_as_their_error_says() -> None:
    """Over many seeds the estimates centre on the bound, and none is further off than errors go."""
    model = TableModel(seed=4, sharpness=1.5)
    exact = counted_out(model)[0]
    spread = {}
    for samples in (4, 64):
        runs = [bound(model, ROWS[:1], samples=samples, batch_size=64, seed=seed).estimates[0] for seed in range(40)]
        pairs = [mean_and_error(own) for own in runs]
        mean, error = mean_and_error([mean for mean, _ in pairs])
        assert abs(mean - exact) < 4 * error
        spread[samples] = error * math.sqrt(len(runs))
        typical = math.sqrt(sum(e**2 for _, e in pairs) / len(pairs))
        assert spread[samples] < 1.5 * typical  # evenly spread numbers of masks do better than independent ones
        if samples == 64:
            assert all(abs(m - exact) < 5 * e for m, e in pairs)
    assert spread[64] < spread[4] / 2.5


def test_one_token_leaves_nothing_to_draw() -> None:
    model = small_model()
    row = Example("x", array("i", [5, 6, 7]), 2)
    found = bound(model, [row], samples=9, batch_size=4, seed=0).estimates[0]
    assert max(found) - min(found) < 1e-5
    assert counted_out(model, [row]) == pytest.approx([found[0]], rel=1e-5)


ANSWER = Example("x", array("i", [21, 22, 23, 24, 25, 26, 27, 28, 29]), 3)


def logits(model, ids: list[int], block: list[int]) -> torch.Tensor:
    """Run one text by blocks. Shapes: returns logits_SV."""
    blocks = torch.tensor(block)
    allowed = (blocks[None] <= blocks[:, None])[None]
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]), allowed_BSS=allowed))[0]


@pytest.mark.parametrize("mode", ["mdlm", "hybrid"])
def test_blocks_of_one_token_are_the_chain_rule(mode) -> None:
    model = small_model(note=Note(mode, MASK, 1))
    ids, start, total = list(ANSWER.input_ids), ANSWER.prompt_length, 0.0
    for place in range(start, len(ids)):
        shown = [*ids[:place], MASK]
        # The prompt is one block to mdlm, and causal to hybrid; tokens of the answer are blocks of their own.
        block = [i if mode == "hybrid" or i >= start else start - 1 for i in range(place + 1)]
        total += F.cross_entropy(logits(model, shown, block)[-1], torch.tensor(ids[place])).item()
    found = bound(model, [ANSWER], samples=5, batch_size=3, seed=0)
    assert found.estimates[0] == pytest.approx([total] * 5, rel=1e-4)
    assert bound(model, [ANSWER], samples=1, batch_size=3, seed=0, count_out=True).estimates == [
        [pytest.approx(total, rel=1e-4)]
    ]


def test_the_bound_of_blocks_is_the_sum_of_theirs() -> None:
    """Each block bounded by itself, as the only answer after clean text, adds up to the whole."""
    model = small_model(note=Note("mdlm", MASK, 3))
    ids = ANSWER.input_ids
    whole = counted_out(model, [ANSWER])[0]
    first = counted_out(model, [Example("6", ids[:6], 3)])[0]
    drawn = bound(model, [ANSWER], samples=400, batch_size=100, seed=0).estimates[0]
    mean, error = mean_and_error(drawn)
    assert abs(mean - whole) < 4 * error
    assert first == pytest.approx(whole_block(model, list(ids[:6])), rel=1e-4)
    assert whole == pytest.approx(first + whole_block(model, list(ids), answer=range(3, 9)), rel=1e-4)


def whole_block(model, ids: list[int], answer: range = range(3, 6)) -> float:
    """Bound the last three tokens of a text of which the answer's earlier blocks are known."""
    places = list(answer)[-3:]
    block = [-1 if i < answer[0] else (i - answer[0]) // 3 for i in range(len(ids))]
    total = 0.0
    for bits in range(1, 8):
        masked = [place for n, place in enumerate(places) if bits >> n & 1]
        shown = [MASK if i in masked else token for i, token in enumerate(ids)]
        found = logits(model, shown, block)[masked]
        loss = F.cross_entropy(found, torch.tensor([ids[i] for i in masked]), reduction="sum").item()
        total += loss / (len(masked) * math.comb(3, len(masked)))
    return total


def test_capped_logits_are_scored_as_they_are_sampled() -> None:
    model = small_model()
    before = causal_scores(model, [ANSWER], batch_size=1)[0][0]
    model.config.final_logit_softcapping = 0.01  # next to uniform
    flat = (len(ANSWER) - ANSWER.prompt_length) * math.log(len(model.head_VD))
    assert causal_scores(model, [ANSWER], batch_size=1)[0][0] == pytest.approx(flat, rel=1e-2)
    assert counted_out(model, [Example("x", ANSWER.input_ids[:6], 3)])[0] == pytest.approx(flat / 2, rel=1e-2)
    assert before != pytest.approx(flat, rel=1e-2)
