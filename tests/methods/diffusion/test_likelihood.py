"""The bound against its exact value, where all masks can be counted."""

from array import array
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from dllm.config.params import Target, Train
from dllm.methods.diffusion.build import initial_model
from dllm.methods.diffusion.likelihood import Bound, bound, causal_nll
from dllm.models.diffusion.config import DiffusionConfig
from dllm.training.batches import Example

TARGET = Target(model="builtin:tiny", dtype="float32")
ANSWERS = [Example(f"{n}-0", array("i", range(20 + n, 27 + n)), 7 - n) for n in (1, 3, 4)]


@pytest.fixture
def model():
    return initial_model(TARGET, Train(mode="mdlm"), "cpu")


@torch.no_grad()
def exact(model, example: Example) -> float:
    """Sum over all numbers k of masks, and all choices of k positions, of cross-entropy times n / k."""
    ids = torch.tensor([list(example.input_ids)])
    places = range(example.prompt_length, len(example))
    n, total = len(places), 0.0
    for k in range(1, n + 1):
        losses = []
        for chosen in combinations(places, k):
            masked = torch.zeros_like(ids, dtype=torch.bool)
            masked[0, list(chosen)] = True
            logits = model.logits(model.hidden(ids.masked_fill(masked, model.mask_token_id)))
            losses.append(F.cross_entropy(logits[masked], ids[masked], reduction="sum").item())
        total += n / k * sum(losses) / len(losses) / n
    return total


def test_the_estimate_is_within_its_own_error_of_the_exact_bound(model) -> None:
    found = bound(model, ANSWERS, samples=96, batch_size=64, seed=3).figures()
    tokens = sum(len(a) - a.prompt_length for a in ANSWERS)
    assert found["likelihood_tokens"] == tokens
    assert abs(found["nelbo"] - sum(exact(model, a) for a in ANSWERS) / tokens) < 4 * found["nelbo_se"]


def test_the_bound_of_a_response_of_one_token_is_exact(model) -> None:
    found = bound(model, [ANSWERS[0]], samples=4, batch_size=3, seed=0).figures()
    assert len(ANSWERS[0]) - ANSWERS[0].prompt_length == 1
    assert found["nelbo_se"] == pytest.approx(0, abs=1e-6)
    assert found["nelbo"] == pytest.approx(exact(model, ANSWERS[0]), rel=1e-5)


def test_the_bound_depends_on_neither_batch_nor_order(model) -> None:
    one = bound(model, ANSWERS, samples=6, batch_size=64, seed=1)
    two = bound(model, ANSWERS[::-1], samples=6, batch_size=4, seed=1)
    for ours, theirs in zip(one.estimates, two.estimates[::-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert one.masked == two.masked


@pytest.mark.parametrize("samples", [3, 8])
def test_counts_are_uniform_over_one_to_n(model, samples) -> None:
    from dllm.methods.diffusion.likelihood import _plan

    example = ANSWERS[1]  # three answer tokens
    counts = torch.zeros(4)
    for seed in range(150):
        for masked, chance, _ in _plan(model, example, samples, seed, False).masks:
            counts[int(masked.sum())] += 1
            assert chance[-1] == pytest.approx(int(masked.sum()) / 3)
    assert counts[0] == 0
    assert (counts[1:] / counts.sum() - 1 / 3).abs().max() < 0.1


def test_blocks_of_one_token_give_the_likelihood_itself(model) -> None:
    """Noisy blocks of one masked token look at clean text only: every mask gives the same sum."""
    model.config = DiffusionConfig("mdlm", model.mask_token_id, 1)
    found = bound(model, ANSWERS, samples=3, batch_size=8, seed=0).figures()
    assert found["nelbo_se"] == pytest.approx(0, abs=1e-6)
    assert found["by_noise_level"][-1]["tokens"] == 3 * found["likelihood_tokens"]


def test_the_causal_likelihood_is_transformers_own(model) -> None:
    found = causal_nll(model, ANSWERS, batch_size=2)
    total, tokens = 0.0, 0
    for answer in ANSWERS:
        ids = torch.tensor([list(answer.input_ids)])
        with torch.no_grad():
            logits = model.logits(model.causal_hidden(ids))[0, :-1]
        ahead = slice(answer.prompt_length - 1, None)
        total += F.cross_entropy(logits[ahead], ids[0, 1:][ahead], reduction="sum").item()
        tokens += len(answer) - answer.prompt_length
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_errors_of_responses_add_up_as_independent_ones_do() -> None:
    """Three responses of 10 tokens: their standard errors are 1, 2 and 0 nats."""
    found = Bound(tokens=10, estimates=[[1.0, 3.0], [2.0, 6.0], [5.0]]).figures()
    assert found["nelbo"] == pytest.approx((2 + 4 + 5) / 10)
    assert found["nelbo_se"] == pytest.approx(5**0.5 / 10)


def test_a_noise_level_holds_what_was_masked_up_to_it(model) -> None:
    """Ten tokens, each number of masks once: k masks are k tokens at a level of k / 10."""
    answer = Example("x-0", array("i", range(20, 33)), 3)
    found = bound(model, [answer], samples=10, batch_size=4, seed=0).figures()
    levels = [(level["masked_up_to"], level["tokens"]) for level in found["by_noise_level"]]
    assert levels == [(k / 10, k) for k in range(1, 11)]
