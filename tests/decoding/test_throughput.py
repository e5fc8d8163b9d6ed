"""Which number of draft tokens pays: the arithmetic, and what is measured within a bound."""

import itertools
from collections.abc import Callable

import pytest

from dllm.config.params import Target
from dllm.decoding.speculative import Decoder
from dllm.decoding.throughput import StepTimes, expected_throughput, measure
from dllm.models import targets
from dllm.models.drafts.dflash import DFlashDraft
from tests.decoding.stand_in_drafts import config

CURVE = [0.5, 0.25, 0.125]


def times(concurrency: int, per_slot: float) -> StepTimes:
    """A step of 10 ms and so much more for every slot after the first; a draft pass of 2 ms."""
    slots = range(1, 5)
    return StepTimes(concurrency, {n: 0.010 + per_slot * (n - 1) for n in slots}, {n: 0.002 for n in slots if n > 1})


def test_tokens_per_second_are_tokens_a_round_over_its_time() -> None:
    found = expected_throughput([times(1, 0.0), times(8, 0.002), times(32, 0.020)], CURVE)
    assert found["tokens_per_s"]["1"]["0"] == pytest.approx(100)
    assert found["tokens_per_s"]["1"]["3"] == pytest.approx(1.875 / 0.012)
    assert found["tokens_per_s"]["8"]["1"] == pytest.approx(8 * 1.5 / 0.014)
    assert found["best_draft_tokens"] == {"1": 3, "8": 2, "32": 0}
    assert found["loses_from_concurrency"] == 32
    assert found["predicted_speedup"] == pytest.approx(1.875 / 1.2)
    assert expected_throughput([times(1, 0.0), times(8, 0.002)], CURVE)["loses_from_concurrency"] is None
    every = expected_throughput([times(1, 0.02), times(8, 0.02)], CURVE)
    assert every["loses_from_concurrency"] == 1
    again = expected_throughput([times(1, 0.02), times(8, 0.0), times(32, 0.02)], CURVE)
    assert again["loses_from_concurrency"] == 32, "from there on at every concurrency"
    unknown = expected_throughput([times(1, 0.0)], [0.5, None, None])
    assert unknown["best_draft_tokens"] == {"1": 1}


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) / 1000


def test_steps_are_measured_concurrency_by_concurrency_within_the_time() -> None:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    draft = DFlashDraft(config(model, 4))
    draft.reset_parameters(seed=0)
    decoder = Decoder(model, draft)
    found = measure(decoder, CURVE, context=20, concurrencies=[1, 3], seconds=60, clock=ticking())
    assert {c: set(row) for c, row in found["tokens_per_s"].items()} == {c: set("0123") for c in "13"}
    assert found["steps"]["3"]["target_ms"] == pytest.approx(dict.fromkeys("1234", 1.0))
    assert found["steps"]["3"]["draft_ms"] == pytest.approx(dict.fromkeys("234", 1.0))
    assert found["predicted_speedup"] == pytest.approx(1.875 / 2)
    hasty = measure(decoder, CURVE, context=20, concurrencies=[1, 3], seconds=0.005, clock=ticking())
    assert list(hasty["tokens_per_s"]) == ["1"], "the first always, others where the time suffices"
