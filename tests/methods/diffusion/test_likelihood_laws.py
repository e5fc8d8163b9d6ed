"""What the bound is, where it can be known: from a table, from every order of generation, from every mask."""

import math
from array import array

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm.methods.diffusion.likelihood import bound, causal_scores, mean_and_error
from dllm.models.diffusion.config import DiffusionConfig
from dllm.training.batches import Example
from tests.decoding.table_model import PLACES, TableModel
from tests.models.small_models import MASK, small_model

TEXTS = [(0, 2, 1, 1), (2, 2, 0, 1)]
ROWS = [Example(str(n), array("i", [0, *text]), 1) for n, text in enumerate(TEXTS)]


def counted_out(model, rows=ROWS) -> list[float]:
    """Bound each response with every mask taken once."""
    found = bound(model, rows, samples=15, batch_size=7, seed=0, count_out=True)
    assert [len(own) for own in found.estimates] == [1] * len(rows)
    return [own[0] for own in found.estimates]


SEEDS = st.integers(0, 2**20)
FEW = settings(max_examples=8)


@FEW
@given(SEEDS)
def test_conditionals_of_one_table_make_the_bound_its_likelihood(seed) -> None:
    model = TableModel(seed=seed)
    wanted = [-math.log(model.table[text]) for text in TEXTS]
    assert counted_out(model) == pytest.approx(wanted, abs=1e-5)


@FEW
@given(SEEDS, st.just(1.0) | st.floats(0.5, 0.8) | st.floats(1.3, 2.0))
@example(2, 0.6)
@example(2, 1.7)
def test_the_bound_is_the_average_over_all_orders_of_generation(seed, sharpness) -> None:
    """Law: the mean over orders; by Jensen no less than the likelihood of their average."""
    model = TableModel(seed=seed, sharpness=sharpness)
    for found, text in zip(counted_out(model), TEXTS, strict=True):
        orders = model.orders(text)
        assert found == pytest.approx(-sum(orders) / len(orders), abs=1e-5)
        of_average = -math.log(sum(math.exp(x) for x in orders) / len(orders))
        assert found >= of_average - 1e-5
        assert found - of_average > 1e-3 or sharpness == 1 or seed != 2  # one table: all orders agree
        assert found == pytest.approx(of_average, abs=1e-5) or sharpness != 1


LEVELS_N = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
SCHEDULES = {
    "linear": (LEVELS_N, 1 / LEVELS_N),
    "cosine": (torch.cos(math.pi * (1 - LEVELS_N) / 2), math.pi / 2 * torch.tan(math.pi * (1 - LEVELS_N) / 2)),
}
"""Of each schedule, at evenly spread times: the share p = 1 - alpha that is masked, and the weight w = -alpha' / p."""


@FEW
@given(SEEDS, st.floats(0.5, 2.0))
def test_the_bound_is_the_integral_over_noise_levels_of_any_schedule(seed, sharpness) -> None:
    """Law: the integral over t of w(t) E[cross-entropies of what is masked], the same for linear and cosine noise."""
    model = TableModel(seed=seed, sharpness=sharpness)
    for found, text in zip(counted_out(model), TEXTS, strict=True):
        for share_N, weight_N in SCHEDULES.values():
            total = 0.0
            for k, loss in model.losses(text):
                total += loss * float((weight_N * share_N**k * (1 - share_N) ** (PLACES - k)).mean())
            assert found == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_of_a_schedule_add_up_to_one(schedule) -> None:
    """Law: the integral of w (1 - alpha) is alpha(0) - alpha(1) = 1."""
    share_N, weight_N = SCHEDULES[schedule]
    assert float((weight_N * share_N).mean()) == pytest.approx(1, abs=1e-6)


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


def drawn(length: int, prompt: int, seed: int) -> Example:
    ids = torch.randint(10, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example("x", array("i", ids), prompt)


@FEW
@given(st.sampled_from(["mdlm", "hybrid"]), st.integers(1, 5), st.integers(1, 6), SEEDS)
def test_blocks_of_one_token_are_the_chain_rule(mode, prompt, answer, seed) -> None:
    """Law: B = 1: every mask gives the autoregressive likelihood."""
    model, row = small_model(config=DiffusionConfig(mode, MASK, 1), seed=seed), drawn(prompt + answer, prompt, seed)
    ids, start, total = list(row.input_ids), prompt, 0.0
    for place in range(start, len(ids)):
        shown = [*ids[:place], MASK]
        # The prompt is one block to mdlm, and causal to hybrid; tokens of the answer are blocks of their own.
        block = [i if mode == "hybrid" or i >= start else start - 1 for i in range(place + 1)]
        total += F.cross_entropy(logits(model, shown, block)[-1], torch.tensor(ids[place])).item()
    found = bound(model, [row], samples=5, batch_size=3, seed=0)
    assert found.estimates[0] == pytest.approx([total] * 5, rel=1e-4)
    assert bound(model, [row], samples=1, batch_size=3, seed=0, count_out=True).estimates == [
        [pytest.approx(total, rel=1e-4)]
    ]


def test_the_bound_of_blocks_is_the_sum_of_theirs() -> None:
    """Each block bounded by itself, as the only response after clean text, adds up to the whole."""
    model = small_model(config=DiffusionConfig("mdlm", MASK, 3))
    ids = ANSWER.input_ids
    whole = counted_out(model, [ANSWER])[0]
    first = counted_out(model, [Example("6", ids[:6], 3)])[0]
    drawn = bound(model, [ANSWER], samples=400, batch_size=100, seed=0).estimates[0]
    mean, error = mean_and_error(drawn)
    assert abs(mean - whole) < 4 * error
    assert first == pytest.approx(whole_block(model, list(ids[:6])), rel=1e-4)
    assert whole == pytest.approx(first + whole_block(model, list(ids), answer=range(3, 9)), rel=1e-4)


@FEW
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), SEEDS)
def test_the_bound_of_any_blocks_is_the_sum_of_theirs(size, blocks, prompt, seed) -> None:
    """Law: each block's bound, as the only response after the clean text before it, adds up to the whole."""
    model = small_model(config=DiffusionConfig("mdlm", MASK, size), seed=seed)
    model.prompt_blocks = True  # so that what is now an answer's block is seen the same as a prompt's
    begin = size * (prompt // size + 1)
    ids = drawn(begin + size * blocks, begin, seed).input_ids
    parts = [Example("x", ids[: end + size], end) for end in range(begin, len(ids), size)]
    assert counted_out(model, [Example("x", ids, begin)])[0] == pytest.approx(sum(counted_out(model, parts)), rel=1e-4)


@FEW
@given(st.integers(1, 4), st.integers(3, 10), SEEDS, st.data())
def test_likelihoods_of_causal_models_add_up_at_any_cut(prompt, answer, seed, data) -> None:
    """Law: log p(context + continuation) - log p(context) = log p(continuation | context)."""
    model, length = small_model(config=DiffusionConfig("hybrid", MASK, 4), seed=seed), prompt + answer
    ids = drawn(length, prompt, seed).input_ids
    cut = data.draw(st.integers(prompt + 1, length - 1))
    parts = [Example("x", ids, prompt), Example("x", ids[:cut], prompt), Example("x", ids, cut)]
    (whole, _), (context, _), (rest, _) = causal_scores(model, parts, batch_size=3)
    assert whole - context == pytest.approx(rest, rel=1e-4, abs=1e-4)


@FEW
@given(st.integers(1, 3), st.integers(2, 3), SEEDS, st.data())
def test_bounds_by_blocks_add_up_where_a_cut_lies_between_blocks(size, blocks, seed, data) -> None:
    """Law: the same of block bounds, at cuts that are aligned; whole bounds and other cuts have nothing like it."""
    model = small_model(config=DiffusionConfig("mdlm", MASK, size), seed=seed)
    model.prompt_blocks = True
    ids = drawn(size * (blocks + 1), size, seed).input_ids
    cut = size * data.draw(st.integers(2, blocks))
    whole, context, rest = counted_out(
        model, [Example("x", ids, size), Example("x", ids[:cut], size), Example("x", ids, cut)]
    )
    assert whole - context == pytest.approx(rest, rel=1e-4, abs=1e-4)


def whole_block(model, ids: list[int], answer: range = range(3, 6)) -> float:
    """Bound the last three tokens of a text of which the response's earlier blocks are known."""
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
    model.model_config.final_logit_softcapping = 0.01  # next to uniform
    flat = (len(ANSWER) - ANSWER.prompt_length) * math.log(len(model.head_VD))
    assert causal_scores(model, [ANSWER], batch_size=1)[0][0] == pytest.approx(flat, rel=1e-2)
    assert counted_out(model, [Example("x", ANSWER.input_ids[:6], 3)])[0] == pytest.approx(flat / 2, rel=1e-2)
    assert before != pytest.approx(flat, rel=1e-2)
